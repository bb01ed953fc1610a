"""Loading a tokenizer from a folder or the hub, and saving it."""

from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import ModelError, first_line, foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
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


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer's files into a folder.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(None, str(error), str(folder)) from error  # the tokenizers library raises nothing more precise
