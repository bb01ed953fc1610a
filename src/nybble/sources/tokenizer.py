"""Loading a tokenizer from a folder or the hub, and saving it as transformers 4 and 5 both read it."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.data.picture_rows import PictureProcessor
from nybble.errors import ModelError, first_line, foreign_errors
from nybble.formats.bnb import OWN_MODEL_TYPE, true_config
from nybble.sources.skeleton import config_from_json


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `name`, or of the hub id `name`. Code that comes with it is never run.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    def none_loaded(error: Exception) -> ModelError:  # the tokenizers library raises bare Exception for a damaged file
        return ModelError(
            f"No tokenizer could be loaded from {name}: {first_line(error)}",
            "Allowed: a folder or hub id with tokenizer files that the installed transformers reads.",
            "Name one with --tokenizer.",
        )

    with foreign_errors(none_loaded):
        more = _true_config(Path(name)) | {"local_files_only": Path(name).is_dir()}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **more)
        _refuse_empty(Path(name), tokenizer)
        return tokenizer


def _refuse_empty(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers makes one without a vocabulary of a folder that has none of a tokenizer's files.

    Raises:
        FileNotFoundError: it did so.
    """
    needed = set(type(tokenizer).vocab_files_names.values())
    if folder.is_dir() and needed and not any((folder / file).is_file() for file in needed):
        raise FileNotFoundError(f"it has none of {', '.join(sorted(needed))}")


def _true_config(folder: Path) -> dict[str, Any]:
    """The config, where config.json has it under a name that transformers refuses: only nybble reads the weights."""
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if written.get("model_type") != OWN_MODEL_TYPE:
        return {}
    return {"config": config_from_json(true_config(written))}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | PictureProcessor, folder: Path) -> None:
    """Write a tokenizer's files into a folder, or those of a vision model's image processor.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(None, str(error), str(folder)) from error  # the tokenizers library raises nothing more precise
    if isinstance(tokenizer, PictureProcessor):
        return
    file = folder / "tokenizer_config.json"
    settings = _for_transformers_4(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _for_transformers_4(settings: dict[str, Any]) -> dict[str, Any]:
    """Under the names that transformers 4 has too: it knows no TokenizersBackend, and takes no list for
    `extra_special_tokens`. What speaks of this machine is left out.
    """
    settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings
