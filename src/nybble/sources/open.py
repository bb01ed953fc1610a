"""Where a base model comes from: a folder, the hub, a GGUF file or an alias, behind one interface.

A source knows the model's config and tokenizer and hands out its tensors one at a time, so that the
16-bit model never exists in memory. Code that comes with a model is never run, and pickles are never
opened.
"""

from pathlib import Path

from nybble.errors import ModelError
from nybble.events import Listener, silent
from nybble.sources.bundled import BUNDLED, fetch_bundled
from nybble.sources.folder import PICKLES, FolderSource
from nybble.sources.gguf import GgufSource
from nybble.sources.hub import fetch_from_hub, looks_like_hub_id
from nybble.sources.stored_model import StoredModel


def open_model(model: str, tokenizer: str | None = None, report: Listener = silent) -> StoredModel:
    """The model that `model` names; none of its tensors is read.

    Args:
        model: a folder, a `.gguf` file, a hub id such as "owner/name", or an alias in `BUNDLED`.
        tokenizer: a folder or hub id to take the tokenizer from instead.
        report: told where a model is fetched.

    Raises:
        ModelError: there is no such model, or it cannot be read or fetched.
    """
    path = Path(model).expanduser()
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
        return FolderSource(fetch_from_hub(model), model, tokenizer)
    raise ModelError(
        f"There is no model at {model}.",
        f"Allowed: a model folder, a .gguf file, a hub id such as owner/name, or {', '.join(BUNDLED)}.",
        "Check the path.",
    )


def _refuse_file(path: Path) -> None:
    pickled = any(path.match(pattern) for pattern in PICKLES)
    raise ModelError(
        f"{path} is {'a pickle, which is refused: opening one can run any code' if pickled else 'a single file'}.",
        "Allowed: a model folder, a .gguf file, a hub id such as owner/name.",
        "Give the folder that holds config.json and the safetensors files.",
    )
