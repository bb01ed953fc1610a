"""A model that embeds texts: batches in, a vector of length 1 for each text out.

The last states of a text's tokens are pooled into one (Reimers and Gurevych 2019, arXiv 1908.10084): their mean, the
first token's (cls) or the last one's, or the largest of each element. Decoders that nybble's blocks know are computed
by these, rows side by side; all others by their own forward. States are pooled and scaled in fp32.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.text_rows import TextBatch
from nybble.layers.backbone import Backbone, FusedForward, Layout, ModuleForward, Reason, Why
from nybble.layers.batch_model import Verdict
from nybble.layers.rotary import length_of_change
from nybble.layers.whole_texts import TextProbe, WholeTexts, own_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.options.objective_groups import Pooling


class StateProbe(TextProbe):
    """Compares the states of all tokens."""

    def own_of(self, output: Any) -> Tensor:
        """As `TextProbe` says."""
        states: Tensor = output.last_hidden_state[0]
        return states

    def given_of(self, way: Any, batch: TextBatch, asked: tuple[int, int]) -> Tensor:
        """As `TextProbe` says."""
        model: EmbeddedModel = way
        return model.states(batch, torch.arange(*asked, device=model.device)).float()


class EmbeddedModel(WholeTexts):
    """A model of transformers without a head, whose states are pooled.

    Args:
        in_blocks: nybble's decoder blocks compute it; else its own forward does.
    """

    probe = StateProbe
    gives = "states"
    kinds = "models of transformers that give last_hidden_state"

    def __init__(self, module: "PreTrainedModel", backbone: Backbone, verdict: Verdict):
        super().__init__(module, backbone, verdict)
        self.in_blocks = isinstance(backbone, FusedForward)

    @classmethod
    def _head_of(cls, module: "PreTrainedModel") -> None:
        """Nothing stands on the states."""

    @classmethod
    def _is_own(cls, head: None) -> bool:
        return False

    @classmethod
    def _through(cls, module: "PreTrainedModel", backbone: Backbone, head: None, verdict: Verdict) -> Self:
        return cls(module, backbone, verdict)

    @classmethod
    def _why_not_blocks(cls, module: "PreTrainedModel", head: None) -> Reason | None:
        if length_of_change(module) is not None:
            return Reason(Why.OPTION, "angles by a text's length where it is embedded")
        return None

    @classmethod
    def _layouts(cls, head: None, packing: bool) -> tuple[Layout, ...]:
        return super()._layouts(head, packing=False)

    def embeddings(self, batch: TextBatch, pooling: "Pooling") -> Tensor:
        """fp32 `(documents, hidden)`, each of length 1, with their gradient.

        Raises:
            ModelError: the batch's layout is not the model's.
        """
        self._check_layout(batch)
        if pooling in ("cls", "last"):
            found = self.states(batch, batch.last if pooling == "last" else batch.first).float()
        else:
            found = pooled(self.states(batch, batch.places).float(), batch.document_lengths, pooling)
        return F.normalize(found, dim=1)

    def states(self, batch: TextBatch, positions: Tensor) -> Tensor:
        """The last states at flattened positions, `(N, hidden)`."""
        if self.in_blocks:
            return self.backbone.hidden(batch, positions)
        assert isinstance(self.backbone, ModuleForward)
        return self.backbone.through(partial(self._own_states, batch)).flatten(0, 1).index_select(0, positions)

    def _own_states(self, batch: TextBatch) -> Tensor:
        """`(B, T, hidden)` by the model's own forward; zeros on the padding of texts that go through one at a time."""
        if self.backbone.layout != "single" or batch.attention_mask is None:
            states: Tensor = own_output(self.module, *self._given(batch)).last_hidden_state
            return states[:, : batch.input_ids.shape[1]]
        rows, width = [], batch.input_ids.shape[1]
        for ids, types in self._each_alone(batch):
            alone = own_output(self.module, ids, torch.ones_like(ids), types).last_hidden_state[0]
            rows.append(F.pad(alone, (0, 0, 0, width - len(alone))))
        return torch.stack(rows)


def pooled(states: Tensor, lengths: tuple[int, ...], pooling: "Pooling") -> Tensor:
    """One state for each text, `(documents, hidden)`, of those of its tokens, `(sum(lengths), hidden)`."""
    texts = states.split(lengths)
    if pooling == "max":
        return torch.stack([text.amax(dim=0) for text in texts])
    return torch.stack([text.mean(dim=0) for text in texts])
