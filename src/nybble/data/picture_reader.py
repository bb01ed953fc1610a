"""What a vision-language model reads pictures with: what its processor writes where one stands, and a batch's tensors.

A picture becomes as many tokens as its processor says, and its pixels come beside them when a batch is made: files are
decoded anew each time, and none stays in memory.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.encoded_rows import EncodedRows
from nybble.data.examples import EncodedExample, Picture, extended
from nybble.data.findings import Finding
from nybble.data.packing import PicturedBatch
from nybble.data.picture_files import decode, find_in_notes
from nybble.data.text_encoder import RowError
from nybble.errors import first_line

KINDS = ("mm_token_type_ids", "token_type_ids")  # which tokens are a picture's, under the name that a model takes
TEXT_INPUTS = ("input_ids", "attention_mask", "text_replacement_offsets", *KINDS)
SMALL = (32, 24)  # a picture to try with


@dataclass(frozen=True)
class Written:
    """A text with all that a processor writes in place of its pictures.

    Args:
        text: with that in it.
        shifts: (end of a place in the text as it was, how much longer it is up to there).
        put_in: what was written for each picture.
        notes: what was done to each picture, as `decode` says.
        values: of all tensors that are made of them.
        decoded: bytes of all of them, in three colours.
    """

    text: str
    shifts: tuple[tuple[int, int], ...]
    put_in: tuple[str, ...]
    notes: tuple[str, ...]
    values: int
    decoded: int

    def moved(self, place: int) -> int:
        """Where a place of the text as it was now is."""
        return place + max((by for end, by in self.shifts if end <= place), default=0)


class PictureReader:
    """The processor of a vision-language model.

    Args:
        load: gives transformers' processor; called when the first picture is read.
    """

    def __init__(self, load: Callable[[], Any]):
        self._load = load

    @cached_property
    def processor(self) -> Any:
        """transformers' own."""
        return self._load()

    @cached_property
    def token_ids(self) -> Tensor:
        """int64: the tokens in whose place a picture's states come."""
        return torch.tensor([token for token in self.processor.image_token_ids if token is not None])

    @cached_property
    def spellings(self) -> tuple[str, ...]:
        """Of the tokens in whose place something comes that is no text: pictures, or what nybble does not read."""
        others = (getattr(self.processor, f"{kind}_token", None) for kind in ("video", "audio"))
        pictures = self.processor.tokenizer.convert_ids_to_tokens(self.token_ids.tolist())
        return (*pictures, *(token for token in others if token))

    @cached_property
    def kinds(self) -> str | None:
        """Under which name the model is told which tokens are a picture's; None where it is not."""
        from PIL import Image

        found = self._asked("it", text=[self.processor.image_token], images=[[Image.new("RGB", SMALL)]])
        return next((name for name in KINDS if name in found), None)

    def read(self, pictures: Sequence[Picture], text: str, origin: str) -> Written:
        """The text of a rendered conversation with all that the processor writes for its pictures.

        Raises:
            RowError: a picture cannot be decoded, or the text has another number of places for them.
        """
        decoded = [decode(picture.stored, origin) for picture in pictures]
        token = self.processor.image_token
        if (places := text.count(token)) != len(pictures):
            said = f"it has {len(pictures)} pictures, and the template's text {places} times {token}"
            raise RowError("template-loses-pictures", origin, said)
        found = self._asked(origin, text=[text], images=[[each.image for each in decoded]])
        written, at, shifts, put_in = "", 0, [], []
        for place in found["text_replacement_offsets"][0]:
            start, end = place["span"]
            written += text[at:start] + place["replacement"]
            at = end
            shifts.append((end, len(written) - end))
            put_in.append(place["replacement"])
        notes = tuple(note for each in decoded for note in each.notes)
        decoded_bytes = sum(3 * each.image.width * each.image.height for each in decoded)
        return Written(written + text[at:], tuple(shifts), tuple(put_in), notes, _values(found), decoded_bytes)

    def check_text(self, text: str, origin: str) -> None:
        """Refuse a turn's own text that spells a token in whose place the model would look for a picture.

        Raises:
            RowError: it does.
        """
        if spelled := next((token for token in self.spellings if token in text), None):
            said = f"its own text spells {spelled}, in whose place the model is given what is no text"
            raise RowError("template-loses-pictures", origin, said)

    def row(self, row: EncodedExample, pictures: Sequence[Picture], written: Written) -> "PicturedRow":
        """A sequence with its pictures, whose own tokens are never learnt."""
        of_pictures = torch.isin(row.input_ids, self.token_ids.int())
        supervised = row.supervised
        if bool((supervised & of_pictures).any()):
            tokenizer = self.processor.tokenizer
            special = set(tokenizer.all_special_ids)
            spelled = {token for text in set(written.put_in) for token in tokenizer.encode(text)}
            supervised = supervised & ~torch.isin(row.input_ids, torch.tensor(sorted(spelled & special)).int())
        counts = [sum(text.count(spelling) for spelling in self.spellings) for text in written.put_in]
        places = of_pictures.nonzero().flatten()
        assert sum(counts) == len(places), (
            f"{row.origin}: {counts} tokens of pictures were put in, {len(places)} are there"
        )
        return extended(
            row,
            PicturedRow,
            supervised=supervised,
            pictures=tuple(pictures),
            notes=written.notes,
            picture_ends=tuple(int(places[count - 1]) + 1 for count in accumulate(counts)),
            picture_values=written.values,
            decoded_kib=-(-written.decoded // 1024),
        )

    def inputs(self, rows: Iterable[EncodedExample]) -> dict[str, Tensor]:
        """What a model is given of the pictures of a batch's rows beside their tokens, by name; nothing without any.

        Raises:
            RowError: a file is no longer what it was.
        """
        images, origins = [], []
        for row in rows:
            if isinstance(row, PicturedRow) and row.pictures:
                images.append([decode(picture.stored, row.origin).image for picture in row.pictures])
                origins.append(row.origin)
        if not images:
            return {}
        found = self._asked(", ".join(origins), images=images, text_kwargs={"padding": True})
        return {name: value for name, value in found.items() if name not in TEXT_INPUTS and isinstance(value, Tensor)}

    def collate(self, rows: Sequence[EncodedExample], packed: bool) -> "PicturedBatch":
        """One micro-batch, decoded from its files."""
        batch, inputs = packing.collate(rows, packed), self.inputs(rows)
        if self.kinds is not None:
            kinds = self.processor.create_mm_token_type_ids(batch.input_ids.tolist())
            inputs[self.kinds] = torch.tensor(kinds)
        return extended(batch, PicturedBatch, pictures=inputs)

    def _asked(self, origin: str, **asked: Any) -> Any:
        """What the processor makes of pictures, as PyTorch's tensors."""
        if "text" in asked:
            asked |= {"return_text_replacement_offsets": True, "add_special_tokens": False}
        try:
            return self.processor(return_tensors="pt", **asked)
        except (ValueError, TypeError, RuntimeError) as error:  # whatever its makers raise for what they do not take
            raise RowError("broken-picture", origin, f"the processor does not take it: {first_line(error)}") from error


def _values(found: Any) -> int:
    floats = [value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return sum(math.prod(value.shape) for value in floats)


@dataclass(frozen=True, eq=False)
class PicturedRow(EncodedExample):
    """One training sequence with pictures among its tokens.

    Args:
        pictures: in their order.
        notes: what was done to them.
        picture_ends: places behind the last token of each.
        picture_values: of the tensors that are made of them.
        decoded_kib: that they take as red, green and blue, in KiB.
    """

    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    picture_ends: tuple[int, ...] = ()
    picture_values: int = 0
    decoded_kib: int = 0

    @property
    def content(self) -> bytes:
        """As `EncodedExample` says: with the pictures' hashes."""
        return super().content + "".join(picture.digest for picture in self.pictures).encode()

    def truncate(self, max_seq_len: int) -> Self:
        """As `EncodedExample` says; where that would cut off pictures, nothing of it is learnt."""
        cut = super().truncate(max_seq_len)
        if max(self.picture_ends, default=0) <= max_seq_len:
            return cut
        return replace(cut, supervised=torch.zeros_like(cut.supervised))

    @property
    def prompt(self) -> "PicturedRow":
        """As `EncodedExample` says: with the pictures in it."""
        cut = super().prompt
        assert isinstance(cut, PicturedRow)
        there = sum(end <= len(cut) for end in self.picture_ends)
        return replace(cut, pictures=self.pictures[:there], picture_ends=self.picture_ends[:there])


def find_in_conversation_pictures(rows: Iterable[EncodedExample]) -> list[Finding]:
    """What was done to pictures before the model's own processor."""
    return find_in_notes((row.origin, row.notes) for row in rows if isinstance(row, PicturedRow))


def have_pictures(rows: EncodedRows) -> bool:
    """Whether there are pictures among the tokens of a row, told without reading one."""
    return bool(rows.picture_values.any())
