"""A vision-language model: batches with pictures among their tokens in, losses and logits out.

Through transformers' own modules: its vision tower makes states of pixels, which stand in the place of a picture's
tokens. Which layout of rows gives what each row gives alone is asked of the model before the first step, with pictures:
positions that count in three dimensions (Qwen-VL) or pictures that are seen whole (Gemma 3) may be lost in packed rows.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample, Picture
from nybble.data.packing import Batch
from nybble.data.picture_reader import PictureReader
from nybble.layers.backbone import Layout
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import TOWERS, in_few_bits
from nybble.layers.loss_head import Head
from nybble.layers.probe import ASKED, FIRST, LAST, LENGTHS, Probe
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICTURES = ((4, 32, 24), (1, 40, 56))  # in the first documents: tokens before one, its width and height


class PicturedProbe(Probe):
    """Asks as `Probe` does, with a picture in the document that is asked about and in the one before it."""

    reader: ClassVar[PictureReader]

    def documents(self) -> list[Tensor]:
        """As `Probe` says: random tokens, and pictures among those of the first two."""
        processor = self.reader.processor
        special = {*processor.tokenizer.all_special_ids, *self.reader.token_ids.tolist()}
        words = [token for token in range(self.model.config.get_text_config().vocab_size) if token not in special]
        generator = torch.Generator().manual_seed(0)
        rows = []
        for number, length in enumerate(LENGTHS):
            picked = torch.randint(len(words), (length,), generator=generator)
            ids = torch.tensor(words, dtype=torch.int32)[picked]
            rows.append(self._row(ids, *PICTURES[number], generator) if number < len(PICTURES) else _plain(ids))
        added = len(rows[ASKED]) - LENGTHS[ASKED]
        self.first, self.last = FIRST + added, LAST + added
        self._pictured = rows
        return [row.input_ids.long() for row in rows]

    def _rows(self) -> list[EncodedExample]:
        return self._pictured

    def _row(self, ids: Tensor, before: int, width: int, height: int, generator: torch.Generator) -> EncodedExample:
        """Tokens with a picture of noise among them."""
        from PIL import Image

        processor, file = self.reader.processor, io.BytesIO()
        noise = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(file, format="png")
        picture = Picture(file.getvalue())
        written = self.reader.read([picture], processor.image_token, "probe")
        put_in = torch.tensor(processor.tokenizer.encode(written.text, add_special_tokens=False), dtype=torch.int32)
        return self.reader.row(_plain(torch.cat([ids[:before], put_in, ids[before:]])), [picture], written)

    def _collated(self, rows: list[EncodedExample], packed: bool) -> Batch:
        return self.reader.collate(rows, packed)


def _plain(ids: Tensor) -> EncodedExample:
    return EncodedExample(ids, torch.zeros(len(ids), dtype=torch.bool), "probe")


class PicturedLM(CausalLM):
    """A vision-language model of transformers (AutoModelForImageTextToText); see `reading`."""

    reader: ClassVar[PictureReader]

    @classmethod
    def _layouts(cls, head: Head, packing: bool) -> tuple[Layout, ...]:
        layouts: tuple[Layout, ...] = get_args(Layout)
        return layouts[0 if packing else 1 : 2]  # a batch's pictures are not told apart by row

    def collate(self, rows: Sequence[EncodedExample]) -> Batch:
        """As `CausalLM` says: files are decoded here."""
        return self.reader.collate(rows, self.packed)

    def beside(self, row: EncodedExample) -> dict[str, Tensor]:
        """As `CausalLM` says."""
        return self.reader.collate([row], packed=False).pictures


def reading(reader: PictureReader) -> type[PicturedLM]:
    """The class of models whose pictures this one reads."""
    probe: Any = type("PicturedProbe", (PicturedProbe,), {"reader": reader})
    return type("PicturedLM", (PicturedLM,), {"reader": reader, "probe": probe})


def describe_towers(model: "PreTrainedModel") -> list[str]:
    """A sentence on the parts of a vision-language model around its language model that stay as they are; none of other
    models.
    """
    if getattr(model.config, TOWERS, None) is None:
        return []
    decoder, few_bits = model.get_decoder(), in_few_bits(model)
    sizes = []
    for name, part in model.base_model.named_children():
        path = f"{model.base_model_prefix}.{name}."
        if part is not decoder and not any(each.startswith(path) for each in few_bits):
            num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in part.parameters())
            sizes.append(f"{name} ({format_bytes(num_bytes)})")
    return [f"not in four bits and without adapters: {', '.join(sizes)}; see --quantize-towers"] if sizes else []
