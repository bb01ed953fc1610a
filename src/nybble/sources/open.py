"""Where a base model comes from: a folder, the hub, a GGUF file or an alias, behind one interface.

A source knows the model's config and tokenizer and hands out its tensors one at a time, so that the
16-bit model never exists in memory. Code that comes with a model is never run, and pickles are never
opened.
"""

from collections.abc import Collection
from pathlib import Path

from nybble.errors import ModelError
from nybble.events import Listener, silent
from nybble.sources.bundled import BUNDLED, fetch_bundled
from nybble.sources.folder import PICKLES, FolderSource
from nybble.sources.gguf import GgufSource
from nybble.sources.hub import fetch_from_hub, fetch_tokenizer, looks_like_hub_id
from nybble.sources.stored_model import StoredModel


def open_model(
    model: str, tokenizer: str | None = None, report: Listener = silent, revision: str | None = None
) -> StoredModel:
    """The model that `model` names; none of its tensors is read.

    Args:
        model: a folder, a `.gguf` file, a hub id such as "owner/name", or an alias in `BUNDLED`.
        tokenizer: a folder or hub id to take the tokenizer from instead.
        report: told where a model is fetched.
        revision: of a model on the hub: a branch, a tag or a commit.

    Raises:
        ModelError: there is no such model, or it cannot be read or fetched.
    """
    path = Path(model).expanduser()
    check_revision(model, revision)
    if tokenizer is not None and _is_on_hub(tokenizer):
        tokenizer = str(fetch_tokenizer(tokenizer))
    if path.is_dir():
        return FolderSource(path, model, tokenizer)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path, model, tokenizer)
        _refuse_file(path)
    if model in BUNDLED:
        bundled = fetch_bundled(model, report)
        return (FolderSource if bundled.is_dir() else GgufSource)(bundled, model, tokenizer)
    if looks_like_hub_id(model):
        snapshot = fetch_from_hub(model, revision)
        source = FolderSource(snapshot, model, tokenizer)
        source.revision = snapshot.name
        return source
    raise ModelError(
        f"There is no model at {model}.",
        f"Allowed: a model folder, a .gguf file, a hub id such as owner/name, or {', '.join(BUNDLED)}.",
        "Check the path.",
    )


def check_revision(model: str, revision: str | None, known: Collection[str] = ()) -> None:
    """Refuse a revision of what is not on the hub.

    Args:
        known: names that stand for something else.

    Raises:
        ModelError: it is of a folder, a file or an alias.
    """
    if revision is not None and (model in known or not _is_on_hub(model)):
        raise ModelError(
            f"revision is {revision}, and {model} is not on the hub.",
            "Revisions are of models on the hub, such as owner/name.",
            "Leave --revision out.",
        )


def _is_on_hub(name: str) -> bool:
    return not Path(name).expanduser().exists() and name not in BUNDLED and looks_like_hub_id(name)


def _refuse_file(path: Path) -> None:
    pickled = any(path.match(pattern) for pattern in PICKLES)
    raise ModelError(
        f"{path} is {'a pickle, which is refused: opening one can run any code' if pickled else 'a single file'}.",
        "Allowed: a model folder, a .gguf file, a hub id such as owner/name.",
        "Give the folder that holds config.json and the safetensors files.",
    )
