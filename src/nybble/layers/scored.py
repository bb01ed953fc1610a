"""A model that gives scores of a text, or of each of its tokens: batches in, scores out.

transformers has two kinds (AutoModelForSequenceClassification, AutoModelForTokenClassification). Decoders multiply the
state of the last token, or of each, with a matrix, `score`: that is computed here, through decoder blocks where they
know the model. Of encoders the model's own forward is asked, with all that it puts between its states and its scores (a
pooler, a dense layer, dropout). Which it is, the model is asked (`ScoreProbe`). Scores are made in fp32.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.data.text_rows import TextBatch, TextRow
from nybble.layers.backbone import Backbone, Layout, ModuleForward, Reason, Why
from nybble.layers.batch_model import Verdict
from nybble.layers.probe import ASKED
from nybble.layers.rotary import length_of_change
from nybble.layers.trained import TrainedModule
from nybble.layers.whole_texts import TextProbe, WholeTexts, own_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORE = "score"  # what transformers calls the matrix that scores a decoder's states


def scores_tokens(model: nn.Module) -> bool:
    """Whether a model of transformers gives scores of each token, not of a whole text."""
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    return MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(model.config), None) is type(model)


def own_scores(
    model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
) -> Tensor:
    """What the model's own forward gives of padded texts, `(B, labels)`, or of their tokens, `(B, T, labels)`.
    Arguments are those of `own_output`.
    """
    logits: Tensor = own_output(model, input_ids, attention_mask, token_types).logits
    return logits


class ScoreProbe(TextProbe):
    """Compares scores."""

    def own_of(self, output: Any) -> Tensor:
        """As `TextProbe` says."""
        logits: Tensor = output.logits
        return logits[0] if scores_tokens(self.model) else logits

    def given_of(self, way: Any, batch: TextBatch, asked: tuple[int, int]) -> Tensor:
        """As `TextProbe` says."""
        model: ScoredModel = way
        return model.scores(batch).split(batch.counts)[ASKED]

    def row_of(self, document: Tensor) -> TextRow:
        """As `TextProbe` says: of tokens, each has a label."""
        row = super().row_of(document)
        places = torch.arange(len(document), dtype=torch.int32)
        return replace(row, units=places) if scores_tokens(self.model) else row


class ScoredModel(WholeTexts):
    """A model of transformers whose head scores texts, or tokens.

    Args:
        reads_states: the head is a matrix on the states of tokens; else the model's own forward makes scores.
    """

    probe = ScoreProbe
    gives = "scores"
    kinds = "decoders that score states by a matrix, and encoders"

    def __init__(self, module: "PreTrainedModel", backbone: Backbone, verdict: Verdict, reads_states: bool):
        super().__init__(module, backbone, verdict)
        self.reads_states = reads_states

    @classmethod
    def _head_of(cls, module: "PreTrainedModel") -> bool:
        """Whether it is a matrix on the states of tokens."""
        return hasattr(module, SCORE)

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

    def scores(self, batch: TextBatch) -> Tensor:
        """The scores of each text, or of each of its labelled tokens, fp32 `(N, labels)`, with their gradient.

        Raises:
            ModelError: the batch's layout is not the model's.
        """
        self._check_layout(batch)
        if self.reads_states:
            return self._score(self.hidden(batch))
        assert isinstance(self.backbone, ModuleForward)
        return self.backbone.through(partial(self._own_scores, batch)).float()

    def _score(self, states: Tensor) -> Tensor:
        module: Any = self.module
        if scores_tokens(module):
            states = module.dropout(states)  # transformers' own, in front of this matrix
        head = getattr(module, SCORE)
        weight = next(head.parameters())
        scores: Tensor = head(states.float() if isinstance(head, TrainedModule) else states.to(weight.dtype))
        return scores.float()

    def _own_scores(self, batch: TextBatch) -> Tensor:
        """`(N, labels)` by the model's own forward."""
        if self.backbone.layout != "single" or batch.attention_mask is None:
            scores = own_scores(self.module, *self._given(batch))
            scores = scores if scores.ndim == 2 else scores[:, : batch.input_ids.shape[1]]
        else:
            alone = self._each_alone(batch)
            rows = [own_scores(self.module, ids, torch.ones_like(ids), types) for ids, types in alone]
            width = batch.input_ids.shape[1]
            scores = torch.cat([row if row.ndim == 2 else F.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows])
        return scores if scores.ndim == 2 else scores.flatten(0, 1).index_select(0, batch.supervised_positions)
