"""The loss head: cross-entropy over supervised positions without ever holding all logits.

Only supervised positions are projected, a chunk at a time, and the gradient with respect to the hidden
states is made in the same pass (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, and of
Cut Cross-Entropy, arXiv 2411.09009). The head is frozen: it has no gradient. The sum of the losses is
divided by a denominator that the caller gives, the supervised tokens of the whole step, so that how a step
is cut into micro-batches and chunks does not change it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20  # what a chunk of logits may take, its fp32 copies included
PANEL_ROWS = 8192  # rows of a 16-bit head that are widened at a time when products run in fp32


@dataclass(frozen=True)
class LossHead:
    """The output projection of a model and what it does to the logits.

    Args:
        weight: `[vocabulary, hidden]`, frozen.
        bias: `[vocabulary]` or None.
        scale: factor on the logits (Cohere multiplies, Granite divides by its `logits_scaling`).
        softcap: c in c · tanh(logits / c) (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "LossHead":
        """The head of a transformers causal language model."""
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"{type(model).__name__} has no output head.", "Allowed: causal language models with a linear head."
            )
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        if scaling := getattr(config, "logits_scaling", None):
            scale = 1 / scaling
        return cls(
            head.weight, getattr(head, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None)
        )

    def loss(self, hidden: Tensor, targets: Tensor, denominator: float) -> Tensor:
        """Sum of −log p(target) over the rows, divided by `denominator`.

        Args:
            hidden: `(N, hidden)`, the states of supervised positions.
            targets: `(N,)` int64.
            denominator: supervised tokens of the whole step.

        Returns:
            A scalar in fp32 (nats) whose backward gives the gradient of `hidden`.
        """
        return _LossFunction.apply(hidden, self, targets, denominator)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """−log p(target) of each row, `(N,)` fp32; no gradient."""
        with torch.no_grad():
            chunks = zip(self._chunks(hidden), self._chunks(targets), strict=True)
            return torch.cat([F.cross_entropy(self.logits(h), t, reduction="none") for h, t in chunks])

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) -> (N, vocabulary) in fp32; products in the dtype of `hidden`."""
        logits = torch.cat([F.linear(hidden, panel.to(hidden.dtype)) for panel in self._panels(hidden.dtype)], dim=1)
        logits = logits.float()
        if self.bias is not None:
            logits += self.bias.float()
        logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _panels(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The weight in one piece, or in panels where each is widened to another dtype only while it is used."""
        return (self.weight,) if self.weight.dtype == dtype else self.weight.split(PANEL_ROWS)

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, CHUNK_BYTES // (self.weight.shape[0] * 10)))

    def _grad_hidden(self, logits: Tensor, targets: Tensor, factor: float, out: Tensor) -> None:
        """out = factor · d(sum of losses)/d(hidden), (C, hidden), from the final logits (C, V)."""
        grad = logits.softmax(dim=-1)
        grad[torch.arange(len(targets), device=targets.device), targets] -= 1
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        grad = grad.mul_(factor * self.scale).to(out.dtype)
        panels = self._panels(out.dtype)
        column_panels = grad.split(panels[0].shape[0], dim=1)
        torch.mm(column_panels[0], panels[0].to(out.dtype), out=out)
        for columns, panel in zip(column_panels[1:], panels[1:], strict=True):
            out.addmm_(columns, panel.to(out.dtype))


class _LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: LossHead, targets: Tensor, denominator: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        grad_chunks = head._chunks(grad_hidden) if grad_hidden is not None else None
        for i, (h, t) in enumerate(zip(head._chunks(hidden), head._chunks(targets), strict=True)):
            logits = head.logits(h)  # (C, V)
            total += F.cross_entropy(logits, t, reduction="sum").double()
            if grad_chunks is not None:
                head._grad_hidden(logits, t, 1 / denominator, out=grad_chunks[i])
        ctx.save_for_backward(grad_hidden)
        return (total / denominator).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_outputs[0].to(grad_hidden.dtype), None, None, None
