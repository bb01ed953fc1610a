"""A whole decoding step against the formulas in fp64: op by op, and in C++ on every instruction set.

Fresh tensors start as NaN, and so does every column of the cache that a text does not have, or as a large number.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nybble.errors import KernelError
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.backends.cpp.decode import Kernel
from nybble.kernels.backends.reference.decode import OpByOp
from nybble.kernels.ops.cached_attention import cached_attention
from nybble.kernels.ops.decode import (
    MAX_ROWS,
    NO_ROPE,
    DecoderInput,
    DecoderLayer,
    DecoderLinear,
    DecoderModel,
    DecoderNorm,
    decoder,
)
from nybble.kernels.ops.four_bit import dequantize, quantize

ISAS = library.supported_isas() if library.why_unavailable() is None else ()
# Of the logits' norm; bf16: keys, values and what enters a product are rounded, some ten times in two layers.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
VOCABULARY, CAPACITY, LAYERS = 37, 21, 2


# Op by op in fp32 alone: oneDNN compiles each shape of bf16 anew, which takes a minute.
RUNS = [("reference", torch.float32), *itertools.product(ISAS, TOLERANCE)]


@pytest.fixture(params=RUNS, ids=str)
def run(request):
    """The body that runs, and the type of the cache."""
    body, dtype = request.param
    if body == "reference":
        with registry.use("reference"):
            yield body, dtype
    else:
        with library.use_isa(body), registry.use("cpp"):
            yield body, dtype


@pytest.fixture(autouse=True)
def fresh_tensors_are_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Random:
    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, std=1.0, mean=0.0):
        return torch.randn(shape, generator=self.generator) * std + mean

    def linear(self, out, width, weight, bias=False, rank=0):
        """`weight`: a QuantSpec, or the dtype of a dense one."""
        dense = self.normal(out, width, std=width**-0.5)
        return DecoderLinear(
            quantize(dense, weight) if isinstance(weight, QuantSpec) else dense.to(weight),
            self.normal(out, std=0.3) if bias else None,
            self.normal(rank, width, std=width**-0.5) if rank else None,
            self.normal(out, rank, std=0.3) if rank else None,
        )

    def norm(self, width):
        return DecoderNorm(self.normal(width, std=0.3, mean=1.0), 1e-5)

    def layer_norm(self, width, bias):
        return replace(self.norm(width), bias=self.normal(width, std=0.3) if bias else None, centred=True)

    def layer(self, hidden, heads, kv_heads, head_dim, mlp, weight, bias, ranks, window, head_norms):
        def projection(width, *outs):
            return [self.linear(out, width, weight, bias, rank) for out, rank in zip(outs, ranks, strict=False)]

        q, kv = heads * head_dim, kv_heads * head_dim
        return DecoderLayer(
            projection(hidden, q, kv, kv),
            projection(q, hidden),
            projection(hidden, mlp, mlp),
            projection(mlp, hidden),
            self.norm(hidden),
            self.norm(hidden),
            self.norm(head_dim) if head_norms else None,
            self.norm(head_dim) if head_norms else None,
            heads,
            kv_heads,
            head_dim,
            window,
            head_dim**-0.5,
        )


# ---- the formulas --------------------------------------------------------------------------------


def project(linears, x):
    def one(linear):
        w = dequantize(linear.weight, torch.float32) if isinstance(linear.weight, QuantizedTensor) else linear.weight
        y = x @ w.double().T
        if linear.bias is not None:
            y = y + linear.bias.double()
        return y if linear.a is None else y + x @ linear.a.double().T @ linear.b.double().T

    return torch.cat([one(linear) for linear in linears], dim=-1)


def norm(n, x):
    if n is not None and n.centred:
        return F.layer_norm(x, x.shape[-1:], n.weight.double(), None if n.bias is None else n.bias.double(), n.eps)
    return x if n is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + n.eps) * n.weight.double()


def rotate(x, cos, sin, neighbours=False):
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if neighbours:
        a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    cos, sin = cos[:, None].double(), sin[:, None].double()
    turned = a * cos - b * sin, b * cos + a * sin
    if neighbours:
        return torch.cat([torch.stack(turned, dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([*turned, rest], dim=-1)


def norm_heads(n, heads):
    """Each, or all of a row together, by the norm's width."""
    together = n is not None and len(n.weight) != heads.shape[-1]
    return norm(n, heads.flatten(1)).view(heads.shape) if together else norm(n, heads)


def expected_logits(layers, last_norm, head, x, cos, sin, cache, texts, columns, starts, inputs=None):
    """In fp64; `cache`, fp64, is written to."""
    x = x.double()
    for i, (layer, (keys, values)) in enumerate(zip(layers, cache, strict=True)):
        heads = project(layer.qkv, norm(layer.input_norm, x)).unflatten(-1, (-1, layer.head_dim))
        q, k, v = heads.tensor_split([layer.num_heads, layer.num_heads + layer.num_kv_heads], dim=1)
        q, k, v = norm_heads(layer.q_norm, q), norm_heads(layer.k_norm, k), k if layer.values_are_keys else v
        if layer.rope != NO_ROPE:
            q = rotate(q, cos[layer.query_rope], sin[layer.query_rope], layer.neighbours)
            k = rotate(k, cos[layer.rope], sin[layer.rope], layer.neighbours)
        if layer.reads_keys is None:
            keys[texts, :, columns], values[texts, :, columns] = k, norm_heads(layer.v_norm, v)
        mixed = []
        for row, (text, column, start) in enumerate(zip(texts, columns, starts, strict=True)):
            first = max(start, column + 1 - layer.window) if layer.window else start
            seen = slice(first, column + 1)
            group = layer.num_heads // layer.num_kv_heads
            k_seen, v_seen = (kv[text, :, seen].repeat_interleave(group, dim=0) for kv in (keys, values))
            scores = torch.einsum("hd,hcd->hc", q[row], k_seen) * layer.scale
            if layer.softcap:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            mixed.append(torch.einsum("hc,hcd->hd", scores.softmax(-1), v_seen).flatten())
        x2 = x + layer.residual * norm(layer.attention_output_norm, project(layer.o, torch.stack(mixed)))
        inner = project(layer.gate_up, norm(layer.mlp_norm, x if layer.parallel else x2))
        gate, up = inner.chunk(2, dim=-1) if layer.gated else (inner, 1.0)
        act = F.silu(gate) if layer.activation == "silu" else F.gelu(gate, approximate="tanh")
        x = x2 + layer.residual * norm(layer.mlp_output_norm, project(layer.down, act * up))
        if layer.own_input is not None:
            gate = F.gelu(project(layer.own_input.gate, x), approximate="tanh")
            x = x + norm(layer.own_input.norm, project(layer.own_input.project, gate * inputs[:, i].double()))
        x = x * layer.factor
    return project([head], norm(last_norm, x))


# ---- the tests -----------------------------------------------------------------------------------

NF4 = QuantSpec()
SHAPES = {  # hidden, heads, kv heads, head_dim, mlp, weight, bias, ranks, window, head norms
    "whole blocks": (128, 6, 2, 64, 192, NF4, False, (), 0, False),
    "adapters": (128, 4, 2, 64, 192, NF4, False, (4, 4, 4), 0, False),
    "adapters of different ranks, some none": (64, 2, 2, 32, 128, NF4, True, (3, 0, 17), 0, True),
    "biases, window": (64, 4, 1, 32, 128, NF4, True, (), 5, False),
    "head norms, wide heads, window of one": (128, 2, 1, 128, 64, NF4, False, (2, 2, 2), 1, True),
    "blocks over rows": (80, 3, 1, 80, 72, NF4, True, (2, 2, 2), 0, False),
    "odd widths": (33, 2, 1, 18, 51, NF4, True, (1, 1, 1), 4, True),
    "blocks of 32, zero points": (96, 2, 2, 48, 160, QuantSpec("int4_asym", 32), False, (), 0, False),
    "blocks of 128, fp4, scales as they are": (128, 4, 4, 32, 256, QuantSpec("fp4", 128, False), False, (), 0, False),
    "blocks larger than rows": (64, 2, 1, 32, 64, QuantSpec("int4", 4096), False, (), 0, False),
    "dense fp32": (70, 5, 1, 14, 90, torch.float32, True, (3, 3, 3), 0, False),
    "dense bf16": (64, 2, 1, 32, 72, torch.bfloat16, False, (2, 2, 2), 0, False),
    "dense fp16": (64, 2, 1, 32, 72, torch.float16, False, (), 0, False),
}
PLACES = {  # texts, columns, starts
    "first token": ([0], [0], [0]),
    "one text": ([0], [18], [0]),
    "ragged": ([0, 1, 2], [17, 17, 17], [0, 17, 9]),
    "in another order": ([4, 1], [20, 3], [2, 1]),
    "several tokens of one text": ([1, 1, 1, 0], [6, 7, 8, 3], [2, 2, 2, 0]),
    "as many as there may be": (list(range(MAX_ROWS)), [12] * MAX_ROWS, [12, 0, 5, 7, 1, 11, 3, 4]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_what_the_formulas_say(run, shape):
    body, dtype = run
    random = Random()
    arguments = SHAPES[shape]
    hidden, _, kv_heads, head_dim = arguments[:4]
    ranks = (*arguments[7], 0, 0, 0)
    layers = [random.layer(*arguments[:7], ranks, *arguments[8:]) for _ in range(LAYERS)]
    last_norm, head = random.norm(hidden), random.linear(VOCABULARY, hidden, torch.bfloat16)
    ready = decoder(DecoderModel(layers, last_norm, head, dtype))
    poison = 1e4 if body == "reference" else torch.nan  # op by op, what is not seen is multiplied by zero
    for places in PLACES.values():
        texts, columns, starts = map(torch.tensor, places)
        x, half = random.normal(len(texts), hidden).to(dtype), head_dim // 2 - head_dim // 8  # the rest is not turned
        angles = columns[:, None] / 100 ** (torch.arange(half) / half)
        cache = random.normal(LAYERS, 2, int(texts.max()) + 1, kv_heads, CAPACITY, head_dim).to(dtype)
        for text, (first, last) in enumerate(columns_before(places, cache.shape[2])):
            cache[:, :, text, :, :first] = poison
            cache[:, :, text, :, last:] = poison
        before, exact = cache.clone(), cache.double()
        rest = layers, last_norm, head, x, angles.cos()[None], angles.sin()[None], exact, texts, columns, starts
        expected = expected_logits(*rest)
        got = ready.step(x, angles.cos()[None], angles.sin()[None], cache, texts, columns, starts)
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        new = torch.zeros_like(cache, dtype=torch.bool)
        new[:, :, texts, :, columns] = True
        torch.testing.assert_close(cache[~new], before[~new], rtol=0, atol=0, equal_nan=True)
        assert (cache.double()[new] - exact[new]).norm() <= TOLERANCE[dtype] * exact[new].norm()


def columns_before(places, num_texts):
    """The columns that each text has before the step."""
    texts, columns, starts = places
    for text in range(num_texts):
        rows = [row for row, each in enumerate(texts) if each == text]
        yield (starts[rows[0]], min(columns[row] for row in rows)) if rows else (0, 0)


@pytest.mark.parametrize("softcap", [0.0, 0.5])
def test_what_other_families_have(run, softcap):
    """GeGLU, norms of what is added, a soft cap, and rotary angles of each layer's own."""
    _, dtype = run
    random = Random()
    layers = []
    for rope, window in enumerate((3, 0)):
        plain = random.layer(48, 4, 2, 18, 56, NF4, False, (2, 2, 2), window, True)
        others = {"attention_output_norm": random.norm(48), "mlp_output_norm": random.norm(48), "softcap": softcap}
        layers.append(replace(plain, activation="gelu_pytorch_tanh", rope=rope, query_rope=1, **others))
    last_norm, head = random.norm(48), random.linear(VOCABULARY, 48, torch.bfloat16)
    ready = decoder(DecoderModel(layers, last_norm, head, dtype))
    texts, columns, starts = map(torch.tensor, PLACES["ragged"])
    x, cache = random.normal(3, 48).to(dtype), random.normal(LAYERS, 2, 3, 2, CAPACITY, 18).to(dtype)
    angles = columns[None, :, None] / torch.tensor([10.0, 100.0])[:, None, None] ** (torch.arange(9) / 9)
    exact = cache.double()
    expected = expected_logits(layers, last_norm, head, x, angles.cos(), angles.sin(), exact, texts, columns, starts)
    got = ready.step(x, angles.cos(), angles.sin(), cache, texts, columns, starts)
    assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (cache.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def bare(layer, random):
    """Without what there may be none of: norms of what is read, rotary angles. Norms of all heads, and a factor."""
    norms = {"attention_output_norm": random.norm(48), "mlp_output_norm": random.norm(48)}
    whole = {"q_norm": random.norm(4 * 18), "k_norm": random.norm(2 * 18)}
    return replace(
        layer, input_norm=None, mlp_norm=None, rope=NO_ROPE, query_rope=NO_ROPE, residual=0.6, **norms, **whole
    )


def beside(layer, random):
    """The MLP beside attention, without a gate; LayerNorm with bias and without; neighbours turned together."""
    norms = {"input_norm": random.layer_norm(48, bias=True), "mlp_norm": random.layer_norm(48, bias=False)}
    mlp = {"gate_up": layer.gate_up[:1], "activation": "gelu_new", "gated": False}
    return replace(layer, parallel=True, neighbours=True, residual=1.5, **norms, **mlp)


@pytest.mark.parametrize("other", [bare, beside])
def test_what_layers_lack_or_have_otherwise(run, other):
    _, dtype = run
    random = Random()
    layers = [other(random.layer(48, 4, 2, 18, 56, NF4, True, (2, 2, 2), 3, False), random) for _ in range(LAYERS)]
    last_norm, head = random.layer_norm(48, bias=True), random.linear(VOCABULARY, 48, torch.bfloat16)
    ready = decoder(DecoderModel(layers, last_norm, head, dtype))
    texts, columns, starts = map(torch.tensor, PLACES["ragged"])
    x, cache = random.normal(3, 48).to(dtype), random.normal(LAYERS, 2, 3, 2, CAPACITY, 18).to(dtype)
    angles = (columns[:, None] / 10 ** (torch.arange(7) / 7))[None]
    exact = cache.double()
    expected = expected_logits(layers, last_norm, head, x, angles.cos(), angles.sin(), exact, texts, columns, starts)
    got = ready.step(x, angles.cos(), angles.sin(), cache, texts, columns, starts)
    assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (cache.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_layers_that_read_more_than_states(run):
    """Inputs of their own, keys and values of an earlier layer, values that are the keys; heads of other widths."""
    _, dtype = run
    random = Random()
    wide, narrow = (random.layer(48, 4, 2, width, 56, NF4, False, (2, 2, 2), 0, True) for width in (34, 18))
    narrow = replace(narrow, rope=1, query_rope=1, v_norm=random.norm(18), qkv=narrow.qkv[:2], values_are_keys=True)
    layers = [replace(wide, v_norm=random.norm(34)), narrow]
    for source, layer in enumerate(tuple(layers)):
        layers.append(replace(layer, qkv=layer.qkv[:1], reads_keys=source, values_are_keys=False))
    for i, layer in enumerate(layers):
        own = DecoderInput(
            [random.linear(10, 48, NF4, rank=2)], [random.linear(48, 10, torch.float32, rank=3)], random.norm(48)
        )
        layers[i] = replace(layer, activation="gelu_pytorch_tanh", own_input=own, factor=0.7 + 0.2 * i)
    last_norm, head = random.norm(48), random.linear(VOCABULARY, 48, torch.bfloat16)
    ready = decoder(DecoderModel(layers, last_norm, head, dtype))
    texts, columns, starts = map(torch.tensor, PLACES["ragged"])
    x, inputs = random.normal(3, 48).to(dtype), random.normal(3, len(layers), 10).to(dtype)
    cache = [random.normal(2, 3, 2, CAPACITY, width).to(dtype) for width in (34, 18)]
    angles = [columns[:, None] / 10 ** (torch.arange(half) / half) for half in (17, 9)]
    exact = [each.double() for each in cache]
    turns = [each.cos() for each in angles], [each.sin() for each in angles]
    rest = (texts, columns, starts, inputs)
    expected = expected_logits(layers, last_norm, head, x, *turns, [*exact, *exact], *rest)
    got = ready.step(x, *turns, [*cache, *cache], *rest)
    assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    for found, wanted in zip(cache, exact, strict=True):
        assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_the_head_alone(run):
    _, dtype = run
    random = Random()
    layers = [random.layer(64, 2, 1, 32, 64, NF4, False, (0, 0, 0), 0, False)]
    last_norm, head = random.norm(64), random.linear(VOCABULARY, 64, torch.float32)
    ready = decoder(DecoderModel(layers, last_norm, head, dtype))
    x = random.normal(5, 64).to(dtype)
    before = x.clone()
    expected = project([head], norm(last_norm, x.double()))
    assert (ready.logits(x).double() - expected).norm() <= 3e-6 * expected.norm()
    assert torch.equal(x, before)


def model_in(weight, dtype):
    random = Random()
    layers = [random.layer(64, 2, 1, 32, 64, weight, False, (0, 0, 0), 0, False)]
    return DecoderModel(layers, random.norm(64), random.linear(VOCABULARY, 64, torch.float32), dtype)


@pytest.mark.skipif(not ISAS, reason=str(library.why_unavailable()))
def test_what_the_kernel_lacks_goes_op_by_op_unless_it_was_asked_for():
    assert isinstance(decoder(model_in(NF4, torch.bfloat16)), Kernel)
    with registry.use("reference"):
        assert isinstance(decoder(model_in(NF4, torch.bfloat16)), OpByOp)
    for weight, dtype, lacks in (
        (QuantSpec("nf3"), torch.float32, "not nf3"),
        (NF4, torch.float16, "not torch.float16"),
    ):
        model = model_in(weight, dtype)
        assert isinstance(decoder(model), OpByOp)
        with registry.use("cpp"), pytest.raises(KernelError, match=lacks):
            decoder(model)


def test_attention_to_a_cache_passes_opcheck_and_refuses_what_does_not_fit():
    heads, cache = torch.randn(2, 5, 6), torch.randn(2, 2, 1, 7, 6)
    texts, columns, starts = torch.tensor([1, 0]), torch.tensor([4, 4]), torch.tensor([0, 3])
    given = (heads, cache, texts, columns, starts, 0.5, 3, 0.0)
    torch.library.opcheck(
        torch.ops.nybble.cached_attention.default, given, test_utils=("test_schema", "test_faketensor")
    )
    for wrong in (
        (heads[:, :2], cache, texts),
        (heads, cache.transpose(2, 3), texts),
        (heads, cache.bfloat16(), texts),
        (heads, cache, texts.int()),
        (heads, cache, texts[:1]),
    ):
        with pytest.raises(KernelError):
            cached_attention(*wrong, columns, starts, scale=0.5)
