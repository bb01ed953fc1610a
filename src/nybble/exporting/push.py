"""Putting what was trained onto the Hugging Face hub: an adapter, a merged folder, a GGUF file, with its card.

Only a model's own files go, those at the top of one folder: none of the run around it, and nothing else that lies
there. The token is the hub client's business (HF_TOKEN, `hf auth login`): it is neither read nor kept here.
"""

import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nybble.errors import ExportError, foreign_errors
from nybble.events import Event, Listener, Note, silent
from nybble.files.disk import disk_errors
from nybble.files.manifest import MANIFEST_NAME, verify_manifest
from nybble.formats.gguf import GgufFile
from nybble.formats.safetensors import INDEX_NAME, SafetensorsFolder
from nybble.options.use_groups import PushOptions
from nybble.runs.folder import RunFolder
from nybble.sources.hub import said_by_hub

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NO_BRANCH = re.compile(  # as git check-ref-format has it
    r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|@\{|(^|/)[.-]|\.lock(/|$)|^/|[/.]$|^@$"
)
ADAPTER, ADAPTER_CONFIG, VERIFICATION = "adapter_model.safetensors", "adapter_config.json", "verification.json"
OWN_FILES = (  # of a model, an adapter, a GGUF file, and of a folder of sentence-transformers
    *("*.safetensors", INDEX_NAME, "*.gguf", "config.json", "generation_config.json", ADAPTER_CONFIG),
    *("*tokenizer*.json", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*vocab.txt"),
    *("merges.txt", "*.jinja", "*processor_config.json", "chat_template.json"),
    *(CARD, "LICENSE*", "Modelfile*", VERIFICATION, MANIFEST_NAME),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "2_Normalize/config.json"),
)
MOST_NAMED = 4  # files that are left out, in a message


@dataclass(frozen=True)
class Pushed(Event):
    """What went onto the hub, or, of a dry run, what would.

    Args:
        folder: whose files they are.
        files: name in the repository -> bytes.
        url: of the commit; None after a dry run.
    """

    folder: Path
    repository: str
    revision: str
    files: Mapping[str, int]
    url: str | None

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def push(path: Path, repository: str, options: PushOptions, report: Listener = silent) -> Pushed:
    """Put a run's adapter or model, or a folder that nybble wrote, into a repository of the hub, in one commit.

    A push that was cut goes on when it is repeated: what the hub has already is not sent again.

    Args:
        path: a run folder, of which what it trained is pushed; or a folder with an adapter, a model, a GGUF file.
        repository: "owner/name"; made where there is none.

    Raises:
        ExportError: there is nothing to push, it is damaged or not verified, or the hub refuses it.
    """
    _check_name(repository)
    revision = options.revision or "main"
    _check_branch(revision)
    with disk_errors(path, ExportError, what="cannot be read"):
        folder = _what_was_trained(path)
        files, others = _files(folder)
        _check(folder, files)
        for note in (*_notes(folder, path), *_left_out(others)):
            report(Note(note, warning=True))
        named = {file.relative_to(folder).as_posix(): size for file, size in files.items()}
        url = None if options.dry_run else _upload(folder, list(named), repository, revision, options.private)
    pushed = Pushed(folder, repository, revision, named, url)
    report(pushed)
    return pushed


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    def refused(error: Exception) -> ExportError:
        said = " ".join(str(error).split())
        return ExportError(f"{repository!r} names no repository: {said}", "Allowed: owner/name.", "Give another name.")

    if HUB_ID.fullmatch(repository) is None:
        raise ExportError(
            f"{repository!r} names no repository.", "Allowed: owner/name.", "Put your name on the hub before it."
        )
    with foreign_errors(refused):
        validate_repo_id(repository)


def _check_branch(name: str) -> None:
    if found := NO_BRANCH.search(name):
        raise ExportError(
            f"--revision {name!r} names no branch: {found[0]!r} cannot stand there.",
            "Allowed: what git takes as a branch, such as main or tuned/second.",
            "Give another name.",
        )


def _what_was_trained(path: Path) -> Path:
    run = RunFolder(path)
    if not run.config.is_file():
        return path
    for folder in (run.adapter, run.model):
        if folder.is_dir():
            return folder
    raise ExportError(
        f"{path} holds no adapter and no model yet.",
        "A run writes them when it ends or is interrupted.",
        f"Let it end: nybble train --resume --out {path}",
    )


def _files(folder: Path) -> tuple[dict[Path, int], list[str]]:
    """Those of a model and their bytes, and the names of what else lies in the folder."""
    own = {file: file.stat().st_size for name in OWN_FILES for file in sorted(folder.glob(name)) if file.is_file()}
    top = {file.relative_to(folder).parts[0] for file in own}
    return own, sorted(entry.name for entry in folder.glob("*") if entry.name not in top)


def _left_out(names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"no part of a model, and not sent: {', '.join(names[:MOST_NAMED])}{more}"]


def _check(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a folder that is none of ours, or not as it should be."""
    named = {file.name for file in files if file.parent == folder}
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    needed = ADAPTER_CONFIG if ADAPTER in named else "config.json"
    if not weights or (needed not in named and any(file.suffix == ".safetensors" for file in weights)):
        raise ExportError(
            f"{folder} holds no adapter, no model and no GGUF file"
            + (f": there is no {needed} beside its weights." if weights else "."),
            "Allowed: a run folder, or what `nybble merge` or `nybble export` wrote.",
            "Check the path.",
        )
    if folder.name.endswith(".unverified"):
        raise ExportError(
            f"{folder} was not verified: it may not be the tuned model.",
            "Needed: a folder that `nybble merge` or `nybble export` found to be what it should.",
            f"Look at {folder / VERIFICATION}; rename the folder to push it all the same.",
        )
    if folder / MANIFEST_NAME in files:
        verify_manifest(folder)
    for file in weights:  # their headers say how long they are
        GgufFile(file) if file.suffix == ".gguf" else SafetensorsFolder(file)
    if (folder / INDEX_NAME).is_file():
        SafetensorsFolder(folder)


def _notes(folder: Path, path: Path) -> list[str]:
    """What others will stumble over."""
    notes = []
    if not (folder / CARD).is_file():
        ask = f"`nybble eval --run {path}` writes one" if path != folder else "`nybble eval` writes one into the run"
        notes.append(f"{folder} has no card ({CARD}); {ask}, with measured figures")
    outcome = _read(folder / VERIFICATION, json.loads).get("outcome", "verified")
    if outcome != "verified":
        notes.append(f"{VERIFICATION} says {outcome}: this may not be the tuned model")
    for file, base in _bases(folder).items():
        if HUB_ID.fullmatch(base) is None:
            notes.append(f"{file} names the base {base!r}, which is no hub id: others do not find it by that name")
    return notes


def _bases(folder: Path) -> dict[str, str]:
    """What files of the folder call the base."""
    found = {
        CARD: _read(folder / CARD, _header).get("base_model"),
        ADAPTER_CONFIG: _read(folder / ADAPTER_CONFIG, json.loads).get("base_model_name_or_path"),
    }
    return {name: base for name, base in found.items() if isinstance(base, str) and base}


def _header(card: str) -> Any:
    header = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    return (yaml.safe_load(header[1]) or {}) if header else {}


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a file says by name; nothing where there is none.

    Raises:
        ExportError: it says something else.
    """

    def refused(error: Exception) -> ExportError:
        said = " ".join(str(error).split())
        return ExportError(
            f"{file} cannot be read: {said}", "Allowed: as nybble writes it.", "Mend it, or export anew."
        )

    if not file.is_file():
        return {}
    with foreign_errors(refused):
        found = parse(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__} where names are due")
        return found


def _upload(folder: Path, names: list[str], repository: str, revision: str, private: bool) -> str:
    """Make the repository and the branch where there are none, and commit the files; returns the commit's address."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        raise ExportError(
            "Nothing can be sent: HF_HUB_OFFLINE is set.", "No file has changed.", "Unset it, or list with --dry-run."
        )

    def refused(error: Exception) -> ExportError:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # around what a thread of uploads met
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if type(error) is ValueError:  # the hub's complaint about the header of the card
            return ExportError(f"The hub refused {folder}: {' '.join(str(error).split())}", "", "Mend what it names.")
        got, fix = said_by_hub(error, f"a model {repository}", sent=True)
        return ExportError(got[0].upper() + got[1:], "No file in the repository has changed.", fix)

    api = HfApi()
    with foreign_errors(refused):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ExportError(
                f"{repository} is there already, and public.",
                "--private is for a repository that is made now, or private.",
                "Push to another name, make it private on the hub, or leave --private out.",
            )
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(map(glob.escape, names)),
            commit_message=f"Put {folder.name} here with nybble",
        )
    return str(done.commit_url)
