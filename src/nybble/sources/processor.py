"""Loading the image processor of a vision model, and the processor of a vision-language model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.data.picture_rows import PictureProcessor, pixels_of_any
from nybble.errors import ModelError, first_line, foreign_errors
from nybble.layers.picture_model import picture_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_processor(name: str, skeleton: "PreTrainedModel") -> PictureProcessor:
    """The image processor in the folder `name`, or of the hub id `name`, over Pillow. Code that comes with it is never
    run.

    Args:
        skeleton: the model that reads what it makes, on the meta device.

    Raises:
        ModelError: there is none, it is damaged, or the model does not take what it makes.
    """
    from transformers import AutoImageProcessor

    _check_pillow(name)

    def not_taken(error: Exception) -> ModelError:
        return ModelError(
            f"{type(skeleton).__name__} does not take the pictures of {name}'s image processor: {first_line(error)}",
            "Needed: a processor whose size is the model's, and a model made of blocks.",
        )

    with foreign_errors(_none_loaded(name, "image processor", "AutoImageProcessor")):
        local = Path(name).is_dir()
        found = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False, local_files_only=local)
        made = pixels_of_any(found)
    if made.ndim != 4:
        raise ModelError(
            f"{name}'s image processor cuts pictures into patches, of each picture as many as its shape has.",
            "Needed: one that makes every picture as high and as wide as the model takes it.",
            "Choose a model of one size, such as those of SigLIP 2 whose model_type is siglip.",
        )
    with foreign_errors(not_taken):
        return PictureProcessor(found, picture_tokens(skeleton, *made.shape[-2:]))


def load_vision_language_processor(name: str, config: "PretrainedConfig") -> Any:
    """The processor of texts and pictures in the folder `name`, over Pillow, without what reads videos or sounds. Code
    that comes with it is never run.

    Args:
        config: of the model that reads what it makes.

    Raises:
        ModelError: there is none, it is damaged, or it does not say what it writes for a picture.
    """
    from transformers import PROCESSOR_MAPPING, AutoImageProcessor, AutoTokenizer

    _check_pillow(name)

    none_loaded = _none_loaded(name, "processor of texts and pictures", "AutoProcessor")
    more = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
    with foreign_errors(none_loaded):
        kind = _without_others(PROCESSOR_MAPPING[type(config)])
        parts = {
            "image_processor": lambda: AutoImageProcessor.from_pretrained(name, backend="pil", **more),
            "tokenizer": lambda: AutoTokenizer.from_pretrained(name, **more),
        }
        loaded = [parts[each]() if each in parts else None for each in kind.get_attributes()]
        written, _ = kind.get_processor_dict(name, local_files_only=more["local_files_only"])
        found = kind.from_args_and_dict(loaded, written)
    if getattr(found, "image_token", None) is None:
        raise none_loaded(ValueError(f"{kind.__name__} names no token that stands for a picture"))
    return found


def _none_loaded(name: str, what: str, own_class: str) -> Callable[[Exception], ModelError]:
    def explain(error: Exception) -> ModelError:
        return ModelError(
            f"No {what} could be loaded from {name}: {first_line(error)}",
            "Allowed: a folder or hub id with its files, such as preprocessor_config.json, for this transformers.",
            f"Save the model's own beside it: {own_class}.from_pretrained(..).save_pretrained(FOLDER).",
        )

    return explain


def _check_pillow(name: str) -> None:
    """Refuse what reads pictures where nothing decodes them.

    Raises:
        ModelError: Pillow is missing.
    """
    from transformers.utils import is_vision_available

    if not is_vision_available():
        raise ModelError(
            f"{name} reads pictures, and Pillow is not installed.",
            "Its image processor needs it.",
            "pip install pillow",
        )


def _without_others(kind: Any) -> Any:
    """A class of processors that takes None for a part: transformers has what reads videos with torchvision alone."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
