"""Calibrated four-bit weights of a source, block after block; the 16-bit model never exists in memory.

In memory at a time: one block in the compute dtype, one weight as the source has it, the statistics of one group of
linears, and the windows' hidden states; before the first block, the embedding.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.calibration.feedback import CalibratedWeight, FeedbackOptions, LayerInputs, calibrate_weight
from nybble.calibration.search import search_weight
from nybble.calibration.statistics import InputStatistics
from nybble.formats.quant_spec import BaseFormats
from nybble.formats.quantized_stack import QuantizedStack
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.heap import trim_heap
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.convert import replace_linears
from nybble.layers.dense import replace_dense_ends
from nybble.layers.lora import linear_features
from nybble.layers.quantized_experts import IMPLEMENTATION, DenseExperts, QuantizedExperts, swap_experts
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.streamed import expert_name
from nybble.quantization.partial import LayerReport
from nybble.quantization.walk import Walk, WalkError, start_walk
from nybble.sources.load import fill_computed_buffers, load_dense
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LEAST_ROWS = 1 / 8  # of its width: an expert that fewer of the text's tokens reached is not calibrated on them


class BlockCalibrator:
    """Calibrates the blocks of a source in order.

    Args:
        formats: of the linears.
        windows: int64 `(windows, tokens)`, the calibration text.
        compute_dtype: of the hidden states and products.

    Attributes:
        walk: the hidden states before the next block.

    Raises:
        WalkError: the model's layers cannot be run one by one.
    """

    def __init__(
        self,
        source: StoredModel,
        formats: BaseFormats,
        windows: Tensor,
        compute_dtype: torch.dtype,
        options: FeedbackOptions | None = None,
    ):
        self.source, self.formats, self.dtype = source, formats, compute_dtype
        self.options = options or FeedbackOptions()
        self.model = source.empty_model(compute_dtype)
        if source.experts:
            self.model.set_experts_implementation(IMPLEMENTATION)
        self.blocks = source.blocks
        owner = {name.rpartition(".")[0] for name in self.blocks}
        if len(owner) != 1:
            raise WalkError(f"{type(self.model).__name__} has its layers in {len(owner)} lists")
        _load_outside(source, self.model, compute_dtype)
        layers: Any = self.model.get_submodule(owner.pop())
        with torch.no_grad():
            self.walk: Walk = start_walk(self.model, windows, self.options.shift > 0, layers)
        _forget_ends(self.model)

    @torch.no_grad()
    def run(self, index: int) -> tuple[dict[str, QuantizedTensor | QuantizedStack], list[LayerReport]]:
        """The weights of block `index` by parameter name, and how they came to be; blocks come in order."""
        name = self.blocks[index]
        layer = copy.deepcopy(self.model.get_submodule(name)).eval()
        for target in self.source.placements:
            if _is_in(target, name):
                leaf = target.removeprefix(f"{name}.")
                dtype = self.source.loaded_dtype(target, self.dtype, ())
                load_dense(layer, leaf, self.source.read_dense(target, dtype), dtype)
        work = _BlockWork(self, name, layer)
        for group, statistics in self.walk.groups(index, layer):
            trim_heap()  # what the text left behind in pieces
            work.take(group, statistics)
            del statistics  # before the text goes on
        work.take_uncalled()
        return work.weights, work.reports


class _BlockWork:
    """A block on its way into four bits, in place.

    Args:
        name: of the block in the model.
        layer: with dense weights.

    Attributes:
        weights: those that are done, by parameter name.
        reports: how they came to be.
    """

    def __init__(self, calibrator: BlockCalibrator, name: str, layer: nn.Module):
        self._source, self._formats, self._options = calibrator.source, calibrator.formats, calibrator.options
        self._dtype, self._name, self._layer = calibrator.dtype, name, layer
        self._linears = set(calibrator.source.linears)
        self.weights: dict[str, QuantizedTensor | QuantizedStack] = {}
        self.reports: list[LayerReport] = []
        self._experts = {n.removeprefix(f"{name}."): s for n, s in calibrator.source.experts.items() if _is_in(n, name)}
        self._done: dict[str, list[QuantizedTensor]] = {stack: [] for stack in self._experts}
        for stack, shape in self._experts.items():
            swap_experts(layer, {stack: DenseExperts(_module(layer, stack), shape)})

    def take(self, group: Sequence[str], statistics: InputStatistics) -> None:
        """Put linears that share their input, or one expert, into four bits."""
        stack, _, number = group[0].rpartition(".")
        block_size, rows = self._formats.spec.block_size, statistics.rows
        if stack not in self._experts:
            inputs = LayerInputs(statistics, block_size, self._options)
            for linear in group:
                if f"{self._name}.{linear}" in self._linears:  # others stay as they are
                    self._take_linear(linear, inputs)
            return
        width = self._experts[stack].in_features
        if rows < width * LEAST_ROWS:
            seen = f"{rows} of the text's tokens reached it; from {math.ceil(width * LEAST_ROWS)} on it is calibrated"
            self._take_expert(stack, int(number), None, seen)
        else:
            self._take_expert(stack, int(number), LayerInputs(statistics, block_size, self._options), "")

    def take_uncalled(self) -> None:
        """The linears that the text did not reach."""
        for linear in self._source.linears:
            if _is_in(linear, self._name) and f"{linear}.weight" not in self.weights:
                leaf = linear.removeprefix(f"{self._name}.")
                in_features, _ = linear_features(self._layer.get_submodule(leaf))
                self.take([leaf], InputStatistics(in_features))

    def _take_linear(self, linear: str, inputs: LayerInputs) -> None:
        name = f"{self._name}.{linear}"
        weight = self._source.read_linear(name)
        assert isinstance(weight, Tensor)
        found = calibrate_weight(weight, inputs, self._formats.of(name), self._options, linear)
        self.reports.append(_report(name, weight, found))
        self.weights[f"{name}.weight"] = found.tensor
        _swap(self._layer, linear, found.tensor, self._dtype)

    def _take_expert(self, stack: str, number: int, inputs: LayerInputs | None, note: str) -> None:
        """One expert, in their order; after the last one its projection computes with four bits."""
        name = f"{self._name}.{stack}"
        weight, spec = self._source.read_expert(name, number), self._formats.of(name)
        assert isinstance(weight, Tensor) and number == len(self._done[stack])
        if inputs is None:
            q = search_weight(weight, spec)
            report = weight_report(expert_name(name, number), "search", weight, q, note)
        else:
            found = calibrate_weight(weight, inputs, spec, self._options)
            q, report = found.tensor, _report(expert_name(name, number), weight, found)
        self.reports.append(report)
        self._done[stack].append(q)
        shape = self._experts[stack]
        if len(self._done[stack]) == shape.num:
            quantized = QuantizedStack.of(self._done.pop(stack), shape.num)
            self.weights[name] = quantized
            experts = QuantizedExperts(shape, spec, self._dtype, "meta")
            experts.load_stack(quantized)
            swap_experts(self._layer, {stack: experts})


def weight_report(name: str, method: str, weight: Tensor, q: QuantizedTensor, note: str = "") -> LayerReport:
    """The report of a layer without statistics: errors of the weight itself."""
    wide = weight.float()

    def error(tensor: QuantizedTensor) -> float:
        return float((wide - dequantize(tensor, torch.float32)).square().sum() / wide.square().sum())

    return LayerReport(name, method, error(quantize(weight, q.spec)), error(q), note)


def _report(name: str, weight: Tensor, found: CalibratedWeight) -> LayerReport:
    if found.method == "search":
        return weight_report(name, found.method, weight, found.tensor, found.note)
    return LayerReport(name, found.method, found.absmax_error, found.error, found.note)


def _load_outside(source: StoredModel, model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Load what hidden states meet before the first block; the head stays on the meta device unless it is tied."""
    fill_computed_buffers(model, "cpu")
    ends = source.ends
    head = model.get_output_embeddings()
    unneeded = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if source.dense_dtype != dtype:
        ends = replace_dense_ends(model, dtype)
    for target in source.placements:
        if target in unneeded or any(_is_in(target, block) for block in source.blocks):
            continue
        kept = source.loaded_dtype(target, dtype, ends)
        load_dense(model, target, source.read_dense(target, kept), kept)
    model.tie_weights()
    model.requires_grad_(False).eval()


def _forget_ends(model: "PreTrainedModel") -> None:
    """Free the embedding, and a head that is tied to it: hidden states are past the one and do not reach the other."""
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            end.to("meta")


def _swap(layer: nn.Module, name: str, q: QuantizedTensor, dtype: torch.dtype) -> None:
    """The named linear with this weight in four bits, in place."""
    bias: Any = layer.get_submodule(name).bias
    replace_linears(layer, [name], BaseFormats(q.spec), dtype)
    linear: Any = layer.get_submodule(name)
    assert isinstance(linear, QuantizedLinear)
    linear.load_quantized(q)
    if bias is not None:
        linear.bias = bias


def _module(layer: nn.Module, name: str) -> Any:
    """What the layer has under this name, module or parameter."""
    owner, _, leaf = name.rpartition(".")
    return getattr(layer.get_submodule(owner), leaf)


def _is_in(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")
