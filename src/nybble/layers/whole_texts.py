"""What models that give something of a whole text have in common: batches of texts, and how they are asked whether a
way through them gives what their own forward gives for a text alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.packing import widen
from nybble.data.text_rows import TextBatch, TextRow, collate_texts
from nybble.errors import ModelError, foreign_errors
from nybble.layers.backbone import ModuleForward, accepted
from nybble.layers.batch_model import BatchModel
from nybble.layers.probe import ASKED, LENGTHS, Difference, Outcome, Probe, outcome_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIRECTIONS = torch.tensor([0.7, -0.4, 0.9])  # in which what is given is followed, to compare gradients


def own_output(
    model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
) -> Any:
    """What the model's own forward gives of padded texts.

    Args:
        input_ids: int64 `(B, T)`.
        attention_mask: int64 `(B, T)`, 0 on padding.
        token_types: int64 `(B, T)`, which of two texts each token is of.
    """
    wanted: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if token_types is not None:
        wanted["token_type_ids"] = token_types
    return model(input_ids=input_ids, **accepted(model, **wanted))


class TextProbe(Probe):
    """Asks such a model: what it gives of a text between two others, and the gradients of its adapters, are what the
    model's own forward gives for it alone.
    """

    def _own_outcome(self, start: int, parameters: list[Tensor], embedded: list[Tensor]) -> Outcome:
        """As `Probe` says."""
        ids = self._documents[ASKED].to(next(self.model.parameters()).device)[None]
        if self.store is not None:
            self.store.begin(will_return=True)
        with foreign_errors(partial(self._fails, f"a text of {LENGTHS[ASKED]} tokens")):
            given = self.own_of(own_output(self.model, ids, torch.ones_like(ids))).float()
            return outcome_of(given.detach(), followed(given), parameters, embedded)

    def _outcome_of(
        self, way: Any, starts: Any, parameters: list[Tensor], embedded: list[Tensor]
    ) -> tuple[Outcome, tuple[int, int]]:
        """As `Probe` says."""
        model: WholeTexts = way
        batch = model.collate([self.row_of(document) for document in self._documents]).to(model.device)
        first = sum(LENGTHS[:ASKED]) if batch.attention_mask is None else ASKED * batch.input_ids.shape[1]
        asked = first, first + LENGTHS[ASKED]
        given = self.given_of(model, batch, asked)
        return outcome_of(given.detach(), followed(given), parameters, embedded), asked

    # ---- what is compared

    def row_of(self, document: Tensor) -> TextRow:
        """A document as a row."""
        return TextRow(document.int(), torch.zeros(len(document), dtype=torch.bool), "probe")

    def own_of(self, output: Any) -> Tensor:
        """Of what the model's own forward gives of the asked text alone, `(N, K)`."""
        raise NotImplementedError

    def given_of(self, way: Any, batch: TextBatch, asked: tuple[int, int]) -> Tensor:
        """The same, fp32, of what the way gives of the batch.

        Args:
            asked: first and last + 1 of the asked text's flattened positions.
        """
        raise NotImplementedError


def followed(given: Tensor) -> Tensor:
    """A number whose gradient reaches all that is given, `(N, K)`."""
    weights = DIRECTIONS.to(given.device).repeat(-(-given.shape[1] // len(DIRECTIONS)))[: given.shape[1]]
    return (given * weights).sum()


class WholeTexts(BatchModel):
    """A model that gives something of whole texts."""

    gives: ClassVar[str]  # for messages
    kinds: ClassVar[str]  # of models that can

    def collate(self, rows: Sequence[TextRow], shared: Sequence[int] = ()) -> TextBatch:
        """One micro-batch, on the CPU, as the model takes it.

        Args:
            shared: tokens that the two texts of each pair of rows begin with; where the model can, they are there once.
        """
        return collate_texts(rows, self.packed, self.pad_id, shared if self.shares else ())

    @classmethod
    def _refused(cls, module: "PreTrainedModel", difference: Difference) -> ModelError:
        return ModelError(
            f"nybble cannot train the {cls.gives} of {type(module).__name__}: {difference.part} differs by "
            f"{difference.size:.1%} from its own forward's, also for a text alone.",
            f"Allowed: {cls.kinds}.",
            "Please report the model's type; other models of transformers, and --compute-dtype fp32, may work.",
        )

    def _given(self, batch: TextBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ids, mask and token types of a batch, padded ones filled up to one of few widths."""
        if batch.attention_mask is None or not isinstance(self.backbone, ModuleForward):
            return batch.input_ids, batch.attention_mask, batch.token_types
        width = batch.input_ids.shape[1]
        filled = widen(batch, self.backbone.rules.padded_width(width), self.pad_id)
        missing, types = filled.input_ids.shape[1] - width, batch.token_types
        return filled.input_ids, filled.attention_mask, None if types is None else F.pad(types, (0, missing))

    def _each_alone(self, batch: TextBatch) -> list[tuple[Tensor, Tensor | None]]:
        """Ids and token types of each text of a padded batch, `(1, T)`, without its padding."""
        found = []
        for number, length in enumerate(batch.document_lengths):
            types = None if batch.token_types is None else batch.token_types[number, None, :length]
            found.append((batch.input_ids[number, None, :length], types))
        return found
