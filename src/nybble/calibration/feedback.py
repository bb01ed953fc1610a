"""Error feedback: each column is rounded in the light of what the columns before it lost (GPTQ, arXiv 2210.17323).

The loss is tr(Δ H Δᵀ), what an error Δ of the weight does to the layer's output over the calibration tokens. With
H⁻¹ = UᵀU, U upper triangular, columns are taken one after the other; what column j lost, e = (w_j - q_j) / U_jj, is
made good as far as the later columns can: w_k -= e U_jk. A block's scale is searched when its first column is reached,
on the weights as compensated by then, and rounded to the 8-bit grid before any level is chosen, so that the feedback
sees the values that will be stored.

Matrices stand transposed here, `(in, out)`, and in the order of rounding, so that columns of the weight that are
rounded together are rows that lie together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibration.hessian import Hessian
from nybble.calibration.search import STARTS, assemble, check_searchable, scale_grid, search_weight
from nybble.calibration.statistics import InputStatistics
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.calibration import MAX_ROWS, ScaleGrid, assign_columns, search_scales
from nybble.kernels.ops.four_bit import dequantize, quantize

NO_INPUTS = "its inputs were all zero"
NOT_FINITE = "its inputs were not finite"
MAX_DAMPINGS = 8  # tenfold each: beyond that H has no meaning
AT_ONCE = 2**22  # elements of a weight whose errors, or whose correction for drift, are computed at once


@dataclass(frozen=True)
class FeedbackOptions:
    """What was measured to win; ablations change it.

    Args:
        damping: added to H's diagonal, as a part of its mean.
        order: of the columns: "blocks" takes blocks, and the columns within a block, by falling diagonal of H;
            "natural" takes them as they stand.
        shift: how much of the drift of the inputs is corrected, 0 to 1.
        importance: what weighs the search for scales: "conditional" (1 / U_jj², the loss of an error that later
            columns make good) or "diagonal" (of H).
    """

    damping: float = 0.01
    order: str = "blocks"
    shift: float = 0.5
    importance: str = "diagonal"


@dataclass(frozen=True)
class CalibratedWeight:
    """A weight in four bits, and how it came to be.

    Args:
        tensor: the weight.
        error: of the layer's output, relative: tr(Δ H Δᵀ) / tr(W H Wᵀ); NaN where nothing was measured.
        absmax_error: what plain absmax would have lost.
        method: "calibrated", "weighted search" or "search".
        note: why it is not what was asked for, or what had to be done to H; empty where all went well.
    """

    tensor: QuantizedTensor
    error: float
    absmax_error: float
    method: str
    note: str = ""


def calibrate_weight(
    weight: Tensor, inputs: "LayerInputs", spec: QuantSpec, options: FeedbackOptions | None = None, linear: str = ""
) -> CalibratedWeight:
    """Put a linear layer's weight into four bits so that its output moves least.

    Args:
        weight: `(out, in)`, fp32, bf16 or fp16; not changed.
        inputs: of the layer, made with the same block size and options.
        linear: whose drift among those of the inputs is the layer's; it is used up.

    Raises:
        FormatError: values that are not finite, or a format with zero points.
    """
    check_searchable(spec.format)
    if inputs.note in (NO_INPUTS, NOT_FINITE):
        nothing = float("nan")
        return CalibratedWeight(search_weight(weight, spec), nothing, nothing, "search", inputs.note)
    if inputs.factored:
        q, method = _feed_back(weight, inputs, spec, options or FeedbackOptions(), linear), "calibrated"
    else:
        q, method = search_weight(weight, spec, inputs.diagonal), "weighted search"
    error, absmax = inputs.output_errors(weight, [q, quantize(weight, spec)])
    return CalibratedWeight(q, error, absmax, method, inputs.note)


class LayerInputs:
    """What the linears of one group share: H, and the factor of its inverse once it is damped.

    Args:
        statistics: of the group's input; finished and taken over here.
        block_size: columns that share a scale.

    Attributes:
        diagonal: of H, `(in,)`, of the columns as they stand.
        order: of the columns, as `FeedbackOptions.order` says.
        hessian: in that order, over the number of rows.
        factored: whether there is a factor: not where no damping helps, or there are no inputs.
        drifts: of the group's linears, `(in, out)`.
        note: where more damping than asked for was needed, or why there is no factor.
    """

    def __init__(self, statistics: InputStatistics, block_size: int, options: FeedbackOptions):
        matrix = statistics.finish()
        self.drifts = statistics.drifts
        self.diagonal = matrix.diagonal().clone()
        self.note, self.factored = "", False
        in_features = len(matrix)
        if statistics.rows == 0 or not self.diagonal.any():
            self.note = NO_INPUTS
        elif not torch.isfinite(self.diagonal).all():
            self.note = NOT_FINITE
        elif in_features % block_size:
            self.note = f"in_features {in_features} is no multiple of the block size {block_size}"
        whole = not self.note
        self.order = _order(self.diagonal, block_size, options.order if whole else "natural")
        self.hessian = Hessian(matrix, self.order if whole else None)
        if whole:
            self._factorise(options.damping)

    def output_errors(self, weight: Tensor, rounded: Sequence[QuantizedTensor]) -> list[float]:
        """tr(Δ H Δᵀ) / tr(W H Wᵀ) of each, Δ = W - dq(q): the share of the layer's output that is lost, squared."""
        total = self._square(weight)
        lost = [self._square(weight, dequantize(q, torch.float32)) for q in rounded]
        return [each / total if total > 0 else float("nan") for each in lost]

    def _square(self, weight: Tensor, without: Tensor | None = None) -> float:
        """tr(W H Wᵀ), or of what W has beyond another weight; some outputs at a time."""
        total = 0.0
        at_once = max(1, AT_ONCE // weight.shape[1])
        for first in range(0, len(weight), at_once):
            rows = slice(first, first + at_once)
            x = weight[rows].T[self.order].float()  # (in, outputs)
            if without is not None:
                x -= without[rows].T[self.order]
            total += float(torch.dot(self.hessian.times(x).flatten(), x.flatten()))
        return total

    def _factorise(self, damping: float) -> None:
        """Add `damping` times the mean diagonal, ten times more as long as H is not positive definite."""
        mean, part = float(self.diagonal.mean()), damping
        for _ in range(MAX_DAMPINGS):
            self.factored = self.hessian.factorise(part * mean)
            if self.factored:
                if part != damping:
                    self.note = f"H was not positive definite; damped by {part:g} of its mean diagonal"
                return
            part = max(10 * part, 1e-6)
        self.note = "H stayed indefinite"


def _order(diagonal: Tensor, block_size: int, order: str) -> Tensor:
    """Columns in the order in which they are rounded; those of a block stay together."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    blocks = diagonal.view(-1, block_size)
    within = blocks.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(blocks), device=diagonal.device) * block_size
    first = blocks.sum(1).argsort(descending=True, stable=True)
    return (within + starts[:, None])[first].reshape(-1)


def _feed_back(
    weight: Tensor, inputs: LayerInputs, spec: QuantSpec, options: FeedbackOptions, linear: str
) -> QuantizedTensor:
    """Levels, and the scales they are searched with, of one block column after the other."""
    size, hessian = spec.block_size, inputs.hessian
    remaining = _target(weight, inputs, options.shift, inputs.drifts.pop(linear, None))
    importance = inputs.diagonal[inputs.order] if options.importance == "diagonal" else hessian.pivots**-2
    scales = _ScaleSearch(remaining, importance, inputs.order[::size] // size, spec)
    indices = torch.empty_like(remaining, dtype=torch.uint8)  # (in, out), columns as they stand
    for number in range(len(remaining) // size):
        scale = scales.choose(number, remaining)
        for first in range(number * size, (number + 1) * size, MAX_ROWS):
            batch = slice(first, min(first + MAX_ROWS, (number + 1) * size))
            later, pivots = slice(batch.stop, None), hessian.pivots[batch, None]
            factors = (hessian.factor(batch, batch) / pivots).contiguous()
            indices[inputs.order[batch]], lost = assign_columns(remaining[batch], scale, factors, spec.format)
            remaining[later].addmm_(hessian.factor(batch, later).T, lost / pivots, alpha=-1)
    return assemble(indices.T.contiguous(), *scales.chosen(), spec, weight.dtype)


def _target(weight: Tensor, inputs: LayerInputs, shift: float, drift: Tensor | None) -> Tensor:
    """What is rounded, `(in, out)` in the order of rounding: the weight, corrected for `shift` of its inputs' drift.

    |X₁₆ Wᵀ - X Qᵀ|² is least around Wᵀ + H⁻¹ Xᵀ(X₁₆ - X) Wᵀ. The drift is overwritten.
    """
    if drift is None or not shift:
        return weight.T[inputs.order].float()
    at_once = max(1, AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), at_once):
        outputs = slice(first, first + at_once)
        correction = inputs.hessian.divide(drift[:, outputs][inputs.order])
        drift[:, outputs] = correction.mul_(shift).add_(weight[outputs].T[inputs.order])
    return drift


class _ScaleSearch:
    """The scales of a weight, those of one block column after the other, each searched when its turn comes.

    Args:
        target: `(in, out)` in the order of rounding. Double-quantised scales may lie about where a search on it,
            without feedback, puts them.
        importance: of its rows, `(in,)`.
        places: of the block columns in the weight, in the order of rounding.
    """

    def __init__(self, target: Tensor, importance: Tensor, places: Tensor, spec: QuantSpec):
        self._spec, self._importance, self._places = spec, importance, places.tolist()
        self._starts = [sign * start for sign in (1, -1) for start in STARTS]
        self._scale = target.new_empty(len(places), target.shape[1])  # block columns as they stand
        self._codes = torch.empty_like(self._scale, dtype=torch.uint8)
        self._grid: ScaleGrid | None = None
        if spec.double_quant:
            for number in range(len(places)):
                self.choose(number, target)
            self._grid = scale_grid(self._scale.T.reshape(-1))

    def choose(self, number: int, remaining: Tensor) -> Tensor:
        """Search the scales of the block column that is `number` in the order of rounding, `(out,)`."""
        size, place = self._spec.block_size, self._places[number]
        rows = slice(number * size, (number + 1) * size)
        weights, grid = self._importance[rows].contiguous(), self._grid
        if grid is not None:
            grid = ScaleGrid(grid.step.view(-1, len(self._places))[:, place].contiguous(), grid.offset)
        found = search_scales(remaining[rows].T.contiguous(), self._spec.format, size, self._starts, weights, grid)
        self._scale[place], self._codes[place] = found.scale, found.codes
        return found.scale

    def chosen(self) -> tuple[Tensor, Tensor, ScaleGrid | None]:
        """Scales and their codes, as the weight's blocks lie, and the grid."""
        return self._scale.T.reshape(-1), self._codes.T.reshape(-1), self._grid
