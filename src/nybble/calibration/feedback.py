"""Error feedback: each column is rounded in the light of what the columns before it lost (GPTQ, arXiv 2210.17323).

The loss is tr(Δ H Δᵀ), what an error Δ of the weight does to the layer's output over the calibration tokens. With
H⁻¹ = UᵀU, U upper triangular, columns are taken one after the other; what column j lost, e = (w_j - q_j) / U_jj, is
made good as far as the later columns can: w_k -= e U_jk. A block's scale is searched when its first column is reached,
on the weights as compensated by then, and rounded to the 8-bit grid before any level is chosen, so that the feedback
sees the values that will be stored.

Then, on the same loss: scales refitted to their levels by least squares, and passes of coordinate descent over the
levels, each of which takes the level that is best given all the others (as GPTVQ, arXiv 2402.15319, and QuIP's greedy
updates, arXiv 2307.13304). No step is kept for a row that it would make worse.

Matrices stand transposed here, `(in, out)`, so that a column of the weight is one row in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibration.search import STARTS, assemble, check_searchable, scale_grid, search_weight
from nybble.calibration.statistics import InputStatistics
from nybble.formats import codebooks
from nybble.formats.quantized_tensor import QuantizedTensor, QuantSpec
from nybble.kernels.calibration_ops import MAX_ROWS, ScaleGrid, assign_columns, search_scales
from nybble.kernels.calibration_reference import round_to_grid
from nybble.kernels.ops import dequantize

RIDGE = 1e-6  # of the mean diagonal, where the scales of a row are solved for
TINY = 1e-30
NO_INPUTS = "its inputs were all zero"
NOT_FINITE = "its inputs were not finite"
MAX_DAMPINGS = 8  # tenfold each: beyond that H has no meaning
INVERTED_ROWS = 256  # of a triangular matrix, at once
ERROR_ELEMENTS = 2**22  # of a weight whose error is computed at once
NORMAL_BYTES = 2**26  # of the normal equations for scales that are solved at once


@dataclass(frozen=True)
class FeedbackOptions:
    """What was measured to win; ablations change it.

    Args:
        damping: added to H's diagonal, as a part of its mean.
        order: of the columns: "blocks" takes blocks, and the columns within a block, by falling diagonal of H;
            "natural" takes them as they stand.
        descents: passes of coordinate descent after the feedback, each after a refit of the scales.
        shift: how much of the drift of the inputs is corrected, 0 to 1.
        importance: what weighs the search for scales: "conditional" (1 / U_jj², the loss of an error that later
            columns make good) or "diagonal" (of H).
    """

    damping: float = 0.01
    order: str = "blocks"
    descents: int = 2
    shift: float = 0.5
    importance: str = "diagonal"


@dataclass(frozen=True)
class CalibratedWeight:
    """A weight in four bits, and how it came to be.

    Args:
        tensor: the weight.
        error: of the layer's output, relative: tr(Δ H Δᵀ) / tr(W H Wᵀ); NaN where nothing was measured.
        method: "calibrated", "weighted search" or "search".
        note: why it is not what was asked for, or what had to be done to H; empty where all went well.
    """

    tensor: QuantizedTensor
    error: float
    method: str
    note: str = ""


def calibrate_weight(
    weight: Tensor, inputs: "LayerInputs", spec: QuantSpec, options: FeedbackOptions | None = None
) -> CalibratedWeight:
    """Put a linear layer's weight into four bits so that its output moves least.

    Args:
        weight: `(out, in)`, fp32, bf16 or fp16; not changed.
        inputs: of the layer, made with the same block size and options.

    Raises:
        FormatError: values that are not finite, or a format with zero points.
    """
    check_searchable(spec.format)
    if inputs.note in (NO_INPUTS, NOT_FINITE):
        return CalibratedWeight(search_weight(weight, spec), float("nan"), "search", inputs.note)
    if inputs.factor is None:
        q, method = search_weight(weight, spec, inputs.diagonal), "weighted search"
    else:
        q, method = _Problem(weight, inputs, spec, options or FeedbackOptions()).solve(), "calibrated"
    return CalibratedWeight(q, output_error(weight, q, inputs.hessian), method, inputs.note)


def output_error(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> float:
    """tr(Δ H Δᵀ) / tr(W H Wᵀ), Δ = W - dq(q): the share of the layer's output that is lost, squared."""
    lost = total = 0.0
    dense = dequantize(q, torch.float32)
    at_once = max(1, ERROR_ELEMENTS // weight.shape[1])
    for first in range(0, len(weight), at_once):
        wide = weight[first : first + at_once].float()
        total += float(((wide @ hessian) * wide).sum())
        delta = wide - dense[first : first + at_once]
        lost += float(((delta @ hessian) * delta).sum())
    return lost / total if total > 0 else float("nan")


class LayerInputs:
    """What the linears of one group share: H, and the factor of its inverse once it is damped.

    Args:
        statistics: of the group's input; finished here.
        block_size: columns that share a scale.

    Attributes:
        hessian: `(in, in)`, over the number of rows.
        diagonal: of the Hessian, `(in,)`.
        shift: D, `(in, in)`, or None.
        damping: what is added to the diagonal so that H is positive definite.
        order: of the columns, as `FeedbackOptions.order` says.
        factor, pivots: U = diag(pivots) · factor of the damped H in that order, H⁻¹ = UᵀU; the factor, which has ones
            on its diagonal, is None where no damping helps, or there are no inputs.
        note: where more damping than asked for was needed, or why there is no factor.
    """

    def __init__(self, statistics: InputStatistics, block_size: int, options: FeedbackOptions):
        self.hessian, self.shift = statistics.finish()
        self.diagonal = self.hessian.diagonal().clone()
        self.note = ""
        self.damping = 0.0
        self.order = self.pivots = torch.empty(0)
        self.factor: Tensor | None = None
        in_features = len(self.hessian)
        if statistics.rows == 0 or not self.diagonal.any():
            self.note = NO_INPUTS
        elif not torch.isfinite(self.hessian).all():
            self.note = NOT_FINITE
        elif in_features % block_size:
            self.note = f"in_features {in_features} is no multiple of the block size {block_size}"
        else:
            self.order = _order(self.diagonal, block_size, options.order)
            self._factorise(options.damping)

    def _factorise(self, damping: float) -> None:
        """Add `damping` times the mean diagonal, ten times more as long as H is not positive definite."""
        mean, part = float(self.diagonal.mean()), damping
        for _ in range(MAX_DAMPINGS):
            factor = inverse_factor(self.hessian, self.order, part * mean)
            if factor is not None:
                self.damping, self.pivots = part * mean, factor.diagonal().clone()
                self.factor = factor.div_(self.pivots[:, None])
                if part != damping:
                    self.note = f"H was not positive definite; damped by {part:g} of its mean diagonal"
                return
            part = max(10 * part, 1e-6)
        self.note = "H stayed indefinite"


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """U, upper triangular, with H⁻¹ = UᵀU, H damped and in the order given; None where it is not positive definite.

    With P the reversal of order and P H P = L Lᵀ: H⁻¹ = (P L⁻ᵀ P)(P L⁻¹ P), whose right factor is upper triangular.
    L is inverted where it stands, one panel of rows after the other, from the rows above, which are inverted already.

    Args:
        hessian: `(in, in)`, symmetric; not changed.
        order: `(in,)`, int64.
        damping: added to the diagonal.
    """
    backwards = order.flip(0)
    permuted = hessian[backwards[:, None], backwards]
    permuted.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(permuted)
    del permuted
    if int(info) != 0:
        return None
    for first in range(0, len(lower), INVERTED_ROWS):
        rows = slice(first, first + INVERTED_ROWS)
        own = lower[rows, rows]
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own), device=own.device), upper=False)
        lower[rows, :first] = -inverse @ (lower[rows, :first] @ lower[:first, :first])
        lower[rows, rows] = inverse
    return lower.flip(0, 1).contiguous()


def _order(diagonal: Tensor, block_size: int, order: str) -> Tensor:
    """Columns in the order in which they are rounded; those of a block stay together."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    blocks = diagonal.view(-1, block_size)
    within = blocks.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(blocks), device=diagonal.device) * block_size
    first = blocks.sum(1).argsort(descending=True, stable=True)
    return (within + starts[:, None])[first].reshape(-1)


class _Problem:
    """One weight: minimise tr((T - Q) H (T - Q)ᵀ) over levels and scales, T the weight corrected for drift."""

    def __init__(self, weight: Tensor, inputs: LayerInputs, spec: QuantSpec, options: FeedbackOptions):
        assert inputs.factor is not None
        self.spec, self.options, self.dtype = spec, options, weight.dtype
        self.hessian, self.diagonal, self.damping = inputs.hessian, inputs.diagonal + inputs.damping, inputs.damping
        self.order, self.factor, self.pivots = inputs.order, inputs.factor, inputs.pivots
        self.out_features, self.in_features = weight.shape
        self.num_blocks = self.in_features // spec.block_size
        self.values = codebooks.codebook(spec.format, weight.device)
        self.target = weight.float().T.contiguous()  # (in, out)
        if inputs.shift is not None and options.shift:
            # |X₁₆ Wᵀ - X Qᵀ|² is least around W (H + D) H⁻¹, D = (X₁₆ - X)ᵀX; H⁻¹ = UᵀU in the order of rounding.
            moved = (inputs.shift.T @ self.target)[self.order]
            scaled = (self.factor @ moved).mul_(self.pivots[:, None] ** 2)
            self.target[self.order] += options.shift * (self.factor.T @ scaled)
        self.importance = self._importance(inputs.diagonal)
        self.starts = [sign * start for sign in (1, -1) for start in STARTS]
        self.grid = self._choose_grid() if spec.double_quant else None
        self.scale = torch.empty(self.num_blocks, self.out_features, device=weight.device)
        self.codes = torch.empty_like(self.scale, dtype=torch.uint8)
        self.indices = torch.empty_like(self.target, dtype=torch.uint8)  # (in, out)

    def solve(self) -> QuantizedTensor:
        self._feed_back()
        for _ in range(self.options.descents):
            self._refit_scales()
            self._descend()
        scale, codes = self.scale.T.reshape(-1), self.codes.T.reshape(-1)
        return assemble(self.indices.T.contiguous(), scale, codes, self.grid, self.spec, self.dtype)

    def _importance(self, diagonal: Tensor) -> Tensor:
        if self.options.importance == "diagonal":
            return diagonal
        importance = torch.empty_like(diagonal)
        importance[self.order] = self.pivots**-2
        return importance

    def _choose_grid(self) -> ScaleGrid:
        """Where double-quantised scales may lie: about where a search without feedback puts them."""
        rows = self.target.T.contiguous()
        return scale_grid(
            search_scales(rows, self.spec.format, self.spec.block_size, self.starts, self.importance).scale
        )

    def _grid_of(self, block: int) -> ScaleGrid | None:
        """Where the scales of one block column may lie, one for each output."""
        if self.grid is None:
            return None
        return ScaleGrid(self.grid.step.view(-1, self.num_blocks)[:, block].contiguous(), self.grid.offset)

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """(block, first, end): a block's place in the weight and its columns' places in the order."""
        size = self.spec.block_size
        for first in range(0, self.in_features, size):
            yield int(self.order[first]) // size, first, first + size

    def _batches(self, first: int, end: int) -> Iterator[slice]:
        for start in range(first, end, MAX_ROWS):
            yield slice(start, min(start + MAX_ROWS, end))

    def _feed_back(self) -> None:
        """The levels, and the scales they are searched with, of one block after the other."""
        remaining = self.target[self.order]  # (in, out), in the order of rounding
        importance = self.importance[self.order]
        for block, first, end in self._blocks():
            rows = remaining[first:end].T.contiguous()  # (out, block_size)
            weights = importance[first:end].contiguous()
            grid = self._grid_of(block)
            found = search_scales(rows, self.spec.format, self.spec.block_size, self.starts, weights, grid)
            self.scale[block], self.codes[block] = found.scale, found.codes
            for batch in self._batches(first, end):
                own = self.factor[batch, batch].contiguous()
                indices, moved = assign_columns(remaining[batch], found.scale, own, self.spec.format)
                self.indices[self.order[batch]] = indices
                remaining[batch.stop :].addmm_(self.factor[batch, batch.stop :].T, moved, alpha=-1)

    def _dequantized(self) -> Tensor:
        """(in, out)"""
        scales = self.scale.repeat_interleave(self.spec.block_size, dim=0)
        return self.values[self.indices.long()] * scales

    def _refit_scales(self) -> None:
        """The scales of some outputs after those of others, so that their normal equations fit in `NORMAL_BYTES`."""
        outputs = max(1, NORMAL_BYTES // (4 * self.num_blocks**2))
        for first in range(0, self.out_features, outputs):
            self._refit_scales_of(slice(first, min(first + outputs, self.out_features)))

    def _refit_scales_of(self, outputs: slice) -> None:
        """Least squares over all scales s of a row at once, given its levels: A s = b with A_ij = c_iᵀ H_ij c_j and
        b_i = c_iᵀ (H t)_i. The loss is sᵀ A s - 2 bᵀ s and a constant; rows that it does not lower keep theirs."""
        size, blocks = self.spec.block_size, self.num_blocks
        levels = self.values[self.indices[:, outputs].long()].view(blocks, size, -1)  # (blocks, size, outputs)
        normal = self.target.new_empty(blocks, blocks, levels.shape[2])
        for block in range(blocks):  # A is symmetric: what lies above its diagonal is copied
            first = block * size
            product = (self.hessian[first:, first : first + size] @ levels[block]).view(-1, size, levels.shape[2])
            product[0] += self.damping * levels[block]
            normal[block:, block] = (product * levels[block:]).sum(1)
            normal[block, block:] = normal[block:, block].clone()
        normal = normal.permute(2, 0, 1).contiguous()  # (outputs, blocks, blocks)
        wanted = (self._times_hessian(self.target[:, outputs]).view(blocks, size, -1) * levels).sum(1).T
        ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)
        solved, info = torch.linalg.solve_ex(normal + torch.diag_embed(ridge[:, None].expand(-1, blocks)), wanted)
        grid = self.grid
        step = None if grid is None else grid.step.view(-1, blocks)[outputs].reshape(-1)
        rounded, codes = round_to_grid(solved.reshape(-1), step, None if grid is None else grid.offset)

        def loss(scale: Tensor) -> Tensor:
            return ((normal @ scale[:, :, None])[:, :, 0] * scale).sum(1) - 2 * (wanted * scale).sum(1)

        before = self.scale[:, outputs]  # (blocks, outputs)
        better = (loss(rounded.view(-1, blocks)) < loss(before.T)) & (info == 0)
        self.scale[:, outputs] = torch.where(better, rounded.view(-1, blocks).T, before)
        self.codes[:, outputs] = torch.where(better, codes.view(-1, blocks).T, self.codes[:, outputs])

    def _times_hessian(self, x: Tensor) -> Tensor:
        """The damped H times x, `(in, outputs)`."""
        return (self.hessian @ x).add_(x, alpha=self.damping)

    def _descend(self) -> None:
        """One pass of coordinate descent: each column in turn takes the level that is best given all others."""
        current = self._dequantized()
        gradient = self._times_hessian(self.target - current)  # (in, out)
        for block, first, end in self._blocks():
            for batch in self._batches(first, end):
                rows = self.order[batch]
                own = self.hessian[rows][:, rows]
                own.diagonal().add_(self.damping)
                factors = (own / self.diagonal[rows]).contiguous()
                wanted = current[rows] + gradient[rows] / self.diagonal[rows, None]
                indices, moved = assign_columns(
                    wanted, self.scale[block], factors, self.spec.format, current[rows].contiguous()
                )
                self.indices[rows] = indices
                gradient.addmm_(self.hessian[:, rows], moved, alpha=-1)
                gradient[rows] -= self.damping * moved
                current[rows] += moved
