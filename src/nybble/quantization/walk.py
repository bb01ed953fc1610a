"""Calibration windows on their way through a model, one block at a time, one group of linears after the other.

A walk holds the hidden states of all windows. For a block it gives the linears in the order in which they are used,
those that share an input together, each group with the statistics of that input; the caller puts the group into four
bits before it asks for the next, so that every layer is calibrated on what it will really get. When a block is through,
the states are its outputs.

`PackedWalk` computes through nybble's decoder blocks and passes a block once. `ModuleWalk` runs any transformers
decoder layer whose forward takes hidden states and gives hidden states; it passes a block twice, and the linears of
one block do not see each other quantised. Experts (`expert_products.py`) come after the linears, in as many passes more
as their statistics need, each with those of the tokens that were sent to it.

Where `exact` is asked for, the states of the 16-bit model are carried beside for half of the text, so that the
statistics know how far the inputs have moved; that costs a third of the time, and the other half would add little.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from nybble.calibration.statistics import InputStatistics
from nybble.errors import ModelError
from nybble.families import family_of
from nybble.layers.backbone import why_not_forward
from nybble.layers.convert import is_linear
from nybble.layers.decoder_block import DecoderBlock
from nybble.layers.dense import weight_matrix
from nybble.layers.expert_products import ExpertMatrices, Routed
from nybble.layers.layer_input import Beside, beside_states
from nybble.layers.mixture_block import block_of
from nybble.layers.packed_rows import PackedSequences, rotary_angles, scaled_embeddings
from nybble.layers.projection import DenseWeights
from nybble.layers.streamed import expert_name
from nybble.quantization.watch import watched
from nybble.sizes import CALIBRATION_KEPT_BYTES, CALIBRATION_TOKENS, EXPERT_STATISTICS_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES_DTYPE = torch.bfloat16  # of hidden states between two blocks; `CALIBRATION_STATE_BYTES` is its size
EXACT_EVERY = 2  # of so many chunks, or windows, the 16-bit model's states are carried for the first

Group = tuple[tuple[str, ...], InputStatistics]  # names of linears within the block, statistics of their input


class Walk(Protocol):
    """What both walks offer.

    Attributes:
        states: hidden states before the next block.
        exact: those of the 16-bit model for a part of the text, or None.
    """

    states: Tensor
    exact: Tensor | None

    def groups(self, index: int, layer: nn.Module) -> Iterator[Group]:
        """The groups of block `index`; between two of them the caller quantises the linears of the first, in place.

        Args:
            layer: the block with its dense weights.
        """


def start_walk(model: "PreTrainedModel", windows: Tensor, exact: bool, blocks: nn.ModuleList) -> Walk:
    """The walk for this model.

    Args:
        model: everything outside its blocks is loaded; the blocks may be on the meta device.
        windows: int64 `(windows, tokens)`.
        exact: carry the 16-bit model's states too.
        blocks: the model's decoder layers.

    Raises:
        WalkError: the model's layers do not take and give hidden states one after the other.
    """
    if why_not_forward(model) is None:
        return PackedWalk(model, windows, exact)
    return ModuleWalk(model, windows, exact, blocks)


class WalkError(ModelError):
    """A model's layers cannot be run one by one. Who was asked to calibrate says so; who chose to does without.

    Args:
        reason: half a sentence.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(
            f"The model cannot be calibrated: {reason}.",
            "Calibrating passes text through one layer after the other.",
            "Take --quality search or --quality absmax, which look at the weights alone.",
        )


class PackedWalk:
    """Through nybble's decoder blocks, some windows side by side at a time. States are `(tokens of all, hidden)`, in 16
    bits.
    """

    def __init__(self, model: "PreTrainedModel", windows: Tensor, exact: bool):
        self._model, self._ids = model, windows.reshape(-1)
        self._config = model.config.get_text_config()
        self._weights = DenseWeights()
        per_chunk = max(1, CALIBRATION_TOKENS // windows.shape[1])
        self._chunks: list[_Chunk] = []
        exact_tokens = 0
        for start in range(0, len(windows), per_chunk):
            count = len(windows[start : start + per_chunk])
            positions = torch.arange(windows.shape[1]).repeat(count)[None]  # (1, tokens)
            borders = torch.arange(count + 1, dtype=torch.int32) * windows.shape[1]
            tokens = slice(start * windows.shape[1], (start + count) * windows.shape[1])
            rows = PackedSequences(rotary_angles(model, positions), borders, max_length=windows.shape[1])
            carried = None
            if exact and len(self._chunks) % EXACT_EVERY == 0:
                carried = slice(exact_tokens, exact_tokens + positions.shape[1])
                exact_tokens = carried.stop
            self._chunks.append(_Chunk(tokens, _Windows(rows), _Windows(rows), carried))
        ids, embedding = self._ids, model.base_model.embed_tokens
        self.states = torch.empty(len(ids), self._config.hidden_size, dtype=STATES_DTYPE)
        for chunk in self._chunks:
            self.states[chunk.tokens] = scaled_embeddings(model, embedding(ids[chunk.tokens])).to(STATES_DTYPE)
        parts = [self.states[chunk.tokens] for chunk in self._chunks if chunk.exact is not None]
        self.exact = torch.cat(parts) if parts else None

    def groups(self, index: int, layer: nn.Module) -> Iterator[Group]:
        exact = None if self.exact is None else self._block(layer)  # keeps the 16-bit linears
        family = family_of(self._config)
        assert family is not None, self._config.model_type
        family = family.of_layer(self._config, index)
        if family.layer_input:
            self._read_inputs(index)
        attention, mlp = (family.o, _attend, _add_attention), (family.down, _gate, _add_mlp)
        if family.parallel:
            yield self._group(layer, exact, (*family.qkv, *family.gate_up), _attention_input)
            yield from self._groups_and_step(layer, exact, attention, mlp)
        else:
            yield self._group(layer, exact, family.qkv, _attention_input)
            yield from self._groups_and_step(layer, exact, attention)
            yield self._group(layer, exact, family.gate_up, _mlp_input)
            yield from self._groups_and_step(layer, exact, mlp)
        if family.layer_input:
            gate, project, _ = family.layer_input
            yield self._group(layer, exact, (gate,), _states)
            yield from self._groups_and_step(layer, exact, (project, _gate_own_input, _add_own_input))
        self._finish(layer, exact)

    def _read_inputs(self, index: int) -> None:
        """What the layer at work is given beside the states."""
        embedding = self._model.base_model.embed_tokens
        for chunk in self._chunks:
            ids = self._ids[chunk.tokens]
            given = beside_states(self._model, ids, embedding(ids)).input_of(index)
            assert given is not None
            chunk.now.given = chunk.exactly.given = given.to(STATES_DTYPE, copy=True)

    def _finish(self, layer: nn.Module, exact: DecoderBlock | None) -> None:
        """What a layer does with its result, once what it gives to later ones is there."""
        block = self._block(layer)
        if block.factor != 1.0:
            self.states.mul_(block.factor)
            if self.exact is not None:
                self.exact.mul_(block.factor)

    def _block(self, layer: nn.Module) -> DecoderBlock:
        return block_of(layer, self._config, self._weights)

    def _group(self, layer: nn.Module, exact: DecoderBlock | None, names: Sequence[str], inputs: "Inputs") -> Group:
        """Statistics of what `inputs` gives, chunk by chunk."""
        block = self._block(layer)
        weights = {name: weight_matrix(layer.get_submodule(name)) for name in names}
        statistics: InputStatistics | None = None
        for chunk in self._chunks:
            x = inputs(block, chunk.now, self.states[chunk.tokens])
            statistics = statistics or InputStatistics(x.shape[1])
            statistics.add(x)
            if exact is not None and self.exact is not None and chunk.exact is not None:
                undisturbed = inputs(exact, chunk.exactly, self.exact[chunk.exact])
                for name, weight in weights.items():
                    statistics.add_drift(name, weight, x, undisturbed)
        assert statistics is not None
        return tuple(weights), statistics

    def _groups_and_step(
        self, layer: nn.Module, exact: DecoderBlock | None, *parts: tuple[str, "Inputs", "Step"]
    ) -> Iterator[Group]:
        """Groups of one linear each, whose inputs come of the same states, and once they are quantised the steps from
        their inputs to the next states.

        The inputs of all tokens may be far larger than their states: those that CALIBRATION_KEPT_BYTES have no
        room for are computed twice.
        """
        kept = [_Kept(inputs, CALIBRATION_KEPT_BYTES // len(parts)) for _, inputs, _ in parts]
        for (name, _, _), each in zip(parts, kept, strict=True):
            yield self._group(layer, exact, (name,), each.make)
        steps = [step for _, _, step in parts]
        block = self._block(layer)
        for chunk in self._chunks:
            _advance(block, chunk.now, self.states[chunk.tokens], kept, steps)
            if exact is not None and self.exact is not None and chunk.exact is not None:
                _advance(exact, chunk.exactly, self.exact[chunk.exact], kept, steps)


@dataclass
class _Windows:
    """What blocks read of windows that are computed at once, beside their states.

    Args:
        rows: where they lie.
        beside: keys and values that later layers read.
        given: what the layer at work is given of each token, `(tokens, width)`.
    """

    rows: PackedSequences
    beside: Beside = field(default_factory=Beside)
    given: Tensor | None = None


Inputs = Callable[[DecoderBlock, _Windows, Tensor], Tensor]  # (block, windows, states) -> inputs (tokens, in)
Step = Callable[[DecoderBlock, Tensor, Tensor], None]  # (block, inputs, states): the states move on, in place


@dataclass(frozen=True)
class _Chunk:
    """Windows that are computed at once: their states, what is read beside them, now and in 16 bits, and their part of
    the exact states.
    """

    tokens: slice
    now: _Windows
    exactly: _Windows
    exact: slice | None


class _Kept:
    """Inputs of a linear that are needed twice, as many of them as `room` holds, in bytes."""

    def __init__(self, inputs: Inputs, room: int):
        self._inputs, self._room = inputs, room
        self._made: dict[int, Tensor] = {}  # by where the chunk's states lie

    def make(self, block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
        made = self._inputs(block, windows, states)
        if made.nbytes <= self._room:
            self._room -= made.nbytes
            self._made[states.data_ptr()] = made
        return made

    def take(self, block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
        made = self._made.pop(states.data_ptr(), None)
        return self._inputs(block, windows, states) if made is None else made


def _advance(
    block: DecoderBlock, windows: _Windows, states: Tensor, kept: Sequence[_Kept], steps: Sequence[Step]
) -> None:
    """The states after all steps, whose inputs come of the states before any, in place."""
    inputs = [each.take(block, windows, states) for each in kept]
    for step, each in zip(steps, inputs, strict=True):
        step(block, each, states)


def _attention_input(block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
    return block.attention_input(states.to(block.dtype))[0]


def _attend(block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
    inputs = _attention_input(block, windows, states)
    heads = block.queries_keys_values(inputs, windows.rows.angles, block.reads(windows.beside))
    block.leave(windows.beside, heads.qkv)  # the last time with the linears as they stay
    return block.attend(heads.qkv, windows.rows)[0]


def _add_attention(block: DecoderBlock, attended: Tensor, states: Tensor) -> None:
    states.copy_(block.attention_output(attended, states.to(attended.dtype))[0])


def _mlp_input(block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
    return block.mlp_input(states.to(block.dtype))[0]


def _gate(block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
    return block.gate(_mlp_input(block, windows, states))[0]


def _add_mlp(block: DecoderBlock, gated: Tensor, states: Tensor) -> None:
    states.copy_(block.mlp_output(gated, states.to(gated.dtype))[0])


def _states(block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
    return states.to(block.dtype)


def _gate_own_input(block: DecoderBlock, windows: _Windows, states: Tensor) -> Tensor:
    assert block.layer_input is not None and windows.given is not None
    return block.layer_input.gated(states.to(block.dtype), windows.given.to(block.dtype))


def _add_own_input(block: DecoderBlock, gated: Tensor, states: Tensor) -> None:
    assert block.layer_input is not None
    states.copy_(block.layer_input.output(gated, states.to(gated.dtype))[0])


class ModuleWalk:
    """Through the model's own layers, one window at a time. States are `(windows, tokens, hidden)`."""

    def __init__(self, model: "PreTrainedModel", windows: Tensor, exact: bool, blocks: nn.ModuleList):
        states, self._arguments = _enter(model, windows, blocks)
        self.states = torch.cat(states)
        self.exact = self.states[::EXACT_EVERY].clone() if exact else None

    def groups(self, index: int, layer: nn.Module) -> Iterator[Group]:
        recorder = _Recorder()
        with watched({name: each for name, each in layer.named_modules() if is_linear(each)}, recorder.see):
            for window in range(len(self.states)):
                if self.exact is not None and window % EXACT_EVERY == 0:
                    carried = window // EXACT_EVERY
                    with recorder.exact_inputs():
                        self.exact[carried] = self._run(index, layer, self.exact[carried])
                self._run(index, layer, self.states[window])
        yield from recorder.groups()
        for stack, experts in _expert_chunks(layer):
            routed = _RoutedRecorder(experts, layer.get_submodule(stack))
            with watched({stack: layer.get_submodule(stack)}, routed.see):
                for window in range(len(self.states)):
                    self._run(index, layer, self.states[window])
            yield from routed.groups(stack)
        for window in range(len(self.states)):
            self.states[window] = self._run(index, layer, self.states[window])

    def _run(self, index: int, layer: nn.Module, states: Tensor) -> Tensor:
        arguments, keywords = self._arguments[index]
        output = layer(states[None], *arguments, **keywords)
        return (output[0] if isinstance(output, tuple) else output)[0]


class _Recorder:
    """What the linears of one layer got. Linears that are given one and the same tensor form a group."""

    def __init__(self) -> None:
        self._exact: dict[str, Tensor] = {}  # name -> input from the 16-bit states of the window that passes
        self._takes_exact = False
        self._statistics: dict[str, InputStatistics] = {}
        self._last: tuple[Tensor, InputStatistics] | None = None

    @contextmanager
    def exact_inputs(self) -> Iterator[None]:
        """Within the block, what is seen are inputs from the 16-bit states."""
        self._exact, self._takes_exact = {}, True
        yield
        self._takes_exact = False

    def see(self, name: str, linear: nn.Module, x: Tensor, y: Tensor) -> None:
        if self._takes_exact:
            self._exact[name] = x
            return
        if self._last is None or self._last[0] is not x:
            statistics = self._statistics.get(name) or InputStatistics(x.shape[-1], x.device)
            statistics.add(x.flatten(0, -2))
            self._last = (x, statistics)
        statistics = self._statistics.setdefault(name, self._last[1])
        exact = self._exact.pop(name, None)
        if exact is not None:
            statistics.add_drift(name, weight_matrix(linear), x.flatten(0, -2), exact.flatten(0, -2))

    def groups(self) -> list[Group]:
        names: dict[int, list[str]] = {}
        for name, statistics in self._statistics.items():
            names.setdefault(id(statistics), []).append(name)
        return [(tuple(group), self._statistics[group[0]]) for group in names.values()]


def _expert_chunks(layer: nn.Module) -> Iterator[tuple[str, range]]:
    """Projections of experts in the order in which they are used, and the experts whose statistics there is room for
    together.
    """
    stacks = [name for name, module in layer.named_modules() if isinstance(module, ExpertMatrices)]
    for stack in stacks:
        matrices: Any = layer.get_submodule(stack)
        together = max(1, EXPERT_STATISTICS_BYTES // (4 * matrices.in_features**2))
        for first in range(0, matrices.num_experts, together):
            yield stack, range(first, min(first + together, matrices.num_experts))


class _RoutedRecorder:
    """What some experts of a projection got: each the tokens that were sent to it."""

    def __init__(self, experts: range, matrices: Any):
        self._experts, self._in_features = experts, matrices.in_features
        self._statistics: dict[int, InputStatistics] = {}

    def see(self, name: str, matrices: nn.Module, routed: Routed, y: Tensor) -> None:
        ends = list(accumulate(routed.counts, initial=0))
        for expert in self._experts:
            rows = routed.x[ends[expert] : ends[expert + 1]]
            if len(rows):
                if expert not in self._statistics:
                    self._statistics[expert] = InputStatistics(self._in_features, rows.device)
                self._statistics[expert].add(rows)

    def groups(self, stack: str) -> Iterator[Group]:
        """Each expert's; those of experts that got nothing are empty."""
        for expert in self._experts:
            statistics = self._statistics.pop(expert, None)
            yield (expert_name(stack, expert),), statistics or InputStatistics(self._in_features)


class _OtherOutputError(Exception):
    """The model read something else off a layer's output than hidden states: it expects the other form."""


class _Catcher(nn.Module):
    """Stands for a decoder layer: notes what it is called with, and hands the hidden states on.

    Args:
        layer: whose attributes the model may ask for, such as those by which it chooses among its masks.
        before: the layer before it, whose hidden states it must be given.
    """

    def __init__(self, layer: nn.Module, as_tuple: bool, before: "_Catcher | None"):
        super().__init__()
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self.as_tuple = as_tuple
        self._layer, self._before = [layer], [before]  # in lists: they are no modules of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        before = self._before[0]
        if before is not None and not (before.calls and hidden_states is before.calls[-1][0]):
            raise _OtherOutputError
        self.calls.append((hidden_states, arguments, keywords))
        return (hidden_states,) if self.as_tuple else hidden_states


Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _enter(model: "PreTrainedModel", windows: Tensor, blocks: nn.ModuleList) -> tuple[list[Tensor], Arguments]:
    """Each window's states before the first block, and what else every block is called with (all windows alike).

    Raises:
        WalkError: the model does something else with its layers than to hand hidden states on.
    """
    failure: Exception | None = None
    for as_tuple in (False, True):
        catchers: list[_Catcher] = []
        for layer in blocks:
            catchers.append(_Catcher(layer, as_tuple, catchers[-1] if catchers else None))
        try:
            with _standing_in(blocks, catchers):
                for window in windows:
                    model.base_model(input_ids=window[None], use_cache=False)
        except _OtherOutputError as error:
            failure = error
            continue
        except (TypeError, ValueError, IndexError, AttributeError) as error:  # an output that could not be taken apart
            if not catchers[0].calls:
                raise  # the model failed by itself
            failure = error
            continue
        if all(len(catcher.calls) == len(windows) for catcher in catchers):
            first = catchers[0].calls
            return [states for states, _, _ in first], [catcher.calls[0][1:] for catcher in catchers]
    raise WalkError(f"the layers of {type(model).__name__} do not hand hidden states from one to the next") from failure


@contextmanager
def _standing_in(blocks: nn.ModuleList, catchers: Sequence[_Catcher]) -> Iterator[None]:
    layers = list(blocks)
    for i, catcher in enumerate(catchers):
        blocks[i] = catcher
    try:
        yield
    finally:
        for i, layer in enumerate(layers):
            blocks[i] = layer
