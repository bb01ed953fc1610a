"""How far a quantised model's answers lie from the 16-bit model's, position by position.

Over the same tokens: KL(p‖q) of the output distributions, p the 16-bit model's; the difference of the losses; how often
both have the same likeliest token. Logits are never kept: both models run side by side, a document at a time.

The loss difference is paired (same tokens, two models) and its 95 % interval comes from a bootstrap over documents,
since tokens of one document are not independent. Source of the yardstick: "Accuracy is not all you need" (arXiv
2407.09141), which finds KL and flips to follow what users notice where accuracy does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.data.packing import pack_tokens
from nybble.data.picture_reader import PicturedRow
from nybble.layers.causal_lm import CausalLM
from nybble.layers.loss_head import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_POSITIONS = 256  # logits of so many positions exist at once
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quality:
    """What one arm lost, in nats.

    Args:
        kl_mean, kl_median, kl_p99: of KL(16-bit ‖ arm) over positions.
        loss: mean of the arm over all targets, and
        loss_difference: to the 16-bit model's, over the same targets; low and high of its 95 % interval.
        top1_agreement: share of positions where both models' likeliest token is the same.
        positions: compared.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    loss: float
    loss_difference: float
    difference_low: float
    difference_high: float
    top1_agreement: float
    positions: int


class Comparison:
    """The 16-bit model's states over the evaluation documents, computed once, and arms compared with it.

    Args:
        base: the 16-bit model.
        documents: int64 `(tokens)` each, at least two tokens; or rows with pictures, of which what is behind the last
            picture is asked.
        computed_by: what computes the models; for rows with pictures what reads these.
    """

    def __init__(
        self,
        base: "PreTrainedModel",
        documents: Sequence[Tensor | PicturedRow],
        computed_by: type[CausalLM] = CausalLM,
    ):
        self.documents, self._computed_by = documents, computed_by
        model = computed_by.of(base)
        self._head = model.head
        self._states = [states.clone() for states in _states(model, documents)]

    def compare(self, arm: "PreTrainedModel", seed: int = 0) -> Quality:
        """Measure one arm; `seed` draws the bootstrap."""
        model = self._computed_by.of(arm)
        kl, difference, losses, agree, lengths = [], [], [], [], []
        for document, exact, states in zip(self.documents, self._states, _states(model, self.documents), strict=True):
            targets = _tokens(document)[_positions(document) + 1]
            for at in range(0, len(targets), CHUNK_POSITIONS):
                chunk = slice(at, at + CHUNK_POSITIONS)
                p, q = _log_probabilities(self._head, exact[chunk]), _log_probabilities(model.head, states[chunk])
                kl.append((p.exp() * (p - q)).sum(-1))
                wanted = targets[chunk, None]
                losses.append(-q.gather(1, wanted)[:, 0])
                difference.append((p - q).gather(1, wanted)[:, 0])
                agree.append(p.argmax(-1) == q.argmax(-1))
            lengths.append(len(targets))
        divergence, differences = torch.cat(kl).double(), torch.cat(difference).double()
        low, high = bootstrap_interval(differences, lengths, seed)
        return Quality(
            kl_mean=float(divergence.mean()),
            kl_median=float(divergence.median()),
            kl_p99=float(divergence.quantile(0.99)),
            loss=float(torch.cat(losses).double().mean()),
            loss_difference=float(differences.mean()),
            difference_low=low,
            difference_high=high,
            top1_agreement=float(torch.cat(agree).double().mean()),
            positions=len(divergence),
        )


def bootstrap_interval(values: Tensor, lengths: Sequence[int], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, documents of these lengths drawn with replacement."""
    sums = torch.stack([part.sum() for part in values.split(list(lengths))])
    counts = torch.tensor(lengths, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(lengths), (RESAMPLES, len(lengths)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    edge = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high


@torch.no_grad()
def _log_probabilities(head: Head, states: Tensor) -> Tensor:
    """(positions, hidden) -> fp32 (positions, vocabulary)"""
    return torch.log_softmax(head.logits(states).float(), dim=-1)


@torch.no_grad()
def _states(model: CausalLM, documents: Sequence[Tensor | PicturedRow]) -> list[Tensor]:
    """Final hidden states of the positions that are asked about, of each document."""
    return [
        model.hidden(
            pack_tokens([document]) if isinstance(document, Tensor) else model.collate([document]), _positions(document)
        )
        for document in documents
    ]


def _tokens(document: Tensor | PicturedRow) -> Tensor:
    return document if isinstance(document, Tensor) else document.input_ids.long()


def _positions(document: Tensor | PicturedRow) -> Tensor:
    """All but the last, which predicts nothing that is known; of a row with pictures those behind the last of them."""
    tokens = _tokens(document)
    first = 0 if isinstance(document, Tensor) else max(0, max(document.picture_ends, default=1) - 1)
    return torch.arange(first, len(tokens) - 1)
