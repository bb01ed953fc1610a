"""Rows of a picture and what it is to be told apart by, and micro-batches of them."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample, Example, extended
from nybble.data.findings import Finding
from nybble.data.picture_files import Stored, decode, find_in_notes, picture_bytes
from nybble.data.template import ChatTemplate
from nybble.data.text_rows import Label, Labels, TextBatch, TextRow, collate_texts
from nybble.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("image", "img", "picture", "file_name", "image_path")
Augment = Literal["crop", "flip", "crop-flip"]
AREA, SIDES, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of random parts, as torchvision's RandomResizedCrop has them


# ---- what makes a model's input --------------------------------------------------------------------


class PictureProcessor:
    """A vision model's own image processor, where a language model has its tokenizer.

    Args:
        processor: of transformers.
        tokens: that the model makes of a picture.
    """

    def __init__(self, processor: Any, tokens: int):
        self.processor, self.tokens = processor, tokens

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model is given."""
        made = pixels_of_any(self.processor)
        return int(made.shape[-2]), int(made.shape[-1])

    def pixels(self, images: Sequence["Image"]) -> Tensor:
        """fp32 `(N, 3, height, width)`, as the model's makers prepare pictures."""
        found: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"].float()
        return found

    def pixels_of_parts(self, images: Sequence["Image"]) -> Tensor:
        """The same of pictures that have the model's size already."""
        off = {name: False for name in ("do_resize", "do_center_crop") if hasattr(self.processor, name)}
        found: Tensor = self.processor(images=list(images), return_tensors="pt", **off)["pixel_values"].float()
        return found

    def save_pretrained(self, folder: Path) -> None:
        """Write its file, as transformers has it."""
        self.processor.save_pretrained(folder)


def pixels_of_any(processor: Any) -> Tensor:
    """What an image processor makes of a picture: `(1, 3, height, width)` where all come out alike."""
    from PIL import Image

    made: Tensor = processor(images=[Image.new("RGB", (32, 24))], return_tensors="pt")["pixel_values"]
    return made


class PictureTemplate(ChatTemplate):
    """In place of a chat template where rows are pictures: nothing is written down."""

    def __init__(self, processor: PictureProcessor):
        self.tokenizer: Any = processor
        self.mode, self.chat_template, self.notices, self.stop_ids = "none", None, (), ()


# ---- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureExample(Example):
    """A picture, and what it is to be given; its text is a hash of its file.

    Args:
        label: as a tuple where it may be given several.
    """

    picture: Stored = ""
    label: Label | Labels = ""

    @classmethod
    def of(cls, picture: Stored, label: Label | Labels, origin: str) -> Self:
        """Of a file that can be read.

        Raises:
            RowError: it cannot.
        """
        digest = hashlib.sha256(picture_bytes(picture, origin)).hexdigest()
        return cls(origin, text=digest, picture=picture, label=label)


@dataclass(frozen=True, eq=False)
class PictureRow(TextRow):
    """A picture and what it is to be given. Its tokens are what the model makes of it: there are no ids.

    Args:
        digest: of its file.
        notes: as `decode` gives them.
    """

    picture: Stored = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def content(self) -> bytes:
        return f"{self.digest} {self.label!r}".encode()

    def truncate(self, max_seq_len: int) -> Self:
        """Itself: the model takes each picture whole."""
        return self


def encode_picture(template: ChatTemplate, example: PictureExample) -> PictureRow:
    """The row of a picture that can be decoded.

    Raises:
        RowError: it cannot.
        DataError: the model reads texts.
    """
    processor: Any = template.tokenizer
    if not isinstance(processor, PictureProcessor):
        raise DataError(f"{example.origin}: a picture, and the model reads texts", "needed: rows of its kind")
    assert example.text is not None
    return picture_row(processor, example.picture, example.origin, example.label, example.text)


def picture_row(
    processor: PictureProcessor, picture: Stored, origin: str, label: Label | Labels = "", digest: str = ""
) -> PictureRow:
    """The row of a picture.

    Raises:
        RowError: it cannot be decoded.
    """
    notes = decode(picture, origin).notes
    nothing = torch.zeros(processor.tokens, dtype=torch.int32)
    return PictureRow(nothing, nothing.bool(), origin, label=label, picture=picture, digest=digest, notes=notes)


def find_in_pictures(rows: Iterable[EncodedExample]) -> list[Finding]:
    """What was done to pictures before the model's own processor."""
    return find_in_notes((row.origin, row.notes) for row in rows if isinstance(row, PictureRow))


# ---- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class PictureBatch(TextBatch):
    """A micro-batch of pictures.

    Args:
        pixel_values: fp32 `(B, channels, height, width)`.
    """

    pixel_values: Tensor


def collate_pictures(
    rows: Sequence[PictureRow], processor: PictureProcessor, augment: Augment | None = None
) -> PictureBatch:
    """One micro-batch, decoded from its files.

    Args:
        augment: what is drawn anew for each picture, by PyTorch's generator.

    Raises:
        RowError: a file is no longer what it was.
    """
    return picture_batch(rows, torch.cat([_pixels_of(row, processor, augment) for row in rows]))


def picture_batch(rows: Sequence[TextRow], pixel_values: Tensor) -> PictureBatch:
    """The micro-batch of rows whose pixels are there."""
    return extended(collate_texts(rows, packed=False, pad_id=0), PictureBatch, pixel_values=pixel_values)


def _pixels_of(row: PictureRow, processor: PictureProcessor, augment: Augment | None) -> Tensor:
    """Of one picture, `(1, channels, height, width)`: a file may be large, and is gone when the next is decoded."""
    from PIL import Image, ImageOps

    image = decode(row.picture, row.origin).image
    if augment is not None and "flip" in augment and torch.rand(()) < 0.5:
        image = ImageOps.mirror(image)
    if augment is None or "crop" not in augment:
        return processor.pixels([image])
    height, width = processor.size
    filtered = Image.Resampling(getattr(processor.processor, "resample", None) or Image.Resampling.BILINEAR)
    return processor.pixels_of_parts([image.resize((width, height), filtered, random_part(image.width, image.height))])


def random_part(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of a picture: of its area, and of width to height, both drawn, the
    latter evenly in its logarithm; after ten that do not fit the largest in the middle that does.
    """
    low, high = (math.log(side) for side in SIDES)
    for _ in range(TRIES):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * float(torch.rand(())))
        ratio = math.exp(low + (high - low) * float(torch.rand(())))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(torch.randint(room + 1, ())) for room in (width - w, height - h))
            return left, top, left + w, top + h
    ratio = min(max(width / height, SIDES[0]), SIDES[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
