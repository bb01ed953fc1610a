"""A model that gives scores of a text: batches in, scores out.

transformers has two kinds (AutoModelForSequenceClassification). Decoders multiply the state of the last token with a
matrix, `score`: that is computed here, through decoder blocks where they know the model. Of encoders the model's own
forward is asked, with all that it puts between its states and its scores (a pooler, a dense layer, dropout). Which it
is, the model is asked (`ScoreProbe`). Scores are made in fp32.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from nybble.data.text_rows import TextBatch, TextRow, collate_texts
from nybble.errors import ModelError, foreign_errors
from nybble.layers.backbone import Backbone, Layout, ModuleForward, Reason, Why, accepted
from nybble.layers.batch_model import BatchModel, Verdict
from nybble.layers.probe import ASKED, LENGTHS, Difference, Outcome, Probe, outcome_of
from nybble.layers.rotary import length_of_change
from nybble.layers.trained import TrainedModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAST_TOKEN = "score"  # what transformers calls the matrix that scores a decoder's last state
DIRECTIONS = torch.tensor([0.7, -0.4, 0.9])  # in which scores are followed, to compare gradients


def own_scores(
    model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
) -> Tensor:
    """What the model's own forward gives of padded texts, `(B, labels)`.

    Args:
        input_ids: int64 `(B, T)`.
        attention_mask: int64 `(B, T)`, 0 on padding.
        token_types: int64 `(B, T)`, which of two texts each token is of.
    """
    wanted: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if token_types is not None:
        wanted["token_type_ids"] = token_types
    logits: Tensor = model(input_ids=input_ids, **accepted(model, **wanted)).logits
    return logits


class ScoreProbe(Probe):
    """Asks a model that gives scores: the scores of a text between two others, and the gradients of its adapters, are
    what the model's own forward gives for it alone.
    """

    def _own_outcome(self, start: int, parameters: list[Tensor], embedded: list[Tensor]) -> Outcome:
        """As `Probe` says."""
        ids = self._documents[ASKED].to(next(self.model.parameters()).device)[None]
        if self.store is not None:
            self.store.begin(will_return=True)
        with foreign_errors(partial(self._fails, f"a text of {LENGTHS[ASKED]} tokens")):
            scores = own_scores(self.model, ids, torch.ones_like(ids)).float()
            return outcome_of(scores.detach(), _followed(scores), parameters, embedded)

    def _outcome_of(
        self, way: Any, starts: Any, parameters: list[Tensor], embedded: list[Tensor]
    ) -> tuple[Outcome, tuple[int, int]]:
        """As `Probe` says."""
        model: ScoredModel = way
        batch = model.collate([_row(document) for document in self._documents]).to(model.device)
        scores = model.scores(batch)[ASKED, None]
        first = sum(LENGTHS[:ASKED]) if batch.attention_mask is None else ASKED * batch.input_ids.shape[1]
        found = outcome_of(scores.detach(), _followed(scores), parameters, embedded)
        return found, (first, first + LENGTHS[ASKED])


def _row(document: Tensor) -> TextRow:
    return TextRow(document.int(), torch.zeros(len(document), dtype=torch.bool), "probe")


def _followed(scores: Tensor) -> Tensor:
    """A number whose gradient reaches all scores, `(1, labels)`."""
    weights = DIRECTIONS.to(scores.device).repeat(-(-scores.shape[1] // len(DIRECTIONS)))[: scores.shape[1]]
    return (scores * weights).sum()


class ScoredModel(BatchModel):
    """A model of transformers whose head scores texts.

    Args:
        reads_last: the head is a matrix on the state of the last token; else the model's own forward makes scores.
    """

    probe = ScoreProbe

    def __init__(self, module: "PreTrainedModel", backbone: Backbone, verdict: Verdict, reads_last: bool):
        super().__init__(module, backbone, verdict)
        self.reads_last = reads_last

    @classmethod
    def _head_of(cls, module: "PreTrainedModel") -> bool:
        """Whether it is a matrix on the state of the last token."""
        return hasattr(module, LAST_TOKEN)

    @classmethod
    def _is_own(cls, head: bool) -> bool:
        return not head

    @classmethod
    def _through(cls, module: "PreTrainedModel", backbone: Backbone, head: bool, verdict: Verdict) -> Self:
        return cls(module, backbone, verdict, head)

    @classmethod
    def _why_not_blocks(cls, module: "PreTrainedModel", head: bool) -> Reason | None:
        if not head:
            return Reason(Why.HEAD)
        if length_of_change(module) is not None:
            return Reason(Why.OPTION, "angles by a text's length where it is scored")
        return None

    @classmethod
    def _layouts(cls, head: bool, packing: bool) -> tuple[Layout, ...]:
        return super()._layouts(head, packing and head)

    @classmethod
    def _refused(cls, module: "PreTrainedModel", difference: Difference) -> ModelError:
        return ModelError(
            f"nybble cannot train the scores of {type(module).__name__}: {difference.part} differs by "
            f"{difference.size:.1%} from its own forward's, also for a text alone.",
            "Allowed: decoders that score the state of a text's last token, and encoders.",
            "Please report the model's type; other models of transformers, and --compute-dtype fp32, may work.",
        )

    def collate(self, rows: Sequence[TextRow]) -> TextBatch:
        """One micro-batch, on the CPU, as the model takes it."""
        pad = getattr(self.module.config.get_text_config(), "pad_token_id", None)
        return collate_texts(rows, self.packed, pad or 0)

    def scores(self, batch: TextBatch) -> Tensor:
        """The scores of each text, fp32 `(documents, labels)`, with their gradient.

        Raises:
            ModelError: the batch's layout is not the model's.
        """
        self._check_layout(batch)
        if self.reads_last:
            return self._score(self.hidden(batch))
        assert isinstance(self.backbone, ModuleForward)
        return self.backbone.through(partial(self._own_scores, batch)).float()

    def _score(self, states: Tensor) -> Tensor:
        head: Any = getattr(self.module, LAST_TOKEN)
        weight = next(head.parameters())
        scores: Tensor = head(states.float() if isinstance(head, TrainedModule) else states.to(weight.dtype))
        return scores.float()

    def _own_scores(self, batch: TextBatch) -> Tensor:
        """`(documents, labels)` by the model's own forward."""
        if self.backbone.layout != "single" or batch.attention_mask is None:
            return own_scores(self.module, batch.input_ids, batch.attention_mask, batch.token_types)
        rows = []
        for number, length in enumerate(batch.document_lengths):
            ids = batch.input_ids[number, None, :length]
            types = None if batch.token_types is None else batch.token_types[number, None, :length]
            rows.append(own_scores(self.module, ids, torch.ones_like(ids), types))
        return torch.cat(rows)
