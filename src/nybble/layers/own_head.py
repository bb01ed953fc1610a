"""What a model does between its last states and its logits, asked of its own forward, its decoder set aside.

It is not read from its config: where it is c · tanh(s · (W·x + b) / c), `LossHead` computes it, else the own forward
does, a chunk at a time (`OwnHead`). `loss_head` decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from nybble.errors import ModelError, first_line, foreign_errors
from nybble.kernels.hardware import as_double
from nybble.layers.dense import input_embedding, is_encoder_decoder
from nybble.layers.full_weights import master_of
from nybble.layers.lora import LoraLinear
from nybble.layers.loss_head import (
    Criterion,
    Denominator,
    Head,
    LossHead,
    is_trained,
    joined,
    take_rows,
    weighted,
)
from nybble.layers.regularisers import PLAIN, Regularisers
from nybble.layers.streamed import StreamedHead
from nybble.layers.token_rows import TokenLogits
from nybble.layers.trained import TrainedModule
from nybble.sizes import SHAPE_RULES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBED_STATES = (2.0**-10, 1.0, 8.0, 64.0, 2.0**20)  # sizes of the states a head is asked about: a cap shows at last
STATES_OF_A_SIZE = 2


class OwnHead(Head):
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

    def judge(
        self,
        criterion: Criterion,
        hidden: Tensor,
        targets: Tensor,
        denominator: Denominator,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Head` says."""
        total = as_double(hidden.sum()) * 0  # a graph, and a zero, where no row is supervised
        left = None if weights is None else weights.detach()
        found: list[Tensor] = []
        for h, t, own in self._chunks(hidden, targets, criterion):
            w, left = take_rows(left, len(h))
            part = checkpoint(self._chunk_losses, h, t, own, use_reentrant=False, preserve_rng_state=False)
            total = total + as_double(weighted(part[0], w)).sum()
            found.append(part.detach())
        return (total / denominator).float(), joined(found, hidden, criterion)[1:]

    @torch.no_grad()
    def figures(self, criterion: Criterion, hidden: Tensor, targets: Tensor) -> Tensor:
        """As `Head` says."""
        found = [self._chunk_losses(h, t, own) for h, t, own in self._chunks(hidden, targets, criterion.plain)]
        return joined(found, hidden, criterion)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project states `(N, hidden)` onto the vocabulary: `(N, vocabulary)`."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        asked: dict[str, Any] = {"input_ids": ids}
        if is_encoder_decoder(self.model):
            read = _Output(last_hidden_state=hidden[None])  # any states: the decoder is aside
            asked = {"decoder_input_ids": ids, "encoder_outputs": read}
        with self._given(hidden[None]):
            logits: Tensor = self.model(**asked, use_cache=False).logits[0]
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

    def _chunk_losses(self, hidden: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
        return criterion.losses(self.logits(hidden).float(), targets)

    def _chunks(
        self, hidden: Tensor, targets: Tensor, criterion: Criterion
    ) -> Iterator[tuple[Tensor, Tensor, Criterion]]:
        """States, targets and what is asked of them, a chunk at a time."""
        rows = self.chunk_rows(hidden.dtype.itemsize)
        for first in range(0, len(targets), rows):
            h, t = hidden[first : first + rows], targets[first : first + rows]
            yield h, t, criterion.of_rows(first, len(t))


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """What a causal language model's head is set on: a module within it that has the input embedding.

    transformers' own lookups give the model itself, or its output matrix, for some families.

    Raises:
        ModelError: there is none.
    """
    embedding = input_embedding(model)
    if is_encoder_decoder(model):
        decoder: nn.Module = model.get_decoder()
        return decoder
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
    if linear.bias is not None and is_trained(weight):
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
    dtype = input_embedding(own.model)(probe_ids).dtype
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
