"""Fetching a model from the Hugging Face hub: safetensors, JSON and tokenizer files, nothing that can run; and what the
hub's refusals mean.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nybble.errors import ModelError, NybbleError, first_line, foreign_errors
from nybble.network import may_fetch
from nybble.sources.bundled import BUNDLED

WORDS = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]  # config and tokenizer
WANTED = ["*.safetensors", *WORDS]
UNWANTED = ["original/*", "consolidated*", "*/*"]  # second copies of the weights, other folders
ALLOWED = f"Allowed: a folder, a .gguf file, a hub id, or {', '.join(BUNDLED)} (which needs no hub)."


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` has the form `name` or `owner/name` of a hub id, and not of a path."""
    part = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(rf"({part}/)?{part}", name) is not None and not name.endswith((".gguf", ".safetensors"))


def fetch_config(repo_id: str, revision: str | None = None) -> Path:
    """The model's config.json alone, in the hub's cache.

    Raises:
        ModelError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import hf_hub_download

    allowed = "Allowed: a folder, a hub id that can be reached, a .gguf file, or a shape that `nybble synth` knows."
    with foreign_errors(_not_fetched(repo_id, f"config.json of {repo_id}", allowed)):
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=not may_fetch()))


def fetch_from_hub(repo_id: str, revision: str | None = None) -> Path:
    """The folder of the hub's cache that holds the model; only what is not there yet is fetched.

    Args:
        revision: a branch, a tag or a commit; of a commit that is there the hub is not asked.

    Returns:
        A folder named as its commit.

    Raises:
        ModelError: no network, no such model, or no right to it.
    """
    return _snapshot(repo_id, revision, WANTED, f"a model {repo_id}")


def fetch_tokenizer(repo_id: str) -> Path:
    """The folder of the hub's cache that holds a model's tokenizer, or image processor.

    Raises:
        ModelError: no network, no such model, or no right to it.
    """
    return _snapshot(repo_id, None, WORDS, f"a tokenizer {repo_id}")


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], what: str) -> Path:
    from huggingface_hub import snapshot_download

    with foreign_errors(_not_fetched(repo_id, what, ALLOWED)):
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=UNWANTED,
                local_files_only=not may_fetch(),
            )
        )


def _not_fetched(repo_id: str, what: str, allowed: str) -> Callable[[Exception], NybbleError]:
    def explain(error: Exception) -> ModelError:
        got, fix = said_by_hub(error, what)
        return ModelError(f"There is no folder {repo_id} here, and {got}", allowed, fix)

    return explain


def said_by_hub(error: Exception, what: str, *, sent: bool = False) -> tuple[str, str]:
    """What an error of the hub's client means: what happened, as the end of a sentence, and what to do.

    Args:
        what: was asked for, such as "a model owner/name".
        sent: something was sent there, not fetched.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if not may_fetch() or constants.is_offline_mode():
            return _offline(what)
        cause = error.__cause__  # why the hub's answer was no use
        if isinstance(cause, errors.HfHubHTTPError):
            error = cause
    match error:
        case errors.OfflineModeIsEnabled():
            return _offline(what)
        case errors.GatedRepoError():
            got = f"the hub gives {what} only to those who accepted its terms."
            return got, "Accept them on its page of the hub, and log in with that account: hf auth login, or HF_TOKEN."
        case errors.RevisionNotFoundError():
            return f"the hub has {what}, but no such revision of it.", "Check --revision: a branch, a tag or a commit."
        case errors.RepositoryNotFoundError():
            got = f"the hub has no {_bare(what)}, or not for you."
            return got, "Check the spelling; if it is private, log in: hf auth login, or HF_TOKEN."
        case errors.LocalEntryNotFoundError():
            got = f"the hub cannot be reached to fetch {what}."
            return got, "Connect to the network, or give a model that is on this machine."
        case errors.HfHubHTTPError():
            return _by_status(error, what, sent)
        case _:  # of the transport, whose class depends on the HTTP library that the hub's client uses
            got = f"asking the hub for {what} failed: {type(error).__name__}: {first_line(error)}."
            check = "the network" if sent else "the network and the free space in the hub's cache"
            return got, f"Check {check}, then run the same command again."


def _offline(what: str) -> tuple[str, str]:
    got = f"the hub's cache does not have {what} whole, and nothing may be fetched (--offline, HF_HUB_OFFLINE)."
    return got, "Run the same command once without it, or give a model that is on this machine."


def _bare(what: str) -> str:
    return re.sub(r"^an? ", "", what)


def _by_status(error: Exception, what: str, sent: bool) -> tuple[str, str]:
    response = error.response  # type: ignore[attr-defined]
    status, said = response.status_code, getattr(error, "server_message", None) or first_line(error)
    match status:
        case 401:
            got = f"the hub gives {what} to no one without a token that it takes (401)."
            return got, "Log in (hf auth login), or set HF_TOKEN to a token that is valid."
        case 403:
            got = f"the token that the hub was sent has no right to {what} (403): {said}"
            return got, "Give it that right in the hub's settings of tokens, or log in with another: hf auth login."
        case 429:
            seconds = _seconds_to_wait(response.headers)
            when = "in a few minutes" if seconds is None else f"in {seconds} s"
            return f"the hub takes no more requests from here for now, asked for {what} (429).", f"Try again {when}."
        case _ if status >= 500:
            got = f"the hub is out of order, asked for {what} ({status})."
            return got, "Try again later" + ("." if sent else "; what is in its cache already loads with --offline.")
        case _:
            return f"the hub refused {what} ({status}): {said}", "Mend what it names, and try again."


def _seconds_to_wait(headers: Mapping[str, str]) -> int | None:
    """What `Retry-After` or the hub's own `ratelimit` says."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if (said := headers.get("Retry-After", "")).isdecimal():
        return int(said)
    limits = parse_ratelimit_headers(headers)
    return None if limits is None else limits.reset_in_seconds
