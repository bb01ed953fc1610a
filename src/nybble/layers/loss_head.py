"""The loss head: cross-entropy over supervised positions without ever holding all logits.

Only supervised positions are projected, a chunk at a time, and the gradient with respect to the hidden
states is made in the same pass (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, and of
Cut Cross-Entropy, arXiv 2411.09009), and that of the head's matrix where it is trained. The sum of the losses is
divided by a denominator that the caller gives, the supervised tokens of the whole step, so that how a step
is cut into micro-batches and chunks does not change it. Each loss may have a weight.

A chunk's logits are made once, and a `Criterion` says of each row of them its loss and the gradient: cross-entropy,
with what regularisers add, or another (`layers/distillation.py`).

`LossHead` computes logits that are c · tanh(s · (W·x + b) / c); which models' are, `layers/own_head.py` finds out.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.hardware import as_double, wide_dtype
from nybble.kernels.slabs import empty_like
from nybble.layers.lora import LoraLinear
from nybble.layers.regularisers import PLAIN, Regularisers
from nybble.layers.rooms import Rooms
from nybble.layers.streamed import HeadMatrix, widened
from nybble.layers.token_rows import TokenLogits
from nybble.sizes import SHAPE_RULES, WIDE_LOGIT_BYTES, ShapeRules

NO_TARGET = -1

Denominator = float | Tensor  # of a loss; fp64 [] on the device where a graph will find another in its place


class Criterion(Protocol):
    """What is asked of rows of logits: of each a loss, and K figures that are told of it beside."""

    @property
    def num_figures(self) -> int:
        """K."""

    @property
    def plain(self) -> "Criterion":
        """The same without what only a training step adds."""

    def of_rows(self, first: int, count: int) -> "Criterion":
        """That of so many rows from `first` on."""

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses and figures, fp32 `(1 + K, N)`, for autograd.

        Args:
            logits: fp32 `(N, vocabulary)`. targets: `(N,)`.
        """

    def losses_(self, logits: Tensor, targets: Tensor, factor: Tensor | float) -> Tensor:
        """The same without autograd; the logits become factor · d(sum of losses)/d(logits).

        Args:
            logits: `(N, vocabulary)` in the compute dtype or in fp32.
            targets: `(N,)`; negative ones leave their rows out, with a loss and a gradient of 0. So does the head with
                rows that it fills up with, behind all others.
        """


class Head(ABC):
    """What turns hidden states into logits and losses.

    Attributes:
        regularisers: of `loss`, not of `token_losses`.
    """

    regularisers: Regularisers

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many logits a state gets."""

    def loss(self, hidden: Tensor, targets: Tensor, denominator: Denominator, weights: Tensor | None = None) -> Tensor:
        """Σ weight · (−log p(target)) / `denominator` over the rows, with what regularisers add.

        Args:
            hidden: `(N, hidden)`, the states of supervised positions.
            targets: `(N,)` int64.
            denominator: supervised tokens of the whole step.
            weights: `(N,)` fp32, and no gradient of them; None where each is 1.

        Returns:
            A scalar in fp32 (nats) whose backward gives the gradient of `hidden`, and of the adapter.
        """
        return self.judge(self.regularisers, hidden, targets, denominator, weights)[0]

    def token_losses(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """weight · (−log p(target)) of each row in nats, `(N,)` fp32; no gradient."""
        return weighted(self.figures(PLAIN, hidden, targets)[0], weights)

    @abstractmethod
    def judge(
        self,
        criterion: Criterion,
        hidden: Tensor,
        targets: Tensor,
        denominator: Denominator,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`loss` by any criterion, and its figures, `(K, N)` fp32, without weights and without a gradient."""

    @abstractmethod
    def figures(self, criterion: Criterion, hidden: Tensor, targets: Tensor) -> Tensor:
        """The criterion's losses and figures of each row, `(1 + K, N)` fp32 without weights; no gradient."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Project states `(N, hidden)` onto the vocabulary: `(N, vocabulary)`."""

    @abstractmethod
    def chunk_rows(self, itemsize: int) -> int:
        """Rows whose logits are made at once, for states of elements of so many bytes."""

    @abstractmethod
    def with_regularisers(self, regularisers: Regularisers) -> "Head":
        """The same with these in its `loss`."""


@dataclass(frozen=True)
class LossHead(Head):
    """The output projection of a model and what it does to the logits.

    Args:
        weight: `[vocabulary, hidden]`; on disk where the head is streamed. It gets a gradient where it is trained.
        bias: `[vocabulary]` or None.
        scale: factor on the logits, bias included.
        softcap: c in c · tanh(logits / c) (Gemma 2), or None.
        adapter: beside the weight, or None; its A and B get gradients.
    """

    weight: Tensor | HeadMatrix
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: LoraLinear | TokenLogits | None = None
    regularisers: Regularisers = PLAIN
    rooms: Rooms = field(default_factory=Rooms, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def rules(self) -> ShapeRules:
        """How its device wants rows and matrices cut."""
        return SHAPE_RULES[self.device.type]

    def with_regularisers(self, regularisers: Regularisers) -> "LossHead":
        """As `Head` says."""
        return replace(self, regularisers=regularisers)

    def judge(
        self,
        criterion: Criterion,
        hidden: Tensor,
        targets: Tensor,
        denominator: Denominator,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Head` says."""
        matrix = self.weight if is_trained(self.weight) else None
        trained = (*self._low_rank(hidden), matrix)
        return _LossFunction.apply(hidden, self, criterion, targets, denominator, weights, *trained)

    @property
    def is_trained(self) -> bool:
        """Whether anything of the head gets a gradient."""
        return self.adapter is not None or is_trained(self.weight)

    def _low_rank(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """scaling · x · Aᵀ `(N, r)` and B `[vocabulary, r]` in the dtype of x; None without an adapter."""
        if self.adapter is None or not self.adapter.enabled:
            return None, None
        return self.adapter.low_rank(hidden), self.adapter.lora_B.to(hidden.dtype)

    @torch.no_grad()
    def figures(self, criterion: Criterion, hidden: Tensor, targets: Tensor) -> Tensor:
        """As `Head` says."""
        found, first = [], 0
        for h, t, buffer in self.chunks(hidden, targets):
            found.append(criterion.plain.of_rows(first, len(h)).losses_(self.logits(h, buffer), t, 0.0))
            first += len(h)
        return joined(found, hidden, criterion)[:, : len(targets)]

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
        in_rooms = out is not None and not self._is_plain and product.dtype != torch.float32
        room = self.rooms.of("logits in fp32", product.shape, torch.float32, product.device) if in_rooms else None
        return self.finish(product, room)

    def finish(self, product: Tensor, room: Tensor | None = None) -> Tensor:
        """Logits from hidden · Wᵀ, which is overwritten where it is fp32.

        Args:
            room: fp32, where they go where it is not; a fresh tensor where None.
        """
        if self._is_plain:
            return product
        logits = product.float() if room is None else room.copy_(product)
        if self.bias is not None:
            logits += self.bias.float()
        logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def _is_plain(self) -> bool:
        return self.bias is None and self.scale == 1.0 and self.softcap is None

    def _panels(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight in `dtype`, in panels of `panel_rows`, each used before the next is asked for."""
        rows, (vocabulary, width) = self.panel_rows(dtype), self.weight.shape
        room = None
        if self.weight.dtype != dtype:
            room = self.rooms.of("panel", (min(rows, vocabulary), width), dtype, self.device)
        return widened(self.weight, rows, dtype, room)

    def panel_rows(self, dtype: torch.dtype) -> int:
        """Rows of a panel: all, unless the head is large or is widened to another dtype while it is used."""
        rows, width = self.weight.shape
        return self.rules.head_panel_rows(
            rows,
            width * self.weight.dtype.itemsize,
            widened=self.weight.dtype != dtype,
            streamed=isinstance(self.weight, HeadMatrix),
        )

    def chunk_rows(self, itemsize: int) -> int:
        """Rows of a chunk of logits."""
        return self.rules.product_rows(self.vocabulary * (itemsize if self._is_plain else WIDE_LOGIT_BYTES))

    def chunks(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows, targets and room for the logits, chunk by chunk; the last is filled up with rows of zeros that have no
        target.
        """
        missing = self._missing(targets)
        rows = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        filled = F.pad(targets, (0, missing), value=NO_TARGET) if missing else targets
        size = self.chunk_rows(hidden.dtype.itemsize)
        buffer = self.rooms.of("logits", (min(size, len(rows)), self.weight.shape[0]), hidden.dtype, hidden.device)
        chunks = zip(rows.split(size), filled.split(size), strict=True)
        return [(h, t, buffer[: len(h)]) for h, t in chunks] if len(targets) else []

    def gradient_room(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """For the gradient of the rows of all chunks, those among them that they are filled up with."""
        return empty_like(hidden, (len(targets) + self._missing(targets), hidden.shape[1]))

    def _missing(self, targets: Tensor) -> int:
        """Rows that the last chunk is filled up with."""
        return -len(targets) % self.rules.row_multiple

    def loss_and_gradient(
        self,
        hidden: Tensor,
        targets: Tensor,
        buffer: Tensor,
        factor: Tensor,
        criterion: Criterion,
        out: Tensor,
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses and figures of a chunk `(1 + K, C)` fp32, and factor · d(sum of the losses)/d(product)
        `(C, vocabulary)`, which lies in `buffer`; the factor is fp64 [].

        Args:
            out: where the same /d(hidden) goes, `(C, hidden)`.
        """
        logits = self._logits(hidden, buffer, low, b)
        slope = None if self.softcap is None else self._slope(logits, self.softcap)
        losses = criterion.losses_(logits, targets, (factor * self.scale).float())  # logits now holds the gradient
        if slope is not None:
            logits *= slope
        grad = logits if logits.dtype == hidden.dtype else buffer.copy_(logits)
        columns = grad.split(self.panel_rows(hidden.dtype), dim=1)
        if len(columns) == 1:
            (panel,) = self._panels(hidden.dtype)
            torch.mm(grad, panel, out=out)
            return losses, grad
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # partial sums stay unrounded
        for column, panel in zip(columns, self._panels(hidden.dtype), strict=True):
            total += column @ panel
        out.copy_(total)
        return losses, grad

    def _slope(self, logits: Tensor, cap: float) -> Tensor:
        """1 - (logits / c)², of c · tanh."""
        room = self.rooms.of("slope", logits.shape, logits.dtype, logits.device)
        return torch.div(logits, cap, out=room).square_().neg_().add_(1)


class _LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: LossHead,
        criterion: Criterion,
        targets: Tensor,
        denominator: Denominator,
        weights: Tensor | None = None,
        low: Tensor | None = None,
        b: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not any(each is not None and each.requires_grad for each in (hidden, low, matrix)):
            found = head.figures(criterion, hidden, targets)
            return (as_double(weighted(found[0], weights)).sum() / denominator).float(), found[1:]
        total = torch.zeros((), dtype=wide_dtype(hidden.device), device=hidden.device)
        factor = 1 / (torch.full_like(total, denominator) if isinstance(denominator, float | int) else denominator)
        grads_low, told = [], []
        grad_b = None if b is None else torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        grad_matrix = None if matrix is None else torch.zeros_like(matrix, dtype=torch.float32)
        grad_hidden = head.gradient_room(hidden, targets)
        missing = len(grad_hidden) - len(targets)  # as the chunks are filled up
        left = None if low is None else F.pad(low, (0, 0, 0, missing))
        left_weights = None if weights is None else F.pad(weights, (0, missing))
        first = 0
        for h, t, buffer in head.chunks(hidden, targets):
            part, left = take_rows(left, len(h))
            w, left_weights = take_rows(left_weights, len(h))
            own, rows = criterion.of_rows(first, len(h)), grad_hidden[first : first + len(h)]
            first += len(h)
            losses, grad_product = head.loss_and_gradient(h, t, buffer, factor, own, rows, part, b)
            told.append(losses)
            total += as_double(weighted(losses[0], w)).sum()
            if w is not None:
                rows.copy_(weighted(rows, w))
            if part is not None and b is not None and grad_b is not None:
                grads_low.append(weighted(grad_product @ b, w))  # (C, vocabulary) -> (C, r)
                grad_b += grad_product.T @ weighted(part, w)
            if grad_matrix is not None:
                _add_product(grad_matrix, grad_product, weighted(h, w), head.rules.panel_rows)
        grad_b = None if b is None or grad_b is None else grad_b.to(b.dtype)
        grad_low = None if low is None else torch.cat([low[:0], *grads_low])[: len(targets)]
        ctx.save_for_backward(grad_hidden[: len(targets)], grad_low, grad_b, grad_matrix)
        figures = joined(told, hidden, criterion)[1:, : len(targets)]
        ctx.mark_non_differentiable(figures)
        return (total / denominator).float(), figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors = ((grad, grad_outputs[0].to(grad.dtype)) if grad is not None else None for grad in ctx.saved_tensors)
        scaled = [None if each is None else torch.mul(*each, out=empty_like(each[0])) for each in factors]
        grad_hidden, grad_low, grad_b, grad_matrix = scaled
        return grad_hidden, None, None, None, None, None, grad_low, grad_b, grad_matrix


def joined(parts: Sequence[Tensor], hidden: Tensor, criterion: Criterion) -> Tensor:
    """Losses and figures `(1 + K, C)` of chunks of states, one behind the other: `(1 + K, N)`."""
    nothing = hidden.new_zeros((1 + criterion.num_figures, 0), dtype=torch.float32)
    return torch.cat([nothing, *parts], dim=1)


def is_trained(weight: Tensor | HeadMatrix) -> bool:
    """Whether it gets a gradient; what lies on a disk never does."""
    return isinstance(weight, Tensor) and weight.requires_grad


def _add_product(total: Tensor, left: Tensor, right: Tensor, panel_rows: int) -> None:
    """total += leftᵀ · right; where that is in fp32 and they are not, so many rows at a time."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    for rows, columns in zip(total.split(panel_rows), left.split(panel_rows, dim=1), strict=True):
        rows += columns.T @ right


def take_rows(rows: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The first so many rows, and the others; there may be none at all."""
    return (None, None) if rows is None else (rows[:count], rows[count:])


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Each row `(N, ..)` times its weight `(N,)`, in its dtype; as they are without weights."""
    if weights is None:
        return rows
    return (rows * weights.view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)
