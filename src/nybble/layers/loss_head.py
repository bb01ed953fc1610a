"""The loss head: cross-entropy over supervised positions without ever holding all logits.

Only supervised positions are projected, a chunk at a time, and the gradient with respect to the hidden
states is made in the same pass (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, and of
Cut Cross-Entropy, arXiv 2411.09009), and that of the head's matrix where it is trained. The sum of the losses is
divided by a denominator that the caller gives, the supervised tokens of the whole step, so that how a step
is cut into micro-batches and chunks does not change it. Each loss may have a weight.

What a model does between its last states and its logits is not read from its config but asked of its own forward, its
decoder set aside: where that is c · tanh(s · (W·x + b) / c), `LossHead` computes it, else the own forward does, a
chunk at a time (`OwnHead`). `loss_head` decides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from nybble.errors import ModelError, first_line, foreign_errors
from nybble.kernels.hardware import as_double, wide_dtype
from nybble.kernels.ops.loss import cross_entropy_
from nybble.layers.full_weights import master_of
from nybble.layers.lora import LoraLinear
from nybble.layers.regularisers import PLAIN, Regularisers
from nybble.layers.streamed import HeadMatrix, StreamedHead, widened
from nybble.layers.token_rows import TokenLogits
from nybble.layers.trained import TrainedModule
from nybble.sizes import SHAPE_RULES, ShapeRules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_TARGET = -1

Denominator = float | Tensor  # of a loss; fp64 [] on the device where a graph will find another in its place

PROBED_STATES = (2.0**-10, 1.0, 8.0, 64.0, 2.0**20)  # sizes of the states a head is asked about: a cap shows at last
STATES_OF_A_SIZE = 2


class Head(Protocol):
    """What turns hidden states into logits and losses."""

    @property
    def device(self) -> torch.device: ...

    @property
    def vocabulary(self) -> int:
        """How many logits a state gets."""
        ...

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

    def token_losses(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """weight · (−log p(target)) of each row in nats, `(N,)` fp32; no gradient."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Project states `(N, hidden)` onto the vocabulary: `(N, vocabulary)`."""

    def chunk_rows(self, itemsize: int) -> int:
        """Rows whose logits are made at once, for states of elements of so many bytes."""

    def with_regularisers(self, regularisers: Regularisers) -> "Head":
        """The same with these in its `loss`."""


@dataclass(frozen=True)
class LossHead:
    """The output projection of a model and what it does to the logits.

    Args:
        weight: `[vocabulary, hidden]`; on disk where the head is streamed. It gets a gradient where it is trained.
        bias: `[vocabulary]` or None.
        scale: factor on the logits, bias included.
        softcap: c in c · tanh(logits / c) (Gemma 2), or None.
        adapter: beside the weight, or None; its A and B get gradients.
        regularisers: of `loss`, not of `token_losses`.
    """

    weight: Tensor | HeadMatrix
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: LoraLinear | TokenLogits | None = None
    regularisers: Regularisers = PLAIN
    _rooms: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def rooms(self) -> list[Tensor]:
        """Memory that is kept from call to call; a larger chunk may bring another in its place."""
        return list(self._rooms.values())

    @property
    def rules(self) -> ShapeRules:
        """How its device wants rows and matrices cut."""
        return SHAPE_RULES[self.device.type]

    def with_regularisers(self, regularisers: Regularisers) -> "LossHead":
        """As `Head` says."""
        return replace(self, regularisers=regularisers)

    def loss(self, hidden: Tensor, targets: Tensor, denominator: Denominator, weights: Tensor | None = None) -> Tensor:
        """As `Head` says."""
        matrix = self.weight if _is_trained(self.weight) else None
        return _LossFunction.apply(hidden, self, targets, denominator, weights, *self._low_rank(hidden), matrix)

    @property
    def is_trained(self) -> bool:
        """Whether anything of the head gets a gradient."""
        return self.adapter is not None or _is_trained(self.weight)

    def _low_rank(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """scaling · x · Aᵀ `(N, r)` and B `[vocabulary, r]` in the dtype of x; None without an adapter."""
        if self.adapter is None or not self.adapter.enabled:
            return None, None
        return self.adapter.low_rank(hidden), self.adapter.lora_B.to(hidden.dtype)

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """As `Head` says."""
        chunks = self.chunks(hidden, targets)
        losses = [cross_entropy_(self.logits(h, buffer), t, 0.0) for h, t, buffer in chunks]
        return _weighted(torch.cat([hidden.new_zeros(0, dtype=torch.float32), *losses])[: len(targets)], weights)

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

    def _panels(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight in `dtype`, in panels of `panel_rows`, each used before the next is asked for."""
        rows, (vocabulary, width) = self.panel_rows(dtype), self.weight.shape
        room = None
        if self.weight.dtype != dtype:
            room = self._room("panel", (min(rows, vocabulary), width), dtype, self.device)
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
        return self.rules.chunk_rows(self.vocabulary * (itemsize if self._is_plain else 8))

    def chunks(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows, targets and room for the logits, chunk by chunk; the last is filled up with rows of zeros that have no
        target.
        """
        missing = -len(targets) % self.rules.row_multiple
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
        factor: Tensor,
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of a chunk `(C,)` fp32, and factor · d(their sum)/d(hidden) `(C, hidden)`, and /d(product)
        `(C, vocabulary)`, which lies in `buffer` or beside it; the factor is fp64 [].
        """
        logits = self._logits(hidden, buffer, low, b)
        slope = None if self.softcap is None else 1 - (logits / self.softcap).square()
        read = self.regularisers.read(logits, targets) if self.regularisers.of_loss else None
        scaled = (factor * self.scale).float()
        losses = cross_entropy_(logits, targets, scaled)  # logits now holds the gradient
        if read is not None:
            self.regularisers.add_(losses, logits, targets, read, scaled)
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
        denominator: Denominator,
        weights: Tensor | None = None,
        low: Tensor | None = None,
        b: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> Tensor:
        if not any(each is not None and each.requires_grad for each in (hidden, low, matrix)):
            return (as_double(head.token_losses(hidden, targets, weights)).sum() / denominator).float()
        total = torch.zeros((), dtype=wide_dtype(hidden.device), device=hidden.device)
        factor = 1 / (torch.full_like(total, denominator) if isinstance(denominator, float | int) else denominator)
        grads, grads_low = [hidden[:0]], []
        grad_b = None if b is None else torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        grad_matrix = None if matrix is None else torch.zeros_like(matrix, dtype=torch.float32)
        missing = -len(targets) % head.rules.row_multiple  # as the chunks are filled up
        left = None if low is None else F.pad(low, (0, 0, 0, missing))
        left_weights = None if weights is None else F.pad(weights, (0, missing))
        for h, t, buffer in head.chunks(hidden, targets):
            part, left = _take(left, len(h))
            w, left_weights = _take(left_weights, len(h))
            losses, grad, grad_product = head.loss_and_gradient(h, t, buffer, factor, part, b)
            total += as_double(_weighted(losses, w)).sum()
            grads.append(_weighted(grad, w))
            if part is not None and b is not None and grad_b is not None:
                grads_low.append(_weighted(grad_product @ b, w))  # (C, vocabulary) -> (C, r)
                grad_b += grad_product.T @ _weighted(part, w)
            if grad_matrix is not None:
                _add_product(grad_matrix, grad_product, _weighted(h, w), head.rules.panel_rows)
        grad_b = None if b is None or grad_b is None else grad_b.to(b.dtype)
        grad_low = None if low is None else torch.cat([low[:0], *grads_low])[: len(targets)]
        ctx.save_for_backward(torch.cat(grads)[: len(targets)], grad_low, grad_b, grad_matrix)
        return (total / denominator).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors]
        grad_hidden, grad_low, grad_b, grad_matrix = scaled
        return grad_hidden, None, None, None, None, grad_low, grad_b, grad_matrix


def _is_trained(weight: Tensor | HeadMatrix) -> bool:
    """Whether it gets a gradient; what lies on a disk never does."""
    return isinstance(weight, Tensor) and weight.requires_grad


def _add_product(total: Tensor, left: Tensor, right: Tensor, panel_rows: int) -> None:
    """total += leftᵀ · right; where that is in fp32 and they are not, so many rows at a time."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    for rows, columns in zip(total.split(panel_rows), left.split(panel_rows, dim=1), strict=True):
        rows += columns.T @ right


def _take(rows: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The first so many rows, and the others; there may be none at all."""
    return (None, None) if rows is None else (rows[:count], rows[count:])


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Each row `(N, ..)` times its weight `(N,)`, in its dtype; as they are without weights."""
    if weights is None:
        return rows
    return (rows * weights.view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)


# ---- the model's own -----------------------------------------------------------------------------


class OwnHead:
    """Whatever a model does from its last states to its logits: its own forward, its decoder set aside.

    A chunk of logits exists at a time; backward computes it again. Adapters in the head get their gradients.
    """

    def __init__(self, model: "PreTrainedModel", regularisers: Regularisers = PLAIN):
        self.model, self.regularisers = model, regularisers
        decoder = decoder_of(model)
        self._decoder = next(name for name, module in model.named_modules() if module is decoder)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def with_regularisers(self, regularisers: Regularisers) -> "OwnHead":
        """As `Head` says."""
        return OwnHead(self.model, regularisers)

    def loss(self, hidden: Tensor, targets: Tensor, denominator: Denominator, weights: Tensor | None = None) -> Tensor:
        """As `Head` says."""
        total = as_double(hidden.sum()) * 0  # a graph, and a zero, where no row is supervised
        left = None if weights is None else weights.detach()
        for h, t in self._chunks(hidden, targets):
            w, left = _take(left, len(h))
            part = checkpoint(
                self._chunk_losses, h, t, self.regularisers, use_reentrant=False, preserve_rng_state=False
            )
            total = total + as_double(_weighted(part, w)).sum()
        return (total / denominator).float()

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """As `Head` says."""
        losses = [self._chunk_losses(h, t) for h, t in self._chunks(hidden, targets)]
        return _weighted(torch.cat([hidden.new_zeros(0, dtype=torch.float32), *losses]), weights)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project states `(N, hidden)` onto the vocabulary: `(N, vocabulary)`."""
        with self._given(hidden[None]):
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits

    def chunk_rows(self, itemsize: int) -> int:
        """Rows of a chunk: logits, and they in fp32."""
        return SHAPE_RULES[self.device.type].chunk_rows((itemsize + 4) * self.vocabulary)

    @contextmanager
    def _given(self, states: Tensor) -> Iterator[None]:
        """Within the block the model's decoder gives these states, `(1, N, hidden)`."""
        decoder = self.model.get_submodule(self._decoder)
        self.model.set_submodule(self._decoder, _GivenStates(decoder, states))
        try:
            yield
        finally:
            self.model.set_submodule(self._decoder, decoder)

    def _chunk_losses(self, hidden: Tensor, targets: Tensor, regularisers: Regularisers = PLAIN) -> Tensor:
        return regularisers.losses(self.logits(hidden).float(), targets)

    def _chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.chunk_rows(hidden.dtype.itemsize)
        yield from zip(hidden.split(rows), targets.split(rows), strict=True) if len(targets) else ()


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """What a causal language model's head is set on: a module within it that has the input embedding.

    transformers' own lookups give the model itself, or its output matrix, for some families.

    Raises:
        ModelError: there is none.
    """
    embedding = model.get_input_embeddings()
    for part in (model.get_decoder(), model.base_model, *model.children()):
        if part is not model and part is not embedding and any(module is embedding for module in part.modules()):
            return part
    raise ModelError(
        f"{type(model).__name__} has no decoder apart from its head.",
        "Allowed: causal language models of transformers that are made of a decoder and a head.",
    )


class _GivenStates(nn.Module):
    """Stands for a decoder whose last states are known; what else is read off it is its own."""

    def __init__(self, decoder: nn.Module, states: Tensor):
        super().__init__()
        self.states, self._decoder = states, (decoder,)  # in a tuple: it is no module of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> "_Output":
        return _Output(last_hidden_state=self.states)


class _Output(BaseModelOutputWithPast):
    """A decoder's output; whatever else some decoder has in its own, this one has not."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def is_plain(output: nn.Module) -> bool:
    """Whether a model's output head is a matrix in memory or on disk, with an adapter or without, or trained whole."""
    base = output.base if isinstance(output, LoraLinear | TokenLogits | TrainedModule) else output
    return isinstance(base, nn.Linear | StreamedHead)


def loss_head(model: "PreTrainedModel") -> Head:
    """The head of a transformers causal language model: linear, with a scale and a cap if the model has them, where
    that gives what the model's own forward gives; else the own forward, as of one that is trained whole.

    Raises:
        ModelError: the model has no output head, or no decoder apart from it.
    """
    output: Any = model.get_output_embeddings()
    if output is None:
        raise ModelError(
            f"{type(model).__name__} has no output head.", "Allowed: causal language models with a linear head."
        )
    own = OwnHead(model)
    adapter = output if isinstance(output, LoraLinear | TokenLogits) else None
    linear: Any = output if adapter is None else adapter.base
    if not is_plain(output) or isinstance(output, TrainedModule):
        return own
    weight = master_of(linear)
    if linear.bias is not None and _is_trained(weight):
        return own  # through which a bias gets its gradient
    width = weight.shape[1]
    if getattr(model.config.get_text_config(), "hidden_size", width) != width:
        return own
    was_training = output.training
    output.eval()  # nothing is dropped while it is measured
    head = _linear_head(LossHead(weight, linear.bias, adapter=adapter), own, width)
    output.train(was_training)
    return head or own


@torch.no_grad()
def _linear_head(plain: LossHead, own: OwnHead, width: int) -> LossHead | None:
    """The plain head, with a scale or a cap, whose logits are the model's own, on states of very different sizes."""
    probe_ids = torch.zeros(1, 1, dtype=torch.long, device=own.device)
    dtype = own.model.get_input_embeddings()(probe_ids).dtype
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(PROBED_STATES).repeat_interleave(STATES_OF_A_SIZE)[:, None]
    states = (torch.randn(len(sizes), width, generator=generator) * sizes).to(own.device, dtype)
    with foreign_errors(partial(_needs_more, own.model)):
        wanted = as_double(own.logits(states))
    product = as_double(plain.logits(states))
    small, large = slice(0, STATES_OF_A_SIZE), slice(-STATES_OF_A_SIZE, None)
    scale = float((product[small] * wanted[small]).sum() / product[small].square().sum())
    cap = float(wanted[large].abs().max())
    scaled = replace(plain, scale=scale)
    for candidate in (plain, scaled, replace(plain, softcap=cap), replace(scaled, softcap=cap)):
        if _agree(as_double(candidate.logits(states)), wanted, dtype):
            return candidate
    return None


def _needs_more(model: "PreTrainedModel", error: Exception) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not make its logits of its decoder's last states alone: {first_line(error)}",
        "Allowed: causal language models whose logits come from their decoder's last states, token by token.",
        "Choose another model.",
    )


def _agree(logits: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by the roundings of `dtype` only, row by row: by no factor, which averages out of noise."""
    norms = wanted.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    factors = (logits * wanted).sum(dim=1) / norms.square()
    rounding = max(1e-5, torch.finfo(dtype).eps)
    return bool(
        ((logits - wanted).norm(dim=1) <= rounding * norms).all() and ((factors - 1).abs() <= rounding / 8).all()
    )
