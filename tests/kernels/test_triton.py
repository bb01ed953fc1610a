"""Where Triton's backend runs, what it takes, and its bodies where several programs share a tensor.

test_every_op.py compares all bodies on small shapes; its interpreter takes most of them in one program.
"""

import importlib.util
import itertools

import pytest
import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.formats.codebooks import dynamic_midpoints
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels import registry
from nybble.kernels.backends import triton
from nybble.kernels.backends.triton import calibration, loss, norm, optimizer
from nybble.kernels.backends.triton.four_bit import MAX_GEMV_ROWS
from nybble.kernels.backends.triton.launch import INTERPRETED, TILE, too_many
from nybble.kernels.ops.calibration import ScaleGrid, assign_columns, search_scales
from nybble.kernels.ops.four_bit import augmented_weight_, dequantize, gemv_4bit, quantize
from nybble.kernels.ops.glu import geglu, geglu_backward, swiglu, swiglu_backward
from nybble.kernels.ops.loss import cross_entropy_
from nybble.kernels.ops.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from nybble.kernels.ops.optimizer import ADAMW_BLOCK, adamw_, adamw_8bit_
from nybble.kernels.ops.rope import rope_, rope_backward_

interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs them")
HALVES = (torch.bfloat16, torch.float16)


def test_it_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.why_unavailable() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton.why_unavailable() == "the card has compute capability 7.5, 8.0 is the least; models' own modules run"
    for capability in ((8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert triton.why_unavailable() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.why_unavailable() == "triton is not installed, PyTorch for CUDA brings it; models' own modules run"


def test_offsets_have_32_bits() -> None:
    assert too_many(128256 * 16384 - 1) is None and "takes at most" in str(too_many(2**31 - 1))


# ---- several programs ----------------------------------------------------------------------------


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_both(function, *arguments):
    """What a function makes of copies of its arguments, with Triton's bodies and with plain PyTorch's."""
    results = []
    for backend in ("triton", "reference"):
        with registry.use(backend):
            copies = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
            result = function(*copies)
            results.append([*(result if isinstance(result, tuple) else [result]), *copies])
    return [pair for pair in zip(*results, strict=True) if isinstance(pair[0], Tensor)]


def assert_same_bits(pairs) -> None:
    """In 16 bits but for one in a thousand: numpy's exponential and torch's, and their sums, are a last bit apart."""
    for got, expected in pairs:
        if got.dtype == torch.float32:
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
        else:
            assert (got != expected).double().mean() <= 1e-3


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_results_are_the_references_in_bits(dtype):
    for shape in ((70, 64), (2, TILE + 900), (45, 3, 80)):  # rows of a program and more; as wide; heads
        x, grad, total = (normal(*shape, seed=seed, dtype=dtype) for seed in range(3))
        weight, rstd = normal(shape[-1], seed=3, dtype=dtype), normal(*shape[:-1], seed=4).abs() + 0.1
        assert_same_bits(by_both(rms_norm, x, weight, 1e-5, 1.0))
        assert_same_bits(by_both(rms_norm_backward, grad, x, weight, rstd, 0.0, total, True))
        if len(shape) == 2:
            assert_same_bits(by_both(swiglu, x, grad))
            assert_same_bits(by_both(swiglu_backward, grad, x, total, None, None, torch.empty_like(x)))
        stats = torch.stack([normal(*shape[:-1], seed=5), rstd], dim=-1)
        assert_same_bits(by_both(layer_norm, x, weight, normal(shape[-1], seed=6, dtype=dtype), 1e-5))
        assert_same_bits(by_both(layer_norm_backward, grad, x, weight, stats, total, True))
    for rotate, neighbours in itertools.product((rope_, rope_backward_), (False, True)):
        angles = normal(45, 32, seed=2), normal(45, 32, seed=3)
        pairs = by_both(rotate, normal(45, 3, 80, seed=1, dtype=dtype), *angles, neighbours)
        assert all(torch.equal(got, expected) for got, expected in pairs)


@interpreted
def test_large_gates_stay_finite():
    gate = torch.tensor([[-1e15, -1e4, -200.0, -100.0, -88.0, -5.0, 0.0, 1e-4, 88.0, 100.0, 200.0, 1e4, 1e20]])
    up = torch.ones_like(gate)
    for forward, backward in ((swiglu, swiglu_backward), (geglu, geglu_backward)):
        for got, expected in [*by_both(forward, gate, up), *by_both(backward, up, gate, up)]:
            assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_of_a_vocabulary_in_pieces(dtype):
    vocabulary = 3 * loss.COLUMNS + 11
    logits, targets = 4 * normal(4, vocabulary, seed=0, dtype=dtype), torch.tensor([vocabulary - 1, -100, 0, 700])
    logits[0] += 300  # exp would overflow
    logits[2] -= 300
    logits[3, : loss.COLUMNS] = -torch.inf  # lanes whose first column adds nothing
    logits[3, 5] = 11.0
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none", ignore_index=-100)
    losses.sum().backward()
    with registry.use("triton"):
        got = cross_entropy_(logits, targets, 1.0)
    assert torch.allclose(got.double(), losses, rtol=1e-6, atol=0)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-9
    assert (logits.double() - exact.grad).abs().max() <= tolerance and (logits[1] == 0).all()


@interpreted
def test_codes_of_moments_are_the_references_also_where_two_are_as_near():
    """A gradient that is the moment itself, so that both round the same numbers: midpoints, and those beside them."""
    midpoints = dynamic_midpoints(signed=True)
    beside = [torch.nextafter(midpoints, torch.full_like(midpoints, far)) for far in (-9.0, 9.0)]
    rows = [torch.cat([values, torch.ones(1)]) for values in (midpoints, *beside)]  # blocks whose scale is 1
    grad = torch.cat([*rows, torch.zeros(ADAMW_BLOCK), 1e-3 * normal(TILE, seed=1), torch.tensor([-1e-12, 3.0])])
    blocks = -(-len(grad) // ADAMW_BLOCK)
    codes, scales = torch.zeros(2, len(grad), dtype=torch.uint8), torch.zeros(2, blocks)

    def step(param, grad, mean, square, mean_absmax, square_absmax):
        numbers = {"lr": 1e-3, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.1}
        adamw_8bit_(param, grad, mean, square, mean_absmax, square_absmax, step=3, **numbers)

    param, *pairs = by_both(step, normal(len(grad), seed=2), grad, *codes, *scales)
    assert torch.allclose(*param, rtol=1e-6, atol=0)
    assert all(torch.equal(got, expected) for got, expected in pairs)


@interpreted
def test_adamw_over_several_programs():
    state = [normal(TILE + 7, seed=seed) for seed in range(4)]
    state[3] = state[3].abs()

    def step(*tensors):
        adamw_(*tensors, step=3, lr=1e-2, weight_decay=0.1, grad_scale=0.5)

    for got, expected in by_both(step, *state):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)


@interpreted
@pytest.mark.parametrize("format", ["nf4", "int4_asym", "nf3"])
def test_quantising_over_several_programs_gives_the_references_bytes(format):
    results = []
    for backend in ("triton", "reference"):
        with registry.use(backend):
            results.append(quantize(normal(101, 97, seed=0, dtype=torch.bfloat16), QuantSpec(format, 64)))
    got, expected = results
    assert torch.equal(got.packed, expected.packed) and torch.equal(got.scales, expected.scales)


@interpreted
@pytest.mark.parametrize("width", [72, 36, 33])
def test_a_weight_in_wide_rows_is_the_references(width):
    """Rows of whole words and of others."""
    q = quantize(normal(9, width, seed=0), QuantSpec("nf4", 64))
    out = torch.full((9, width + 8), torch.nan)[:, : width + 5]
    pairs = by_both(lambda out: augmented_weight_(out, q, normal(9, 2, seed=1), 0.5, 1), out)
    assert all(torch.equal(got, expected) for got, expected in pairs) and len(pairs) == 1


@interpreted
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_with_a_few_rows_over_several_programs(format):
    """Word after word of a row, and outputs that do not fill the last program; more rows than sums in a thread."""
    for rows, outputs, width in ((1, 3, 16384 + 8), (MAX_GEMV_ROWS, 65, 136), (MAX_GEMV_ROWS + 1, 3, 64)):
        q = quantize(normal(outputs, width, seed=0), QuantSpec(format, 128))
        x = normal(rows, width, seed=1)
        with registry.use("triton"):
            got = gemv_4bit(x, q)
        exact = x.double() @ dequantize(q, torch.float32).double().T
        assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()


@interpreted
@pytest.mark.parametrize("format", ["nf4", "fp4", "nf2"])
def test_columns_over_several_programs_are_the_references(format):
    columns = calibration.COLUMNS + 7
    arguments = normal(9, columns, seed=0), normal(columns, seed=1), normal(9, 9, seed=2) / 9
    assert all(torch.equal(got, expected) for got, expected in by_both(assign_columns, *arguments, format))


@interpreted
def test_searched_scales_over_several_programs_are_the_references():
    w = normal(TILE // 64 + 3, 67, seed=0)
    w[:2] = 0
    step = normal(-(-w.numel() // 64), seed=2).abs() + 1

    def search(w, h, *grid):
        return tuple(search_scales(w, "nf3", 64, [0.9, -1.1], h, ScaleGrid(*grid)))

    for got, expected in by_both(search, w, normal(67, seed=1).abs(), step, torch.ones(1)):
        assert torch.allclose(got.float(), expected.float(), rtol=1e-6, atol=0)


# ---- arguments -----------------------------------------------------------------------------------


def test_a_row_that_one_program_cannot_hold_is_refused(monkeypatch):
    x = torch.empty(2, norm.MAX_WIDTH + 1)
    assert "at most 16,384 elements, not 16,385" in norm._too_wide(x)
    if INTERPRETED:
        with registry.use("triton"), pytest.raises(KernelError, match="at most 16,384"):
            rms_norm(x, torch.ones(norm.MAX_WIDTH + 1), 1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_no_other_kernel_is_compiled_for_another_step(bits, monkeypatch):
    """Triton compiles one for each distinct key of its arguments; an integer's tells 1 and multiples of 16."""
    jit = pytest.importorskip("triton.runtime.jit")
    keys = []

    def launch(kernel, programs, *arguments, **constants):
        keys.append([jit.native_specialize_impl(jit.BaseBackend, each, False, True, True) for each in arguments])

    monkeypatch.setattr(optimizer, "launch", launch)
    moments = [torch.zeros(300, dtype=torch.uint8)] * 2 + [torch.zeros(2)] * 2 if bits == 8 else [torch.zeros(300)] * 2
    body = optimizer.adamw_8bit_ if bits == 8 else optimizer.adamw_
    for step, lr, grad_scale in ((1, 1.0, 1.0), (16, 0.0, 0.5)):
        body(torch.zeros(300), torch.zeros(300), *moments, step, lr, 0.9, 0.999, 1e-8, 0.0, grad_scale)
    assert keys[0] == keys[1]
