"""A vision model that gives scores of a picture: batches in, scores out, through its own forward."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.data.picture_rows import PictureBatch, PictureProcessor, PictureRow, collate_pictures, picture_batch
from nybble.data.text_rows import TextBatch, TextRow
from nybble.errors import foreign_errors
from nybble.layers.dense import input_embedding
from nybble.layers.probe import ASKED, LENGTHS, Outcome, outcome_of
from nybble.layers.scored import ScoredModel, ScoreProbe
from nybble.layers.whole_texts import followed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def scores_pictures(model: nn.Module) -> bool:
    """Whether a model of transformers gives scores of pictures."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return type(model) is MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(model.config), None)


def own_picture_scores(model: "PreTrainedModel", pixel_values: Tensor) -> Tensor:
    """What the model's own forward gives of pictures, `(B, labels)`."""
    embedding: Any = input_embedding(model)
    logits: Tensor = model(pixel_values=pixel_values.to(next(embedding.parameters()).dtype)).logits
    return logits


def picture_tokens(model: "PreTrainedModel", height: int, width: int) -> int:
    """Tokens that a vision model on the meta device makes of a picture: what its first block reads."""
    from nybble.layers.convert import block_names

    seen: list[int] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        seen.append(states.shape[1] if states.ndim == 3 else states[0, 0].numel())

    first = model.get_submodule(block_names(model)[0])
    handle = first.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            own_picture_scores(model, torch.empty(1, picture_channels(model), height, width, device="meta"))
    finally:
        handle.remove()
    return seen[0]


def picture_channels(model: "PreTrainedModel") -> int:
    """Colours of the pictures that a vision model reads."""
    config = getattr(model.config, "vision_config", model.config)
    return int(getattr(config, "num_channels", 3))


def own_size(model: "PreTrainedModel") -> tuple[int, int]:
    """Height and width of the pictures that a vision model was made for."""
    size = getattr(model.config, "vision_config", model.config).image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


class PictureProbe(ScoreProbe):
    """Asks a model that scores pictures, as `TextProbe` asks one of texts: of a random picture between two others."""

    def documents(self) -> list[Tensor]:
        """As `Probe` says: pixels."""
        shape = (picture_channels(self.model), *own_size(self.model))
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for _ in LENGTHS]

    def _own_outcome(self, start: int, parameters: list[Tensor], embedded: list[Tensor]) -> Outcome:
        """As `Probe` says."""
        pixels = self._documents[ASKED][None].to(next(self.model.parameters()).device)
        if self.store is not None:
            self.store.begin(will_return=True)
        with foreign_errors(partial(self._fails, "a picture")):
            given = own_picture_scores(self.model, pixels).float()
            return outcome_of(given.detach(), followed(given), parameters, embedded)

    def _outcome_of(
        self, way: Any, starts: Any, parameters: list[Tensor], embedded: list[Tensor]
    ) -> tuple[Outcome, tuple[int, int]]:
        """As `Probe` says."""
        model: PictureModel = way
        row = TextRow(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.bool), "probe")
        batch = picture_batch([row] * len(self._documents), torch.stack(self._documents)).to(model.device)
        given = model.scores(batch)[ASKED, None]
        rows = embedded[-1].shape[1:-1].numel()  # of what the embedding gave of a picture
        return outcome_of(given.detach(), followed(given), parameters, embedded), (ASKED * rows, (ASKED + 1) * rows)


class PictureModel(ScoredModel):
    """A vision model of transformers whose head scores pictures.

    Attributes:
        processor: makes pixels of rows, where `collate` is to.
    """

    probe = PictureProbe
    gives = "scores"
    kinds = "vision transformers that score pictures"
    processor: PictureProcessor | None = None

    @classmethod
    def _head_of(cls, module: "PreTrainedModel") -> bool:
        return False

    def collate(self, rows: Any, shared: Any = ()) -> TextBatch:
        """One micro-batch, on the CPU, nothing drawn."""
        assert self.processor is not None
        return collate_pictures([row for row in rows if isinstance(row, PictureRow)], self.processor)

    def _own_scores(self, batch: TextBatch) -> Tensor:
        """`(pictures, labels)` by the model's own forward."""
        assert isinstance(batch, PictureBatch)
        if self.backbone.layout != "single":
            return own_picture_scores(self.module, batch.pixel_values)
        return torch.cat([own_picture_scores(self.module, each) for each in batch.pixel_values.split(1)])
