"""A model that gives scores of a text: batches in, scores out.

transformers has two kinds (AutoModelForSequenceClassification). Decoders multiply the state of the last token with a
matrix, `score`: that is computed here, through decoder blocks where they know the model. Of encoders the model's own
forward is asked, with all that it puts between its states and its scores (a pooler, a dense layer, dropout). Which it
is, the model is asked (`ScoreProbe`). Scores are made in fp32.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from nybble.data.text_rows import TextBatch
from nybble.layers.backbone import Backbone, Layout, ModuleForward, Reason, Why
from nybble.layers.batch_model import Verdict
from nybble.layers.probe import ASKED
from nybble.layers.rotary import length_of_change
from nybble.layers.trained import TrainedModule
from nybble.layers.whole_texts import TextProbe, WholeTexts, own_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAST_TOKEN = "score"  # what transformers calls the matrix that scores a decoder's last state


def own_scores(
    model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
) -> Tensor:
    """What the model's own forward gives of padded texts, `(B, labels)`; arguments are those of `own_output`."""
    logits: Tensor = own_output(model, input_ids, attention_mask, token_types).logits
    return logits


class ScoreProbe(TextProbe):
    """Compares scores."""

    def own_of(self, output: Any) -> Tensor:
        """As `TextProbe` says."""
        logits: Tensor = output.logits
        return logits

    def given_of(self, way: Any, batch: TextBatch, asked: tuple[int, int]) -> Tensor:
        """As `TextProbe` says."""
        model: ScoredModel = way
        return model.scores(batch)[ASKED, None]


class ScoredModel(WholeTexts):
    """A model of transformers whose head scores texts.

    Args:
        reads_last: the head is a matrix on the state of the last token; else the model's own forward makes scores.
    """

    probe = ScoreProbe
    gives = "scores"
    kinds = "decoders that score the state of a text's last token, and encoders"

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
        alone = self._each_alone(batch)
        return torch.cat([own_scores(self.module, ids, torch.ones_like(ids), types) for ids, types in alone])
