"""Error feedback against the textbook column loop in fp64, its refinements, and the layers it cannot do."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble.calibration.feedback import FeedbackOptions, LayerInputs, calibrate_weight
from nybble.calibration.search import search_weight
from nybble.calibration.statistics import InputStatistics
from nybble.errors import FormatError
from nybble.formats import blockwise
from nybble.formats.codebooks import codebook
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.four_bit import quantize

IN, OUT = 192, 96
NF4 = QuantSpec()
PLAIN = FeedbackOptions(order="natural", shift=0.0)


def correlated(rows: int, width: int = IN, seed: int = 0) -> Tensor:
    """Inputs as real layers have them: correlated, of very different size, a few columns large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) / math.sqrt(width)
    sizes = torch.rand(width, generator=torch.Generator().manual_seed(8)) ** 2
    sizes[::37] *= 3
    return torch.randn(rows, width, generator=generator) @ mixing * sizes


def weight(out: int = OUT, width: int = IN) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out, width, generator=generator) * torch.rand(out, 1, generator=generator)


def inputs(x: Tensor, options: FeedbackOptions, block_size: int = 64) -> LayerInputs:
    statistics = InputStatistics(x.shape[1])
    statistics.add(x)
    return LayerInputs(statistics, block_size, options)


def damped_hessian(given: LayerInputs) -> Tensor:
    """In fp64, in the order of rounding."""
    width = len(given.hessian)
    return given.hessian.times(torch.eye(width)).double() + given.hessian.damping * torch.eye(width)


def output_error(w: Tensor, q: QuantizedTensor, given: LayerInputs) -> float:
    return given.output_errors(w, [q])[0]


def calibrate(x: Tensor, options: FeedbackOptions, spec: QuantSpec = NF4, w: Tensor | None = None):
    return calibrate_weight(weight() if w is None else w, inputs(x, options, spec.block_size), spec, options)


def test_errors_of_the_output_are_those_of_the_definition() -> None:
    x, w = correlated(500), weight()
    given, q = inputs(x, PLAIN), quantize(w, NF4)
    lost = x.double() @ (w - blockwise.dequantize(q, torch.float32)).double().T
    expected = float(lost.square().sum() / (x.double() @ w.double().T).square().sum())
    for options in (PLAIN, FeedbackOptions()):  # columns as they stand, and in another order
        assert abs(output_error(w, q, inputs(x, options)) / expected - 1) < 1e-4
    found = calibrate(x, FeedbackOptions())
    assert abs(found.absmax_error / expected - 1) < 1e-4 and found.error < found.absmax_error
    assert math.isnan(output_error(torch.zeros_like(w), quantize(torch.zeros_like(w), NF4), given))


@pytest.mark.parametrize("block_size", [32, 64])
def test_feedback_is_the_textbook_loop(block_size: int) -> None:
    """GPTQ's algorithm 1 column by column in fp64, with the scales that the batched form chose."""
    spec, x, w = QuantSpec("nf4", block_size, True), correlated(2000), weight()
    found = calibrate(x, PLAIN, spec, w)
    given = inputs(x, PLAIN, block_size)
    hessian = damped_hessian(given)
    scales = blockwise.block_scales(found.tensor).double().view(OUT, -1)
    remaining, q = w.double().clone(), torch.empty(OUT, IN, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    levels = codebook("nf4").double()
    for column in range(IN):
        scale = scales[:, column // block_size, None]
        q[:, column] = (levels * scale).gather(
            1, (levels * scale - remaining[:, column, None]).abs().argmin(1)[:, None]
        )[:, 0]
        error = (remaining[:, column] - q[:, column]) / factor[column, column]
        remaining[:, column:] -= error[:, None] * factor[column, column:]
    same = (q.float() - blockwise.dequantize(found.tensor, torch.float32)).abs() < 1e-5
    assert same.float().mean() > 0.995  # a rounding in fp32 may tip a level, and those after it
    expected = float((((w.double() - q) @ hessian) * (w.double() - q)).sum())
    got = w.double() - blockwise.dequantize(found.tensor, torch.float32).double()
    assert abs(float(((got @ hessian) * got).sum()) / expected - 1) < 0.01


@pytest.mark.parametrize("format", [format.name for format in FORMATS.values() if format.searchable])
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_part_lowers_the_outputs_error(format: str, double_quant: bool) -> None:
    spec, x, w = QuantSpec(format, 64, double_quant), correlated(3000), weight()
    given = inputs(x, PLAIN)
    weighted = search_weight(w, spec, given.diagonal)
    errors = [
        output_error(w, quantize(w, spec), given),
        output_error(w, search_weight(w, spec), given),
        output_error(w, weighted, given),
        calibrate(x, PLAIN, spec).error,
        calibrate(x, FeedbackOptions(shift=0.0), spec).error,
    ]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.5 * errors[0]


def test_it_holds_on_inputs_that_were_not_seen() -> None:
    unseen = inputs(correlated(3000, seed=5), PLAIN)
    spec, w = QuantSpec(), weight()
    q = calibrate(correlated(3000), FeedbackOptions(shift=0.0)).tensor
    assert output_error(w, q, unseen) < 0.6 * output_error(w, search_weight(w, spec), unseen)


@pytest.mark.parametrize("options", [FeedbackOptions(), FeedbackOptions(order="natural")])
def test_drift_of_the_inputs_is_corrected(options: FeedbackOptions) -> None:
    """With shift 1 the layer's output on its real inputs comes nearer to what the exact inputs gave."""
    x, w = correlated(4000), weight()
    exact = x + 0.3 * x.roll(1, dims=1) + 0.1 * torch.randn(4000, IN, generator=torch.Generator().manual_seed(3))
    wanted = exact @ w.T
    lost = []
    for shift in (0.0, 0.5, 1.0):
        shifted = replace(options, shift=shift)
        statistics = InputStatistics(IN)
        statistics.add(x)
        statistics.add_drift("it", w, x, exact)
        q = calibrate_weight(w, LayerInputs(statistics, 64, shifted), NF4, shifted, "it").tensor
        lost.append(float((x @ blockwise.dequantize(q, torch.float32).T - wanted).norm() / wanted.norm()))
    assert lost[2] < lost[1] < lost[0]
    best = torch.linalg.lstsq(x.double(), wanted.double()).solution  # the best dense weight
    assert lost[2] < float((x.double() @ best - wanted).norm() / wanted.norm()) + 0.1


def test_dead_inputs_are_searched_and_said() -> None:
    found = calibrate(torch.zeros(10, IN), PLAIN)
    assert (found.method, found.note) == ("search", "its inputs were all zero")
    assert torch.equal(found.tensor.packed, search_weight(weight(), QuantSpec()).packed)
    empty = LayerInputs(InputStatistics(IN), 64, PLAIN)
    assert calibrate_weight(weight(), empty, QuantSpec(), PLAIN).method == "search"


def test_a_few_dead_columns_are_no_obstacle() -> None:
    x = correlated(2000)
    x[:, 10:80] = 0
    found = calibrate(x, FeedbackOptions())
    assert found.method == "calibrated" and found.error < 0.01


def test_inputs_that_are_not_finite_are_searched_and_said() -> None:
    x = correlated(100)
    x[3, 5] = torch.inf
    found = calibrate(x, PLAIN)
    assert (found.method, found.note) == ("search", "its inputs were not finite")


def test_an_indefinite_h_is_damped_further_and_said() -> None:
    options = FeedbackOptions(damping=0.0)
    x = correlated(20)  # fewer rows than columns: singular
    found = calibrate(x, options)
    assert found.method == "calibrated" and "damped by" in found.note and math.isfinite(found.error)


def test_rows_that_blocks_straddle_fall_back_to_weighted_search() -> None:
    found = calibrate(correlated(500, 100), PLAIN, w=weight(OUT, 100))
    assert found.method == "weighted search" and "no multiple of the block size 64" in found.note


def test_zero_points_are_refused() -> None:
    with pytest.raises(FormatError, match="zero points"):
        calibrate(correlated(100), PLAIN, QuantSpec("int4_asym"))


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = calibrate(correlated(500), FeedbackOptions()), calibrate(correlated(500), FeedbackOptions())
    assert torch.equal(first.tensor.packed, second.tensor.packed)
    assert torch.equal(first.tensor.scales, second.tensor.scales)


def test_blocks_wider_than_a_batch_of_columns() -> None:
    x, w = correlated(2000, 512), weight(OUT, 512)
    found = calibrate(x, FeedbackOptions(), QuantSpec("nf4", 256, True), w)
    assert found.method == "calibrated" and found.error < 0.5 * found.absmax_error
