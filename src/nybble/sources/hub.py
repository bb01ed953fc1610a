"""Fetching a model from the Hugging Face hub: safetensors, JSON and tokenizer files, nothing that can run."""

import re
from pathlib import Path

from nybble.errors import ModelError, foreign_errors
from nybble.sources.bundled import BUNDLED

WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
UNWANTED = ["original/*", "consolidated*", "*/*"]  # second copies of the weights, other folders


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` has the form `name` or `owner/name` of a hub id, and not of a path."""
    part = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(rf"({part}/)?{part}", name) is not None and not name.endswith((".gguf", ".safetensors"))


def fetch_config(repo_id: str) -> Path:
    """The model's config.json alone, in the hub's cache.

    Raises:
        ModelError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import hf_hub_download

    def not_fetched(error: Exception) -> ModelError:  # the errors' classes have no common base
        return ModelError(
            f"config.json of {repo_id} cannot be fetched: {type(error).__name__}.",
            "Allowed: a folder, a hub id that can be reached, a .gguf file, or a shape that `nybble synth` knows.",
            "Check the spelling and the network.",
        )

    with foreign_errors(not_fetched):
        return Path(hf_hub_download(repo_id, "config.json"))


def fetch_from_hub(repo_id: str) -> Path:
    """The folder of the hub's cache that holds the model; only what is not there yet is fetched.

    Raises:
        ModelError: no network, no such model, or no right to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    allowed = f"Allowed: a folder, a .gguf file, a hub id, or {', '.join(BUNDLED)} (which needs no hub)."

    def not_fetched(error: Exception) -> ModelError:
        match error:
            case GatedRepoError():
                got = f"The hub gives {repo_id} only to those who accepted its terms."
                fix = "Accept them on the hub and log in (hf auth login)."
            case RepositoryNotFoundError():
                got = f"There is no folder {repo_id} here, and the hub has no model of that name"
                got, fix = f"{got} (or only for those logged in).", "Check the spelling."
            case LocalEntryNotFoundError():
                got = f"There is no folder {repo_id} here, and the hub cannot be reached to fetch a model of that name."
                fix = "Connect to the network, or give a model that is on this machine."
            case HfHubHTTPError():
                got, fix = f"The hub refused {repo_id}: {error}.", "Try again later."
            case _:  # of the transport, whose class depends on the HTTP library that the hub's client uses
                got = f"Fetching {repo_id} from the hub failed: {type(error).__name__}: {error}."
                fix = "Check the network and the free space in the hub's cache, then run the same command again."
        return ModelError(got, allowed, fix)

    with foreign_errors(not_fetched):
        return Path(snapshot_download(repo_id, allow_patterns=WANTED, ignore_patterns=UNWANTED))
