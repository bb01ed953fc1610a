"""What a model says after each token of a text, and how far that is from what another says.

Of the reference the likeliest TOP tokens of each position are kept, and all others together as one more outcome. The
KL divergence between distributions lumped so is a lower bound of the whole one (data processing inequality).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from nybble.data.examples import extended
from nybble.data.packing import PicturedBatch, pack_tokens
from nybble.layers.causal_lm import CausalLM

TOP = 256
TINY = 1e-12  # a probability of zero is not divided by


@dataclass(frozen=True)
class Distributions:
    """A model's distributions at N positions.

    Args:
        top_ids: int32 `(N, K)`, its likeliest tokens.
        top_log_p: fp32 `(N, K)`, their log-probabilities.
    """

    top_ids: Tensor
    top_log_p: Tensor

    @classmethod
    def of(cls, log_p: Tensor) -> "Distributions":
        """Keep the likeliest tokens of log-probabilities `(N, vocabulary)`."""
        top = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1)
        return cls(top.indices.int(), top.values)

    def kl(self, log_q: Tensor) -> Tensor:
        """KL(these || q) in nats, fp64 `(N,)`, for log-probabilities q `(N, vocabulary)`."""
        return lumped_kl(self.top_log_p, log_q.gather(1, self.top_ids.long()))

    def lead(self, tokens: Tensor) -> Tensor:
        """How many nats likelier than a token of each position, `(N,)`, the likeliest one is, fp32 `(N,)`; infinite
        for a token that was not kept.
        """
        here = self.top_ids == tokens[:, None]  # (N, K)
        return (self.top_log_p[:, :1] - self.top_log_p.masked_fill(~here, -torch.inf)).amin(dim=1)


@torch.no_grad()
def text_logits(
    model: CausalLM, ids: Sequence[int], positions: Tensor, beside: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """Logits after the tokens at `positions` of one text, fp32 `(N, vocabulary)` on the CPU.

    Args:
        beside: what a vision-language model is given of the text's pictures, by name.
    """
    batch = pack_tokens([ids])
    if beside:
        padded = {"cu_seqlens": None, "attention_mask": torch.ones_like(batch.input_ids)}
        batch = extended(batch, PicturedBatch, pictures=dict(beside), **({} if model.packed else padded))
    return model.logits(batch.to(model.device), positions.to(model.device)).float().cpu()


def lumped_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over some outcomes `(N, K)` and all others lumped together, fp64 `(N,)`."""
    p, q = log_p.double().exp(), log_q.double().exp()
    rest_p, rest_q = ((1 - part.sum(dim=-1)).clamp(min=TINY) for part in (p, q))
    return (p * (log_p.double() - log_q.double())).sum(dim=-1) + rest_p * (rest_p / rest_q).log()
