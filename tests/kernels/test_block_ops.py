"""The block ops against autograd in fp64: in plain PyTorch, and in C++ on every instruction set.

Outputs start as NaN; shapes leave tails; rows lie apart; outputs overwrite inputs.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nybble.errors import KernelError
from nybble.formats.codebooks import dynamic_map
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.backends.reference import loss as reference_loss
from nybble.kernels.ops.four_bit import dequantize, gemv_4bit, quantize
from nybble.kernels.ops.glu import geglu, geglu_backward, gelu, gelu_backward, swiglu, swiglu_backward
from nybble.kernels.ops.loss import cross_entropy_
from nybble.kernels.ops.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from nybble.kernels.ops.optimizer import adamw_, adamw_8bit_
from nybble.kernels.ops.rope import rope_, rope_backward_

needs_cpp = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
ISAS = library.supported_isas() if library.why_unavailable() is None else ()
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of the largest value; bf16: half a step of it
WIDTHS = (1, 7, 16, 17, 64, 100, 576)


@pytest.fixture(params=["reference", *ISAS], autouse=True)
def body(request):
    """The bodies that run: plain PyTorch's, or an instruction set's."""
    if request.param == "reference":
        with registry.use("reference"):
            yield request.param
    else:
        with library.use_isa(request.param), registry.use("cpp"):
            yield request.param


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_apart(x, gap=13):
    """The same rows inside a wider buffer, as a slice of a fused projection would be; and the buffer's remainder."""
    width = x[0].numel()
    buffer = torch.full((len(x), width + gap), torch.nan, dtype=x.dtype)
    view = buffer[:, :width].view(x.shape)
    view.copy_(x)
    return view, buffer[:, width:]


def assert_close(got, exact, dtype, scale=0.0):
    """`scale`: the size of the terms, where the exact result is a small difference of them."""
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    error = (got.double() - exact).abs().max()
    assert error <= TOLERANCE[dtype] * max(exact.abs().max(), scale, 1e-3), error


# ---- RMSNorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_and_its_gradient(dtype, weight_dtype, weight_offset, width):
    for shape in ((5, width), (3, 4, width)):
        x, remainder = rows_apart(randn(*shape, dtype=dtype))
        weight, grad = randn(width, dtype=weight_dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
        x64, w64 = x.double().requires_grad_(), weight.double()
        y64 = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * (w64 + weight_offset)
        y64.backward(grad.double())

        out, _ = rows_apart(torch.full(shape, torch.nan, dtype=dtype))
        y, rstd = rms_norm(x, weight, 1e-5, weight_offset, out=out)
        assert y is out
        assert_close(y, y64.detach(), dtype)
        assert_close(rstd, torch.rsqrt(x.double().square().mean(-1) + 1e-5), torch.float32)

        dx = rms_norm_backward(grad, x, weight, rstd, weight_offset)
        terms = grad.abs().max() * rstd.max() * (weight.float() + weight_offset).abs().max()
        assert_close(dx, x64.grad, dtype, scale=terms)
        base = randn(*shape, dtype=dtype, seed=3)
        total = rms_norm_backward(grad, x, weight, rstd, weight_offset, out=base.clone(), accumulate=True)
        assert_close(total, x64.grad + base.double(), dtype, scale=terms)

        in_place = grad.clone()
        rms_norm_backward(in_place, x, weight, rstd, weight_offset, out=in_place)
        assert torch.equal(in_place, dx)
        expected = y.clone()
        rms_norm(x, weight, 1e-5, weight_offset, out=x)
        assert torch.equal(x, expected)
        assert remainder.isnan().all()


# ---- LayerNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_and_its_gradient(dtype, weight_dtype, width):
    for shape, biased in itertools.product(((5, width), (3, 4, width)), (False, True)):
        x, remainder = rows_apart(randn(*shape, dtype=dtype) + 2)
        weight, grad = randn(width, dtype=weight_dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
        bias = randn(width, dtype=weight_dtype, seed=3) if biased else None
        x64 = x.double().requires_grad_()
        y64 = F.layer_norm(x64, (width,), weight.double(), bias.double() if biased else None, 1e-5)
        y64.backward(grad.double())
        deviation = torch.rsqrt(x.double().var(-1, correction=0) + 1e-5)

        out, _ = rows_apart(torch.full(shape, torch.nan, dtype=dtype))
        y, stats = layer_norm(x, weight, bias, 1e-5, out=out)
        assert y is out
        rounding = 4 * deviation.max() * weight.abs().max() if dtype == torch.float32 else 0.0  # of the mean
        assert_close(y, y64.detach(), dtype, scale=rounding)
        assert_close(stats[..., 0], x.double().mean(-1), torch.float32)
        assert_close(stats[..., 1], deviation, torch.float32)

        dx = layer_norm_backward(grad, x, weight, stats)
        terms = grad.abs().max() * stats[..., 1].max() * weight.abs().max().float()
        terms = terms * max(1.0, float(y.abs().max())) * (4 if width == 1 else 2)
        assert_close(dx, x64.grad, dtype, scale=terms)
        base = randn(*shape, dtype=dtype, seed=3)
        total = layer_norm_backward(grad, x, weight, stats, out=base.clone(), accumulate=True)
        assert_close(total, x64.grad + base.double(), dtype, scale=terms)

        in_place = grad.clone()
        layer_norm_backward(in_place, x, weight, stats, out=in_place)
        assert torch.equal(in_place, dx)
        expected = y.clone()
        layer_norm(x, weight, bias, 1e-5, out=x)
        assert torch.equal(x, expected)
        assert remainder.isnan().all()


# ---- RoPE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (6, 6), (64, 64), (80, 32), (128, 128), (34, 34)])
def test_rope_is_hugging_faces_and_its_backward_is_the_transpose(dtype, head_dim, rotary_dim, neighbours):
    tokens, heads = 9, 3
    angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(rotary_dim // 2) * 2 / rotary_dim)
    cos, sin = 1.1 * angles.cos(), 1.1 * angles.sin()  # 1.1: as yarn's attention scaling
    x, remainder = rows_apart(randn(tokens, heads, head_dim, dtype=dtype))
    grad = randn(tokens, heads, head_dim, dtype=dtype, seed=1)

    x64 = x.double().requires_grad_()
    turned, kept = x64[..., :rotary_dim], x64[..., rotary_dim:]
    if neighbours:
        rotated = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        cos64, sin64 = (table.repeat_interleave(2, dim=-1)[:, None].double() for table in (cos, sin))
    else:
        rotated = torch.cat([-turned[..., rotary_dim // 2 :], turned[..., : rotary_dim // 2]], dim=-1)
        cos64, sin64 = (torch.cat([table, table], dim=-1)[:, None].double() for table in (cos, sin))
    y64 = torch.cat([turned * cos64 + rotated * sin64, kept], dim=-1)
    y64.backward(grad.double())

    rope_(x, cos, sin, neighbours)
    assert_close(x, y64.detach(), dtype)
    assert remainder.isnan().all()
    rope_backward_(grad, cos, sin, neighbours)
    assert_close(grad, x64.grad, dtype)


# ---- gated linear units --------------------------------------------------------------------------


def tanh_gelu(g):
    return 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))


GATES = {"swiglu": (swiglu, swiglu_backward, F.silu), "geglu": (geglu, geglu_backward, tanh_gelu)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gates", GATES)
def test_gates_and_their_gradients(gates, dtype, width):
    forward, backward, activation = GATES[gates]
    fused, remainder = rows_apart(3 * randn(7, 2 * width, dtype=dtype))
    gate, up = fused[:, :width], fused[:, width:]
    grad = randn(7, width, dtype=dtype, seed=1)
    g64, u64 = gate.double().requires_grad_(), up.double().requires_grad_()
    y64 = activation(g64) * u64
    y64.backward(grad.double())

    y = forward(gate, up, out=torch.full((7, width), torch.nan, dtype=dtype))
    assert_close(y, y64.detach(), dtype)
    grad_gate, grad_up = backward(grad, gate, up)
    assert_close(grad_gate, g64.grad, dtype)
    assert_close(grad_up, u64.grad, dtype)

    backward(grad, gate, up, grad_gate=gate, grad_up=up, act=grad)  # everything in place
    assert torch.equal(gate, grad_gate)
    assert torch.equal(up, grad_up)
    assert torch.equal(grad, y)
    assert remainder.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_and_its_gradient(dtype, width):
    x, remainder = rows_apart(3 * randn(7, width, dtype=dtype))
    grad = randn(7, width, dtype=dtype, seed=1)
    x64 = x.double().requires_grad_()
    y64 = F.gelu(x64, approximate="tanh")
    y64.backward(grad.double())

    y = gelu(x, out=torch.full((7, width), torch.nan, dtype=dtype))
    assert_close(y, y64.detach(), dtype)
    grad_x = gelu_backward(grad, x)
    assert_close(grad_x, x64.grad, dtype)

    gelu_backward(grad, x, grad_x=x, act=grad)  # everything in place
    assert torch.equal(x, grad_x)
    assert torch.equal(grad, y)
    assert remainder.isnan().all()


@pytest.mark.parametrize("gates", GATES)
def test_large_gates_stay_finite(gates):
    forward, backward, activation = GATES[gates]
    gate = torch.tensor([[-1e15, -1e4, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 200.0, 1e4, 1e20]])
    up, expected = torch.ones_like(gate), activation(gate.double()).float()
    assert torch.allclose(forward(gate, up), expected, atol=1e-17)
    grad_gate, grad_up = backward(up, gate, up)
    assert torch.allclose(grad_gate, (gate > 0) + 0.5 * (gate == 0), atol=1e-17)
    assert torch.allclose(grad_up, expected, atol=1e-17)


# ---- cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 31, 1000, 5003])
def test_cross_entropy_and_its_gradient(dtype, vocabulary):
    logits, remainder = rows_apart(4 * randn(6, vocabulary, dtype=dtype))
    logits[0] += 300  # exp would overflow
    logits[1] -= 300
    targets = torch.arange(6) * 7919 % vocabulary
    targets[2], targets[3], targets[4] = -100, vocabulary - 1, 0
    x64 = logits.double().requires_grad_()
    losses64 = F.cross_entropy(x64, targets, reduction="none", ignore_index=-100)
    (0.25 * losses64.sum()).backward()

    losses = cross_entropy_(logits, targets, 0.25)
    assert losses[2] == 0
    assert (logits[2] == 0).all()
    assert_close(losses, losses64.detach(), torch.float32)
    assert_close(logits, x64.grad, dtype)
    assert remainder.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_cross_entropy_takes_some_rows_at_a_time(dtype, monkeypatch):
    logits, targets = randn(6, 50, dtype=dtype), torch.tensor([3, -1, 49, 0, 7, 7])
    results = []
    for rows in (6, 4):
        monkeypatch.setattr(reference_loss, "REFERENCE_ROWS", rows)
        with registry.use("reference"):
            results.append((gradient := logits.clone(), cross_entropy_(gradient, targets, 0.25)))
    assert all(map(torch.equal, *results))


def test_a_target_beyond_the_vocabulary_is_refused():
    with pytest.raises(KernelError, match="A target is 5"):
        cross_entropy_(torch.zeros(2, 5), torch.tensor([0, 5]), 1.0)


# ---- AdamW ---------------------------------------------------------------------------------------


def test_adamw_is_torchs():
    param = torch.nn.Parameter(randn(1003))
    mine, exp_avg, exp_avg_sq = param.detach().clone(), torch.zeros(1003), torch.zeros(1003)
    settings = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([param], betas=(0.9, 0.95), foreach=False, **settings)
    for step in range(1, 21):
        grad = randn(1003, seed=step) * 10.0 ** (step % 5 - 4)
        param.grad = grad * 0.5
        optimizer.step()
        adamw_(mine, grad, exp_avg, exp_avg_sq, step=step, beta1=0.9, beta2=0.95, grad_scale=0.5, **settings)
        assert torch.allclose(mine, param.detach(), rtol=1e-6, atol=1e-7)
    state = optimizer.state[param]
    assert torch.allclose(exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_adamw_in_pieces_gives_the_same_bits():
    whole = [randn(1000, seed=seed).abs() for seed in range(4)]
    pieces = [tensor.clone() for tensor in whole]
    adamw_(*whole, step=3, lr=1e-3, weight_decay=0.01)
    for start, stop in ((0, 1), (1, 18), (18, 500), (500, 1000)):
        adamw_(*(tensor[start:stop] for tensor in pieces), step=3, lr=1e-3, weight_decay=0.01)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)


def eight_bit_state(count):
    return [torch.zeros(count, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(-(-count // 256)) for _ in range(2)]


def widened(state):
    """The moments that 8-bit codes and scales stand for."""
    return [
        dynamic_map(signed=signed)[codes.long()] * scales.repeat_interleave(256)[: len(codes)]
        for codes, scales, signed in zip(state[:2], state[2:], (True, False), strict=True)
    ]


@pytest.mark.parametrize("count", [1, 255, 256, 1003, 70_001])  # a block and less, an odd end, several threads
def test_8_bit_adamw_is_32_bit_adamw_on_the_moments_it_has_rounded_to_the_nearest_code(count):
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    param, state = randn(count), eight_bit_state(count)
    for step in range(1, 5):
        grad = randn(count, seed=step) * 10.0 ** randn(count, seed=-step)
        expected, moments = param.clone(), widened(state)
        adamw_(expected, grad, *moments, step=step, **settings)
        adamw_8bit_(param, grad, *state, step=step, **settings)
        assert torch.equal(param, expected), "the update sees its moments unrounded"
        for moment, rounded, scales, signed in zip(moments, widened(state), state[2:], (True, False), strict=True):
            scale = scales.repeat_interleave(256)[:count]
            values = dynamic_map(signed=signed)
            error = (values[None, :] - (moment / scale)[:1000, None]).abs().amin(dim=1)  # of the nearest code
            got = ((rounded - moment) / scale).abs()[:1000]
            low = signed & (rounded < 0) & (rounded == -values[values > 0].min() * scale)  # kept from being zero
            assert ((got <= error + 1e-6) | low[:1000]).all()
            assert not signed or (rounded[moment < 0] < 0).all()


@needs_cpp
def test_8_bit_adamw_is_that_of_its_twin():
    results = []
    for backend in ("cpp", "reference"):
        param, state = randn(5003), eight_bit_state(5003)
        with registry.use(backend):
            for step in range(1, 9):
                adamw_8bit_(param, randn(5003, seed=step), *state, step=step, lr=1e-3)
        results.append((param, state))
    (cpp, cpp_state), (reference, reference_state) = results
    assert torch.allclose(cpp, reference, rtol=1e-3, atol=1e-5)  # a last bit apart, some moments round the other way
    for a, b in zip(cpp_state, reference_state, strict=True):
        assert ((a.int() - b.int()).abs() <= 1).all() if a.dtype == torch.uint8 else torch.allclose(a, b, rtol=1e-5)
    assert all((a != b).float().mean() < 0.01 for a, b in zip(cpp_state[:2], reference_state[:2], strict=True))


# ---- 4-bit matrix-vector product -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [format for format in FORMATS if FORMATS[format].bits == 4])
@pytest.mark.parametrize("double_quant", [False, True])
def test_gemv_multiplies_by_the_dequantised_weight(body, dtype, format, double_quant):
    # bf16: the result's rounding, and half as much again for that of the codebook; in plain PyTorch of each weight
    allowed = 1.0 if dtype == torch.float32 else 2.0 if body == "reference" else 1.5
    for block_size in (32, 64, 128, 4096):
        spec = QuantSpec(format, block_size, double_quant)
        for shape in ((5, 32), (7, 64), (3, 96), (33, 576), (4, 100), (9, 33), (6, 8192), (1, 1)):
            q = quantize(randn(*shape) + 0.3, spec)
            exact = dequantize(q, torch.float32).double()
            for rows in (1, 2, 5, 8, 11):
                x = randn(rows, shape[1], dtype=dtype, seed=rows)
                y, y64 = gemv_4bit(x, q), x.double() @ exact.T
                assert_close(y, y64, dtype, scale=allowed * y64.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf3", "nf2"])
def test_gemv_on_three_and_two_bits_makes_the_weight_first(dtype, format):
    for shape in ((7, 64), (33, 576), (9, 33)):
        q = quantize(randn(*shape), QuantSpec(format))
        x = randn(3, shape[1], dtype=dtype)
        assert torch.equal(gemv_4bit(x, q), x @ dequantize(q, dtype).T)


# ---- all -----------------------------------------------------------------------------------------


def examples():
    """Each op with arguments, every output a tensor of NaN."""
    nan = torch.full((4, 3, 24), torch.nan)
    x, weight, rstd = randn(4, 3, 24), randn(24, seed=1), randn(4, 3, seed=2).abs()
    flat = randn(4, 33)
    q = quantize(randn(6, 64), QuantSpec())
    yield "rms_norm_out", (x, weight, 1e-5, 0.0, nan.clone())
    yield "rms_norm_backward_out", (x, x, weight, rstd, 0.0, False, nan.clone())
    yield "rms_norm_backward_out", (x, x, weight, rstd, 1.0, True, x.clone())
    stats = randn(4, 3, 2, seed=2).abs()
    yield "layer_norm_out", (x, weight, randn(24, seed=3), 1e-5, nan.clone())
    yield "layer_norm_out", (x, weight, None, 1e-5, nan.clone())
    yield "layer_norm_backward_out", (x, x, weight, stats, False, nan.clone())
    yield "layer_norm_backward_out", (x, x, weight, stats, True, x.clone())
    yield "rope_", (x, randn(4, 10), randn(4, 10, seed=3), False, False)
    yield "rope_", (x, randn(4, 10), randn(4, 10, seed=3), True, True)
    yield "gelu_out", (flat, torch.full((4, 33), torch.nan))
    yield "gelu_backward_out", (flat, flat, *(torch.full((4, 33), torch.nan) for _ in range(2)))
    yield "gelu_backward_out", (flat, flat, torch.full((4, 33), torch.nan), None)
    yield "swiglu_out", (flat, flat, torch.full((4, 33), torch.nan))
    nans = [torch.full((4, 33), torch.nan) for _ in range(3)]
    yield "swiglu_backward_out", (flat, flat, flat, *nans)
    yield "swiglu_backward_out", (flat, flat, flat, nans[0], nans[1], None)
    yield "geglu_out", (flat, flat, torch.full((4, 33), torch.nan))
    yield "geglu_backward_out", (flat, flat, flat, *nans)
    yield "cross_entropy_", (flat, torch.tensor([1, -1, 32, 0]), torch.tensor(0.5))
    yield "adamw_", (flat, flat.clone(), flat.clone(), flat.abs(), 2, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0)
    eight = [torch.randint(0, 256, (300,), dtype=torch.uint8) for _ in range(2)] + [torch.rand(2), torch.rand(2)]
    yield "adamw_8bit_", (randn(300), randn(300), *eight, 2, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0)
    yield "gemv_4bit", (randn(2, 64), q.packed, q.scales, [6, 64], "nf4", 64, True)


def test_every_op_passes_opcheck(body):
    if body == ("reference", *ISAS)[-1]:
        for name, arguments in examples():
            torch.library.opcheck(getattr(torch.ops.nybble, name).default, arguments)


def test_wrong_arguments_are_refused():
    x = randn(4, 8)
    for call in (
        lambda: rms_norm(x, randn(7), 1e-5),
        lambda: rms_norm(x.t(), randn(4), 1e-5),
        lambda: rms_norm(x.long(), randn(8), 1e-5),
        lambda: rms_norm(x, randn(8), 1e-5, out=randn(4, 8, dtype=torch.bfloat16)),
        lambda: layer_norm(x, randn(8), randn(7), 1e-5),
        lambda: layer_norm(x, randn(8), randn(8).bfloat16(), 1e-5),
        lambda: layer_norm_backward(x, x, randn(8), randn(4)),
        lambda: gelu(x[:, None]),
        lambda: gelu_backward(x, x[:, :7]),
        lambda: rope_(x, randn(4, 4), randn(4, 4)),
        lambda: rope_(x[:, None], randn(4, 5), randn(4, 5)),
        lambda: swiglu(x, randn(4, 7)),
        lambda: cross_entropy_(x, torch.zeros(3, dtype=torch.int64), 1.0),
        lambda: adamw_(x, x[:2], x, x, step=1, lr=0.1),
        lambda: adamw_(x, x, x, x, step=0, lr=0.1),
        lambda: adamw_8bit_(x, x, x, x, randn(1), randn(1), step=1, lr=0.1),
        lambda: adamw_8bit_(x, x, x.byte(), x.byte(), randn(2), randn(1), step=1, lr=0.1),
        lambda: gemv_4bit(randn(1, 63), quantize(randn(4, 64), QuantSpec())),
    ):
        with pytest.raises(KernelError):
            call()


@needs_cpp
def test_fp16_has_no_kernel_and_says_so():
    x = randn(4, 8).half()
    with registry.use("cpp"), pytest.raises(KernelError, match="has no fp16 body"):
        rms_norm(x, randn(8), 1e-5)
    with registry.use("cpp", "reference"):
        assert rms_norm(x, randn(8), 1e-5)[0].dtype == torch.float16
