"""Loading the image processor of a vision model."""

from pathlib import Path
from typing import TYPE_CHECKING

from nybble.data.picture_rows import PictureProcessor, picture_size
from nybble.errors import ModelError, first_line, foreign_errors
from nybble.layers.picture_model import picture_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_processor(name: str, skeleton: "PreTrainedModel") -> PictureProcessor:
    """The image processor in the folder `name`, or of the hub id `name`, over Pillow. Code that comes with it is never
    run.

    Args:
        skeleton: the model that reads what it makes, on the meta device.

    Raises:
        ModelError: there is none, it is damaged, or the model does not take what it makes.
    """
    from transformers import AutoImageProcessor

    def none_loaded(error: Exception) -> ModelError:
        return ModelError(
            f"No image processor could be loaded from {name}: {first_line(error)}",
            "Allowed: a folder or hub id with a preprocessor_config.json that the installed transformers reads.",
            "Save the model's own beside it: AutoImageProcessor.from_pretrained(..).save_pretrained(FOLDER).",
        )

    def not_taken(error: Exception) -> ModelError:
        return ModelError(
            f"{type(skeleton).__name__} does not take the pictures of {name}'s image processor: {first_line(error)}",
            "Needed: a processor whose size is the model's, and a model made of blocks.",
        )

    with foreign_errors(none_loaded):
        local = Path(name).is_dir()
        found = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False, local_files_only=local)
        height, width = picture_size(found)
    with foreign_errors(not_taken):
        return PictureProcessor(found, picture_tokens(skeleton, height, width))
