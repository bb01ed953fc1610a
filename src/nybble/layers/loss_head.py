"""The loss head: cross-entropy over supervised positions without ever holding all logits.

Only supervised positions are projected, a chunk at a time, and the gradient with respect to the hidden
states is made in the same pass (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, and of
Cut Cross-Entropy, arXiv 2411.09009). The head is frozen: it has no gradient. The sum of the losses is
divided by a denominator that the caller gives, the supervised tokens of the whole step, so that how a step
is cut into micro-batches and chunks does not change it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import ModelError
from nybble.kernels import block_ops
from nybble.layers.lora import LoraLinear
from nybble.layers.streamed import HeadMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 32 * 2**20  # what a chunk of logits may take
ROW_MULTIPLE = 64  # chunks have a multiple of so many rows: oneDNN keeps a compiled product per shape it has seen
NO_TARGET = -1
PANEL_ROWS = 8192  # rows of a 16-bit head that are widened at a time when products run in fp32
LARGE_HEAD_BYTES = 2**28  # from here on in panels, streamed or resident, so that both give one result
PANEL_BYTES = 2**25


@dataclass(frozen=True)
class LossHead:
    """The output projection of a model and what it does to the logits.

    Args:
        weight: `[vocabulary, hidden]`, frozen; on disk where the head is streamed.
        bias: `[vocabulary]` or None.
        scale: factor on the logits (Cohere multiplies, Granite divides by its `logits_scaling`).
        softcap: c in c · tanh(logits / c) (Gemma 2), or None.
        adapter: beside the weight, or None; its A and B get gradients.
    """

    weight: Tensor | HeadMatrix
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: LoraLinear | None = None
    _rooms: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        cap = getattr(config, "final_logit_softcapping", None)
        adapter = head if isinstance(head, LoraLinear) else None
        linear: Any = head if adapter is None else adapter.base
        return cls(linear.weight, getattr(linear, "bias", None), float(scale), cap, adapter)

    def loss(self, hidden: Tensor, targets: Tensor, denominator: float) -> Tensor:
        """Sum of −log p(target) over the rows, divided by `denominator`.

        Args:
            hidden: `(N, hidden)`, the states of supervised positions.
            targets: `(N,)` int64.
            denominator: supervised tokens of the whole step.

        Returns:
            A scalar in fp32 (nats) whose backward gives the gradient of `hidden`, and of the adapter.
        """
        return _LossFunction.apply(hidden, self, targets, denominator, *self._low_rank(hidden))

    def _low_rank(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """scaling · x · Aᵀ `(N, r)` and B `[vocabulary, r]` in the dtype of x; None without an adapter."""
        if self.adapter is None or not self.adapter.enabled:
            return None, None
        return self.adapter.low_rank(hidden), self.adapter.lora_B.to(hidden.dtype)

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """−log p(target) of each row, `(N,)` fp32; no gradient."""
        chunks = self._chunks(hidden, targets)
        losses = [block_ops.cross_entropy_(self.logits(h, buffer), t, 0.0) for h, t, buffer in chunks]
        return torch.cat([hidden.new_zeros(0, dtype=torch.float32), *losses])[: len(targets)]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, hidden) -> (N, vocabulary); in fp32 where anything is done to them after the product.

        Args:
            out: where the product goes, `(N, vocabulary)` in the dtype of `hidden`; a fresh tensor where None.
        """
        return self._logits(hidden, out, *self._low_rank(hidden))

    def _logits(self, hidden: Tensor, out: Tensor | None, low: Tensor | None, b: Tensor | None) -> Tensor:
        product = hidden.new_empty(len(hidden), self.weight.shape[0]) if out is None else out
        parts = product.split(self.panel_rows(hidden.dtype), dim=1)
        for panel, columns in zip(self._panels(hidden.dtype), parts, strict=True):
            torch.mm(hidden, panel.T, out=columns)
        if low is not None and b is not None:
            product.addmm_(low, b.T)
        return self.finish(product)

    def finish(self, product: Tensor) -> Tensor:
        """Logits from hidden · Wᵀ, which is overwritten where it is fp32."""
        if self._is_plain:
            return product
        logits = product.float()
        if self.bias is not None:
            logits += self.bias.float()
        logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def _is_plain(self) -> bool:
        return self.bias is None and self.scale == 1.0 and self.softcap is None

    def _panels(self, dtype: torch.dtype) -> Iterable[Tensor]:
        """The weight in `dtype`, in panels of `panel_rows`, each used before the next is asked for."""
        for panel in self.weight.split(self.panel_rows(dtype)):
            yield panel if panel.dtype == dtype else self._room("panel", panel.shape, dtype, panel.device).copy_(panel)

    def panel_rows(self, dtype: torch.dtype) -> int:
        """Rows of a panel: all, unless the head is large or is widened to another dtype while it is used."""
        rows, width = self.weight.shape
        row_bytes = width * self.weight.dtype.itemsize
        if rows * row_bytes >= LARGE_HEAD_BYTES:
            return max(ROW_MULTIPLE, PANEL_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
        return rows if self.weight.dtype == dtype else PANEL_ROWS

    def chunk_rows(self, itemsize: int) -> int:
        """Rows of a chunk, a multiple of ROW_MULTIPLE."""
        fit = CHUNK_BYTES // (self.weight.shape[0] * (itemsize if self._is_plain else 8))
        return max(ROW_MULTIPLE, fit // ROW_MULTIPLE * ROW_MULTIPLE)

    def _chunks(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows, targets and room for the logits, chunk by chunk; the last is filled up with rows of zeros that have no
        target.
        """
        missing = -len(targets) % ROW_MULTIPLE
        rows = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        filled = F.pad(targets, (0, missing), value=NO_TARGET) if missing else targets
        size = self.chunk_rows(hidden.dtype.itemsize)
        buffer = self._room("logits", (min(size, len(rows)), self.weight.shape[0]), hidden.dtype, hidden.device)
        chunks = zip(rows.split(size), filled.split(size), strict=True)
        return [(h, t, buffer[: len(h)]) for h, t in chunks] if len(targets) else []

    def _room(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of that shape, kept from chunk to chunk and from call to call: the pages of a fresh one cost as much
        as the softmax, and taken anew between what blocks keep it leaves holes in the C library's heap.
        """
        room = self._rooms.get(name)
        if room is None or len(room) < shape[0] or room.dtype != dtype:
            del room
            self._rooms.pop(name, None)  # the old room is free before the new one is taken
            room = self._rooms[name] = torch.empty(tuple(shape), dtype=dtype, device=device)
        return room[: shape[0]]

    def loss_and_gradient(
        self,
        hidden: Tensor,
        targets: Tensor,
        buffer: Tensor,
        factor: float,
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of a chunk `(C,)` fp32, and factor · d(their sum)/d(hidden) `(C, hidden)`, and /d(product)
        `(C, vocabulary)`, which lies in `buffer` or beside it.
        """
        logits = self._logits(hidden, buffer, low, b)
        slope = None if self.softcap is None else 1 - (logits / self.softcap).square()
        losses = block_ops.cross_entropy_(logits, targets, factor * self.scale)  # logits now holds the gradient
        if slope is not None:
            logits *= slope
        grad = logits.to(hidden.dtype)
        columns = grad.split(self.panel_rows(hidden.dtype), dim=1)
        if len(columns) == 1:
            (panel,) = self._panels(hidden.dtype)
            return losses, grad @ panel, grad
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # partial sums stay unrounded
        for column, panel in zip(columns, self._panels(hidden.dtype), strict=True):
            total += column @ panel
        return losses, total.to(hidden.dtype), grad


class _LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: LossHead,
        targets: Tensor,
        denominator: float,
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> Tensor:
        if not hidden.requires_grad and (low is None or not low.requires_grad):
            return (head.token_losses(hidden, targets).double().sum() / denominator).float()
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grads, grads_low = [hidden[:0]], []
        grad_b = None if b is None else torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        left = None if low is None else F.pad(low, (0, 0, 0, -len(low) % ROW_MULTIPLE))  # as the chunks are filled up
        for h, t, buffer in head._chunks(hidden, targets):
            part, left = (None, None) if left is None else (left[: len(h)], left[len(h) :])
            losses, grad, grad_product = head.loss_and_gradient(h, t, buffer, 1 / denominator, part, b)
            total += losses.double().sum()
            grads.append(grad)
            if part is not None and b is not None and grad_b is not None:
                grads_low.append(grad_product @ b)  # (C, vocabulary) -> (C, r)
                grad_b += grad_product.T @ part
        grad_b = None if b is None or grad_b is None else grad_b.to(b.dtype)
        grad_low = None if low is None else torch.cat([low[:0], *grads_low])[: len(targets)]
        ctx.save_for_backward(torch.cat(grads)[: len(targets)], grad_low, grad_b)
        return (total / denominator).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors]
        grad_hidden, grad_low, grad_b = scaled
        return grad_hidden, None, None, None, grad_low, grad_b
