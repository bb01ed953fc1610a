"""Calibrated four-bit weights of a source, block after block; the 16-bit model never exists in memory.

In memory at a time: one block in the compute dtype, one weight as the source has it, the statistics of one group of
linears, and the windows' hidden states; before the first block, the embedding.
"""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.calibration.feedback import CalibratedWeight, FeedbackOptions, LayerInputs, calibrate_weight
from nybble.calibration.statistics import InputStatistics
from nybble.formats.quant_spec import BaseFormats
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.heap import trim_heap
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.convert import replace_linears
from nybble.layers.dense import replace_dense_ends
from nybble.layers.lora import linear_features
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.quantization.partial import LayerReport
from nybble.quantization.walk import Walk, WalkError, start_walk
from nybble.sources.load import fill_computed_buffers, load_dense
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    def run(self, index: int) -> tuple[dict[str, QuantizedTensor], list[LayerReport]]:
        """The weights of block `index` by parameter name, and how they came to be; blocks come in order."""
        name = self.blocks[index]
        layer = copy.deepcopy(self.model.get_submodule(name)).eval()
        for target in self.source.placements:
            if _is_in(target, name):
                leaf = target.removeprefix(f"{name}.")
                dtype = self.source.loaded_dtype(target, self.dtype, ())
                load_dense(layer, leaf, self.source.read_dense(target, dtype), dtype)
        linears = [linear.removeprefix(f"{name}.") for linear in self.source.linears if _is_in(linear, name)]
        weights: dict[str, QuantizedTensor] = {}
        reports: list[LayerReport] = []

        def take(group: Iterable[str], inputs: LayerInputs) -> None:
            for linear in group:
                weight = self.source.read_linear(f"{name}.{linear}")
                assert isinstance(weight, Tensor)
                spec = self.formats.of(f"{name}.{linear}")
                found = calibrate_weight(weight, inputs, spec, self.options, linear)
                weights[f"{name}.{linear}.weight"] = found.tensor
                reports.append(_report(f"{name}.{linear}", weight, found))
                _swap(layer, linear, found.tensor, self.dtype)

        for group, statistics in self.walk.groups(index, layer):
            trim_heap()  # what the text left behind in pieces
            take(group, LayerInputs(statistics, self.formats.spec.block_size, self.options))
            del statistics  # before the text goes on
        for linear in linears:
            if f"{name}.{linear}.weight" not in weights:  # never called
                in_features, _ = linear_features(layer.get_submodule(linear))
                inputs = LayerInputs(InputStatistics(in_features), self.formats.spec.block_size, self.options)
                take([linear], inputs)
        return weights, reports


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


def _is_in(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")
