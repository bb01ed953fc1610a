"""Packed attention against dense masked attention with autograd in fp64, and against PyTorch's own bf16 attention.

Every C++ body runs where this CPU has it, the lower ones by force. Inputs are slices of one fused buffer, gradients
are written into slices of another; buffers and fresh tensors start as NaN.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import FormatError, KernelError
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.backends.reference import attention
from nybble.kernels.ops.attention import attention_backward, attention_forward

WHY_NOT_BUILT = library.why_unavailable()
needs_cpp = pytest.mark.skipif(WHY_NOT_BUILT is not None, reason=str(WHY_NOT_BUILT))
ISAS = library.supported_isas() if WHY_NOT_BUILT is None else ()

# document lengths, query heads, key heads, head_dim, window
SHAPES = [
    ([1], 1, 1, 64, None),
    ([64], 2, 1, 64, None),
    ([65, 63], 3, 3, 64, None),
    ([1, 2, 200, 17, 1], 6, 2, 64, None),
    ([300], 4, 1, 128, None),
    ([130, 70], 10, 2, 16, None),
    ([97], 2, 1, 2, None),
    ([150], 2, 1, 34, None),
    ([90, 40], 2, 2, 80, 33),
    ([129], 1, 1, 256, None),
    ([260], 2, 1, 64, 1),
    ([300, 5], 4, 2, 64, 64),
    ([700], 2, 1, 32, 100),
    ([64, 0, 31], 2, 1, 64, None),
    ([900], 2, 2, 64, 500),  # backward split by queries, each part seeing other keys
]
ids = [f"{'+'.join(map(str, s[0]))}-{s[1]}q{s[2]}kv-d{s[3]}-w{s[4]}" for s in SHAPES]


@pytest.fixture(params=ISAS)
def isa(request):
    with library.use_isa(request.param), registry.use("cpp"):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_fresh_memory():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def fused(tokens, heads, kv_heads, head_dim, dtype):
    """NaN-filled slices q, k, v of one buffer, and the columns of it that belong to none of them."""
    width = (heads + 2 * kv_heads) * head_dim
    buffer = torch.full((tokens, width + 6), torch.nan, dtype=dtype)
    q, k, v = (
        part.unflatten(1, (-1, head_dim))
        for part in buffer[:, :width].split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 1)
    )
    return (q, k, v), buffer[:, width:]


def example(lengths, heads, kv_heads, head_dim, dtype, seed=0, size=1.0):
    """q, k, v, dout."""
    generator = torch.Generator().manual_seed(seed)
    (q, k, v), _ = fused(sum(lengths), heads, kv_heads, head_dim, dtype)
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator) * size)
    return q, k, v, torch.randn(q.shape, generator=generator).to(dtype)


def dense(q, k, v, dout, lengths, window=None, scale=None, softcap=0.0):
    """out, lse, dq, dk, dv in fp64 from the whole masked score matrix and autograd."""
    q, k, v = (x.detach().double().clone().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(q))
    distance = position[:, None] - position
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(q)))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * (scale or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
    out.backward(dout.double())
    return [x.detach() for x in (out, scores.logsumexp(-1), q.grad, k.grad, v.grad)]


def run(q, k, v, dout, lengths, window=None, scale=None, softcap=0.0):
    """out, lse, dq, dk, dv of the ops, the gradients written into a fused buffer."""
    cu_seqlens = starts(lengths)
    how = {"scale": scale, "window": window, "softcap": softcap}
    out, lse = attention_forward(q, k, v, cu_seqlens, max(lengths, default=0), **how)
    grads, remainder = fused(len(q), q.shape[1], k.shape[1], q.shape[2], q.dtype)
    returned = attention_backward(dout, q, k, v, out, lse, cu_seqlens, max(lengths, default=0), **how, grads=grads)
    assert all(a is b for a, b in zip(returned, grads, strict=True))
    assert remainder.isnan().all()
    return [out, lse, *grads]


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# ---- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "head_dim", "window"), SHAPES, ids=ids)
def test_reference_is_dense_attention(lengths, heads, kv_heads, head_dim, window, monkeypatch):
    monkeypatch.setattr(attention, "REFERENCE_ROWS", 48)
    inputs = example(lengths, heads, kv_heads, head_dim, torch.float64)
    with registry.use("reference"):
        results = run(*inputs, lengths, window)
    for got, exact in zip(results, dense(*inputs, lengths, window), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@functools.cache
def shape_case(index, dtype):
    """Inputs and exact results of SHAPES[index]."""
    *sizes, window = SHAPES[index]
    inputs = example(*sizes, dtype)
    return inputs, dense(*inputs, sizes[0], window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=ids)
def test_shapes(isa, index, dtype):
    inputs, exact_results = shape_case(index, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    for got, exact in zip(run(*inputs, SHAPES[index][0], SHAPES[index][4]), exact_results, strict=True):
        # A window of 1, or documents of one token, have dq = dk = 0: nothing to be relative to.
        assert (got.double() - exact).norm() <= tolerance * max(exact.norm(), inputs[3].double().norm())


def pytorch_attention(q, k, v, dout, lengths):
    """out, dq, dk, dv by PyTorch's own kernel, a document at a time."""
    parts = []
    for document in zip(*(x.split(lengths) for x in (q, k, v, dout)), strict=True):
        leaves = [x.detach().clone().transpose(0, 1)[None].requires_grad_() for x in document[:3]]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        out.backward(document[3].transpose(0, 1)[None])
        parts.append([x[0].transpose(0, 1).detach() for x in (out, *(leaf.grad for leaf in leaves))])
    return [torch.cat(results) for results in zip(*parts, strict=True)]


@functools.cache
def bf16_case(lengths, heads, kv_heads, head_dim, size):
    """Inputs, exact results, and the errors of PyTorch's out, dq, dk and dv."""
    inputs = example(lengths, heads, kv_heads, head_dim, torch.bfloat16, size=size)
    exact = dense(*inputs, lengths)
    peers = pytorch_attention(*inputs, lengths)
    return inputs, exact, [relative_error(*pair) for pair in zip(peers, [exact[0], *exact[2:]], strict=True)]


@pytest.mark.parametrize(
    "case",
    [
        ((256, 256), 9, 3, 64, 1.0),
        ((215, 100, 33, 300), 3, 1, 64, 1.0),
        ((300,), 4, 2, 128, 1.0),
        ((200,), 3, 1, 64, 3.0),  # sharper: few keys carry the weight
        ((500,), 2, 1, 64, 0.1),  # flat
    ],
    ids=str,
)
def test_bf16_is_as_exact_as_pytorch(isa, case):
    inputs, (exact_out, exact_lse, *exact_grads), peer_errors = bf16_case(*case)
    out, lse, *grads = run(*inputs, case[0])
    assert relative_error(lse, exact_lse) < 1e-6
    for got, exact, peer_error in zip([out, *grads], [exact_out, *exact_grads], peer_errors, strict=True):
        assert relative_error(got, exact) <= 1.1 * peer_error


@needs_cpp
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_shape(data):
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=3).filter(any), "lengths")
    kv_heads, group = data.draw(st.integers(1, 2), "kv_heads"), data.draw(st.integers(1, 5), "group")
    head_dim = 2 * data.draw(st.integers(1, 80), "half head_dim")
    window = data.draw(st.none() | st.integers(1, 150), "window")
    isa = data.draw(st.sampled_from(ISAS), "isa")
    inputs = example(lengths, kv_heads * group, kv_heads, head_dim, torch.float32)
    with library.use_isa(isa), registry.use("cpp"):
        results = run(*inputs, lengths, window)
    for got, exact in zip(results, dense(*inputs, lengths, window), strict=True):
        assert (got.double() - exact).norm() <= 2e-6 * max(exact.norm(), inputs[3].double().norm())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "size"), [(50.0, 1.0), (1.5, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("index", [3, 8, 12])
def test_a_soft_cap_on_the_scores(isa, backend, dtype, softcap, size, index):
    """Far above the scores, about as large as they are, and far below."""
    *sizes, window = SHAPES[index]
    inputs = example(*sizes, dtype, size=size)
    exact_results = dense(*inputs, sizes[0], window, softcap=softcap)
    with registry.use(backend):
        results = run(*inputs, sizes[0], window, softcap=softcap)
    tolerance = 2e-6 if dtype == torch.float32 else 6e-3
    for got, exact in zip(results, exact_results, strict=True):
        assert (got.double() - exact).norm() <= tolerance * max(exact.norm(), inputs[3].double().norm())


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_scores_of_any_size(isa, size):
    # With size 30 the scores reach thousands, whose exponentials overflow unless the maximum is taken out; and exp
    # turns the rounding of a score of 5000 into a relative error of 5e-4, in the twin as well.
    inputs = example([150], 2, 1, 64, torch.float32, size=size)
    with registry.use("reference"):
        twin = run(*inputs, [150])
    for got, peer, exact in zip(run(*inputs, [150]), twin, dense(*inputs, [150]), strict=True):
        assert relative_error(got, exact) <= 2 * relative_error(peer, exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explicit_scale(isa, dtype):
    inputs = example([70, 30], 2, 1, 64, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    results, exact = run(*inputs, [70, 30], scale=0.3), dense(*inputs, [70, 30], scale=0.3)
    assert all(relative_error(*pair) < tolerance for pair in zip(results, exact, strict=True))


# ---- the same, however it is computed ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_unpacked(isa, dtype):
    lengths = [300, 1, 64, 515]
    inputs = example(lengths, 6, 2, 64, dtype)
    packed = run(*inputs, lengths)
    alone = [run(*parts, [len(parts[0])]) for parts in zip(*(x.split(lengths) for x in inputs), strict=True)]
    out, lse, *grads = ([results[i] for results in alone] for i in range(5))
    assert torch.equal(packed[0], torch.cat(out))
    assert torch.equal(packed[1], torch.cat(lse, 1))
    for got, expected in zip(packed[2:], grads, strict=True):  # sums may be split elsewhere: not bit for bit
        assert relative_error(got, torch.cat(expected).double()) < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("lengths", [[1100], [200, 30, 400]], ids=str)
def test_threads_change_nothing(isa, lengths, threads):
    inputs = example(lengths, 6, 2, 64, torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(*inputs, lengths))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scratch_memory_of_earlier_calls_does_not_show(isa, dtype):
    lengths = [100, 37]
    inputs = example(lengths, 4, 2, 48, dtype)
    first = run(*inputs, lengths)
    run(*(torch.full_like(x, torch.nan) for x in inputs), lengths)
    assert all(map(torch.equal, first, run(*inputs, lengths)))


def test_rows_apart_or_not(isa):
    lengths = [90, 20]
    inputs = example(lengths, 4, 2, 64, torch.bfloat16)
    contiguous = [x.contiguous() for x in inputs]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    first = run(*inputs, lengths)
    assert all(map(torch.equal, first, run(*contiguous, lengths)))
    assert all(map(torch.equal, first, run(*heads_first, lengths)))
    dout = inputs[3][:, :1].expand(inputs[3].shape)  # as autograd hands on a broadcast gradient
    repeated = run(*inputs[:3], dout, lengths)
    assert all(map(torch.equal, repeated, run(*inputs[:3], dout.contiguous(), lengths)))


def test_gradients_are_allocated_when_not_given(isa):
    q, k, v, dout = example([50], 2, 1, 64, torch.float32)
    out, lse = attention_forward(q, k, v, starts([50]), 50)
    grads = attention_backward(dout, q, k, v, out, lse, starts([50]), 50)
    assert all(map(torch.equal, grads, run(q, k, v, dout, [50])[2:]))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(isa, lengths):
    out, lse, *grads = run(*example(lengths, 2, 1, 64, torch.bfloat16), lengths)
    assert out.shape == (0, 2, 64)
    assert lse.shape == (2, 0)
    assert [grad.shape[0] for grad in grads] == [0, 0, 0]


def test_a_window_as_long_as_the_document_is_none(isa):
    inputs = example([200], 2, 1, 64, torch.float32)
    assert all(map(torch.equal, run(*inputs, [200]), run(*inputs, [200], window=200)))


def test_nan_stays_in_its_document(isa):
    lengths = [80, 80]
    q, k, v, dout = example(lengths, 2, 1, 64, torch.bfloat16)
    clean = run(q, k, v, dout, lengths)
    k[100, 0, 5] = torch.nan
    results = run(q, k, v, dout, lengths)
    for got, expected in zip([results[0], *results[2:]], [clean[0], *clean[2:]], strict=True):
        assert torch.equal(got[:80], expected[:80])
    assert results[0][100:].isnan().all()
    assert results[2][100:].isnan().all()


# ---- the ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_opcheck(backend):
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh gradients' memory, which NaN would spoil
    q, k, v, dout = (x.contiguous() for x in example([9, 20], 4, 2, 16, torch.float32))
    with registry.use(backend):
        torch.library.opcheck(torch.ops.nybble.packed_attention.default, (q, k, v, starts([9, 20]), 20, 0.25, 8, 0.5))
        out, lse = attention_forward(q, k, v, starts([9, 20]), 20)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        torch.library.opcheck(
            torch.ops.nybble.packed_attention_backward.default,
            (dout, q, k, v, out, lse, starts([9, 20]), 20, 0.25, 0, 0.0, *grads),
        )


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.float32, 7), (torch.float32, 258)])
def test_what_cpp_lacks_falls_to_the_reference_unless_cpp_was_asked_for(dtype, head_dim):
    inputs = example([20], 2, 1, head_dim, dtype)
    exact = dense(*inputs, [20])
    assert all(relative_error(*pair) < 2e-3 for pair in zip(run(*inputs, [20]), exact, strict=True))
    with registry.use("cpp"), pytest.raises(KernelError):
        run(*inputs, [20])


BAD_INPUTS = {
    "no heads dimension": lambda q, k, v, cu: (q[:, 0], k, v, cu),
    "heads not a multiple": lambda q, k, v, cu: (q[:, :3], k, v, cu),
    "no key heads": lambda q, k, v, cu: (q, k[:, :0], v[:, :0], cu),
    "k shorter": lambda q, k, v, cu: (q, k[:-1], v, cu),
    "v of other heads": lambda q, k, v, cu: (q, k, v[:, :1], cu),
    "head_dim differs": lambda q, k, v, cu: (q, k[..., :8], v[..., :8], cu),
    "dtype differs": lambda q, k, v, cu: (q, k.bfloat16(), v, cu),
    "integers": lambda q, k, v, cu: (q.int(), k.int(), v.int(), cu),
    "int64 cu_seqlens": lambda q, k, v, cu: (q, k, v, cu.long()),
    "no cu_seqlens": lambda q, k, v, cu: (q, k, v, cu[:0]),
    "starts late": lambda q, k, v, cu: (q, k, v, cu + 1),
    "ends early": lambda q, k, v, cu: (q, k, v, cu[:-1]),
    "ends late": lambda q, k, v, cu: (q, k, v, torch.cat([cu, cu[-1:] + 1])),
    "falls": lambda q, k, v, cu: (q, k, v, torch.tensor([0, 40, 30, 50], dtype=torch.int32)),
}


@pytest.mark.parametrize("spoil", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_of_forward(spoil):
    q, k, v, _ = example([30, 20], 4, 2, 16, torch.float32)
    with pytest.raises(FormatError):
        attention_forward(*spoil(q, k, v, starts([30, 20])), 40)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": -1.0}, {"scale": float("nan")}, {"window": -1}], ids=str)
def test_bad_scale_or_window(wrong):
    q, k, v, _ = example([10], 1, 1, 16, torch.float32)
    with pytest.raises(FormatError):
        attention_forward(q, k, v, starts([10]), 10, **wrong)


def test_a_document_that_is_longer_than_the_longest():
    q, k, v, _ = example([7, 10], 1, 1, 16, torch.float32)
    for backend in ("reference", "cpp") if WHY_NOT_BUILT is None else ("reference",):
        with registry.use(backend), pytest.raises(FormatError, match="max_length is 9"):
            attention_forward(q, k, v, starts([7, 10]), 9)


def test_bad_input_of_backward():
    q, k, v, dout = example([10], 2, 1, 16, torch.float32)
    out, lse = attention_forward(q, k, v, starts([10]), 10)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    good = tensors | {"cu_seqlens": starts([10]), "max_length": 10}
    for name, wrong in {"dout": dout[1:], "out": out[:, :1], "lse": lse.T.contiguous()}.items():
        with pytest.raises(FormatError, match=name):
            attention_backward(**good | {name: wrong})
    with pytest.raises(FormatError, match="dk"):
        attention_backward(**good, grads=(torch.empty_like(q), torch.empty_like(q), torch.empty_like(v)))
