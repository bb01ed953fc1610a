"""Loading a tokenizer from a folder or the hub, and saving it as transformers 4 and 5 both read it."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.data.picture_rows import PictureProcessor
from nybble.errors import ModelError, first_line, foreign_errors


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
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).is_dir())


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
