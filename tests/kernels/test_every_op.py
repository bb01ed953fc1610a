"""Every declared op on every backend, device and instruction set that runs here, in every dtype it takes.

One table of arguments serves all of them, so that a new backend is tested without being named here, and a new op until
it has arguments is missed by name. Results are compared with the plain-PyTorch bodies in fp32, which the other files
compare with formulas; fresh memory starts as NaN; rows lie apart; what an op is not declared to write stays as it was;
and outputs that are inputs get the bits that outputs of their own get.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.errors import FormatError, KernelError
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops.attention import attention_backward, attention_forward
from nybble.kernels.ops.checks import FLOAT_DTYPES
from nybble.kernels.ops.decode import NO_ROPE, DecoderLayer, DecoderLinear, DecoderModel, DecoderNorm, decoder
from nybble.kernels.ops.four_bit import quantize

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of the largest value
MANY_ROUNDINGS = {"decode": 1.5}  # layers and a head, op by op: times the tolerance
WIDTHS = (1, 7, 33, 64, 100)
GAP = 5  # elements between the rows of a buffer, which belong to nobody


@dataclass(frozen=True)
class Out:
    """An output: memory of its own that holds NaN, or an input of its shape and type where it may be one."""

    like: Tensor
    may_be_input: bool = True


# ---- arguments -----------------------------------------------------------------------------------


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows inside a wider buffer of NaN, as those of a slice of a fused projection."""
    width = normal(*shape[1:], seed=seed).numel()
    view = torch.full((shape[0], width + GAP), torch.nan, dtype=dtype)[:, :width].view(shape)
    return view.copy_(normal(*shape, seed=seed))


def norm_shapes() -> Iterator[tuple[int, ...]]:
    for width in WIDTHS:
        yield from ((5, width), (3, 2, width))


def rms_norm(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in norm_shapes():
        x = rows(*shape, seed=1, dtype=dtype)
        yield x, normal(shape[-1], seed=2, dtype=dtype), 1e-5, 1.0, Out(x)


def rms_norm_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in norm_shapes():
        grad, x, total = (rows(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3))
        weight, rstd = normal(shape[-1], seed=4, dtype=dtype), normal(*shape[:-1], seed=5).abs() + 0.1
        yield grad, x, weight, rstd, 1.0, False, Out(x)
        yield grad, x, weight, rstd, 0.0, True, total


def layer_norm(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in norm_shapes():
        x = rows(*shape, seed=1, dtype=dtype)
        weight, bias = (normal(shape[-1], seed=seed, dtype=dtype) for seed in (2, 3))
        yield x, weight, bias if len(shape) == 2 else None, 1e-5, Out(x)


def layer_norm_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in norm_shapes():
        grad, x, total = (rows(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3))
        weight, stats = normal(shape[-1], seed=4, dtype=dtype), normal(*shape[:-1], 2, seed=5).abs() + 0.1
        yield grad, x, weight, stats, False, Out(x)
        yield grad, x, weight, stats, True, total


def rope(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for head_dim, half in ((2, 1), (6, 3), (80, 16), (34, 17)):
        cos, sin = (normal(5, half, seed=seed) for seed in (2, 3))
        for neighbours, backward in itertools.product((False, True), repeat=2):
            yield rows(5, 3, head_dim, seed=1, dtype=dtype), cos, sin, neighbours, backward


def swiglu(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for width in WIDTHS:
        gate, up = (rows(5, width, seed=seed, dtype=dtype) for seed in (1, 2))
        yield gate, up, Out(gate)


def swiglu_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for width in WIDTHS:
        grad, gate, up = (rows(5, width, seed=seed, dtype=dtype) for seed in (1, 2, 3))
        yield grad, gate, up, Out(gate), Out(up), Out(grad)
        yield grad, gate, up, Out(gate), Out(up), None


def gelu(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for width in WIDTHS:
        x = rows(5, width, seed=1, dtype=dtype)
        yield x, Out(x)


def gelu_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for width in WIDTHS:
        grad, x = (rows(5, width, seed=seed, dtype=dtype) for seed in (1, 2))
        yield grad, x, Out(x), Out(grad)
        yield grad, x, Out(x), None


def cross_entropy(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for vocabulary in (1, 15, 33, 1000):
        targets = torch.arange(5) * 7919 % vocabulary
        targets[2] = -100
        yield rows(5, vocabulary, seed=1, dtype=dtype), targets, torch.tensor(0.5)


def adamw(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for count in (1, 7, 300) if dtype == torch.float32 else ():
        param, grad, exp_avg, exp_avg_sq = (normal(count, seed=seed) for seed in range(4))
        yield param, grad, exp_avg, exp_avg_sq.abs(), 3, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5


def adamw_8bit(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for count in (1, 7, 300) if dtype == torch.float32 else ():
        param, grad = (normal(count, seed=seed) for seed in range(2))
        codes = [(normal(count, seed=seed).abs() * 80).to(torch.uint8) for seed in (2, 3)]
        scales = [normal(-(-count // 256), seed=seed).abs() for seed in (4, 5)]
        yield param, grad, *codes, *scales, 3, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5


def packed(*shape: int, spec: QuantSpec) -> tuple[Tensor, Tensor, list[int], str, int, bool]:
    with registry.use("reference"):
        q = quantize(normal(*shape, seed=9), spec)
    return q.packed.clone(), q.scales.clone(), list(shape), spec.format, spec.block_size, spec.double_quant


def specs() -> Iterator[QuantSpec]:
    return itertools.starmap(QuantSpec, itertools.product(FORMATS, (32,), (False, True)))


def gemv(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for spec in specs():
        for rows, width in ((3, 33), (2, 72)):  # rows that begin within a byte; in words
            yield normal(rows, width, seed=1, dtype=dtype), *packed(7, width, spec=spec)


def quantize_4bit(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for spec in specs():
        yield normal(7, 33, seed=1, dtype=dtype), spec.format, spec.block_size, spec.double_quant


def dequantize_4bit(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for spec in specs():
        yield *packed(7, 33, spec=spec), dtype


def dequantize_4bit_out(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for spec in specs():
        yield *packed(7, 33, spec=spec), Out(torch.empty(7, 33, dtype=dtype))


def augmented_weight(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for spec in specs():
        wide = Out(torch.empty(7, 44 + GAP, dtype=dtype)[:, :44])  # 11 columns beside the weight
        yield *packed(7, 33, spec=spec), normal(7, 3, seed=4), 1.5, 5, wide
        yield *packed(7, 33, spec=spec), None, 1.0, 0, wide


def search_scales(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for format in ("nf4", "int4", "nf2") if dtype == torch.float32 else ():
        weight, importance = normal(5, 33, seed=1), normal(33, seed=2).abs()
        yield weight, importance, None, None, format, 32, [0.9, -1.1]
        yield weight, importance, normal(6, seed=3).abs(), normal(1, seed=4), format, 32, [0.9, -1.1]


def assign_columns(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for format in ("nf4", "int4", "nf2") if dtype == torch.float32 else ():
        yield normal(7, 33, seed=1), normal(33, seed=2), normal(7, 7, seed=3), format


def heads(dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """q, k, v, the documents' borders, and the gradient of what attention makes of them."""
    for num_heads, kv_heads, head_dim in ((2, 2, 16), (4, 1, 6)):
        q, k, v, grad = (
            rows(33, number, head_dim, seed=seed, dtype=dtype)
            for seed, number in enumerate((num_heads, kv_heads, kv_heads, num_heads))
        )
        yield q, k, v, torch.tensor([0, 20, 20, 33], dtype=torch.int32), grad


def packed_attention(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for q, k, v, borders, _ in heads(dtype):
        yield from ((q, k, v, borders, 20, 0.3, *others) for others in ((0, 0.0), (5, 0.0), (0, 0.7), (5, 0.7)))


def packed_attention_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for q, k, v, borders, grad in heads(dtype):
        for window, softcap in ((0, 0.0), (5, 0.7)):
            with registry.use("reference"):
                out, lse = attention_forward(q, k, v, borders, 20, scale=0.3, window=window, softcap=softcap)
            outputs = (Out(x, may_be_input=False) for x in (q, k, v))  # written before all inputs are read
            yield grad, q, k, v, out, lse, borders, 20, 0.3, window, softcap, *outputs


def decode(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Two layers, the second with head norms, adapters and a window; one with all else that there is; two without what
    there may be none of, or with the other kind. Two texts of unequal length.
    """
    seeds = itertools.count(10)

    def linears(width: int, *sizes: int, rank: int) -> list[DecoderLinear]:
        def one(out: int) -> DecoderLinear:
            with registry.use("reference"):
                weight = quantize(normal(out, width, seed=next(seeds)) * width**-0.5, QuantSpec("nf4", 32))
            low = (normal(rank, width, seed=next(seeds)) * width**-0.5, normal(out, rank, seed=next(seeds)) * 0.3)
            return DecoderLinear(weight, normal(out, seed=next(seeds)), *(low if rank else (None, None)))

        return [one(out) for out in sizes]

    def norm(width: int) -> DecoderNorm:
        return DecoderNorm(1 + 0.3 * normal(width, seed=next(seeds)), 1e-5)

    def layer(head_norms: bool, rank: int, window: int, *others: Any) -> DecoderLayer:
        projections = ((32, 32, 16, 16), (32, 32), (32, 40, 40), (40, 32))
        norms = (norm(32), norm(32), *(norm(16) if head_norms else None for _ in range(2)))
        sizes = 2, 1, 16, window, 0.25
        return DecoderLayer(*(linears(*each, rank=rank) for each in projections), *norms, *sizes, *others)

    head = DecoderLinear(normal(21, 32, seed=next(seeds)), None)
    plain = DecoderModel([layer(False, 0, 0), layer(True, 3, 4)], norm(32), head, dtype)
    others = norm(32), norm(32), "gelu_pytorch_tanh", 0.7, 1
    angles = torch.stack([normal(2, 5, seed=seed) for seed in (1, 4)])
    centred = [replace(norm(32), bias=normal(32, seed=next(seeds)), centred=True), replace(norm(32), centred=True)]
    beside = replace(
        layer(False, 2, 0), input_norm=centred[0], mlp_norm=centred[1], gate_up=linears(32, 40, rank=2),
        activation="gelu_new", gated=False, parallel=True, neighbours=True,
    )  # fmt: skip
    bare = replace(
        layer(False, 0, 0, *others), input_norm=None, mlp_norm=None, q_norm=norm(32), k_norm=norm(16), rope=NO_ROPE,
        query_rope=NO_ROPE, residual=0.6,
    )  # fmt: skip
    all_else = DecoderModel([layer(True, 0, 3, *others)], norm(32), head, dtype)
    for model in (plain, all_else, DecoderModel([beside, bare], centred[0], head, dtype)):
        cache = normal(len(model.layers), 2, 2, 1, 9, 16, seed=2, dtype=dtype)
        where = (torch.tensor(values) for values in ([0, 1], [7, 7], [0, 5]))
        yield model, normal(2, 32, seed=3, dtype=dtype), angles.cos(), angles.sin(), cache, *where


def cached_attention(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Ragged texts, one of which has two rows and one none; windows; a cap; more columns than a tile has."""
    for num_heads, kv_heads, head_dim, capacity in ((2, 2, 16, 9), (4, 1, 6, 70)):
        heads = rows(3, num_heads + 2 * kv_heads, head_dim, seed=1, dtype=dtype)
        cache = normal(2, 3, kv_heads, capacity, head_dim, seed=2, dtype=dtype)
        last = capacity - 2
        where = [torch.tensor(values) for values in ([2, 0, 0], [last, last - 1, last], [last, 2, 2])]
        yield from ((heads, cache, *where, 0.3, *others) for others in ((0, 0.0), (1, 0.0), (5, 0.7)))


CASES: dict[str, Callable[[torch.dtype], Iterator[tuple[Any, ...]]]] = {
    "rms_norm_out": rms_norm,
    "rms_norm_backward_out": rms_norm_backward,
    "layer_norm_out": layer_norm,
    "layer_norm_backward_out": layer_norm_backward,
    "rope_": rope,
    "swiglu_out": swiglu,
    "swiglu_backward_out": swiglu_backward,
    "geglu_out": swiglu,
    "geglu_backward_out": swiglu_backward,
    "gelu_out": gelu,
    "gelu_backward_out": gelu_backward,
    "cross_entropy_": cross_entropy,
    "adamw_": adamw,
    "adamw_8bit_": adamw_8bit,
    "gemv_4bit": gemv,
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit_out": dequantize_4bit_out,
    "augmented_weight_": augmented_weight,
    "search_scales": search_scales,
    "assign_columns": assign_columns,
    "packed_attention": packed_attention,
    "packed_attention_backward": packed_attention_backward,
    "cached_attention": cached_attention,
    "decode": decode,
}


# ---- bodies --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A backend's body of an op, on a device it runs on."""

    op: str
    backend: str
    device: str
    isa: str | None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.op, self.backend, self.device, self.isa)))


def bodies() -> Iterator[Body]:
    """Of all ops, as `nybble doctor` lists them; those in C++ once for each instruction set."""
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for row in registry.available():
        isas = library.supported_isas() if row.backend == "cpp" and row.available else (None,)
        for device in here if row.device == "any" else [row.device]:
            if row.available and device in here:
                yield from (Body(row.op, row.backend, device, isa) for isa in isas)


@pytest.fixture(params=list(bodies()), ids=str)
def body(request: pytest.FixtureRequest) -> Iterator[Body]:
    """The body, the one that runs; torch.empty gives NaN."""
    assert request.param.op in CASES, f"no arguments for {request.param.op}"
    torch.use_deterministic_algorithms(True)
    with registry.use(request.param.backend):
        if request.param.isa is None:
            yield request.param
        else:
            with library.use_isa(request.param.isa):
                yield request.param
    torch.use_deterministic_algorithms(False)


def cases(body: Body) -> list[tuple[torch.dtype, tuple[Any, ...]]]:
    """The arguments that the body takes, with the type that they are made in."""

    def takes(arguments: tuple[Any, ...]) -> bool:
        plain = tuple(argument.like if isinstance(argument, Out) else argument for argument in arguments)
        try:
            return registry.backend_of(body.op, body.device, body.backend, plain) == body.backend
        except KernelError:
            return False

    taken = [(dtype, arguments) for dtype in FLOAT_DTYPES for arguments in CASES[body.op](dtype)]
    taken = [(dtype, arguments) for dtype, arguments in taken if takes(arguments)]
    assert any(dtype == torch.float32 for dtype, _ in taken)
    return taken


# ---- calls ---------------------------------------------------------------------------------------


def copied(tensor: Tensor, device: str = "cpu") -> Tensor:
    """A copy that lies in a copy of its buffer."""
    if tensor._base is None:
        return tensor.to(device, copy=True)
    base = tensor._base.to(device, copy=True)
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def call(
    body: Body, arguments: tuple[Any, ...], aliases: dict[int, int] | None = None
) -> tuple[list[Tensor], list[Any]]:
    """What the op returns and what it was given, on the CPU; `aliases`: place of an output -> the input that it is."""
    given = [copied(argument, body.device) if isinstance(argument, Tensor) else argument for argument in arguments]
    for place, argument in enumerate(arguments):
        if isinstance(argument, Out) and place not in (aliases or {}):
            buffer = argument.like if argument.like._base is None else argument.like._base
            poison = torch.full_like(buffer, torch.nan).to(body.device)
            given[place] = poison.as_strided(
                argument.like.shape, argument.like.stride(), argument.like.storage_offset()
            )
    for place, source in (aliases or {}).items():
        given[place] = given[source]
    result = overload(body.op)(*given)
    returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [tensor.cpu() for tensor in returned], [
        copied(argument) if isinstance(argument, Tensor) else argument for argument in given
    ]


def overload(op: str) -> Any:
    if op == "decode":  # no torch op: a model is handed over before the step
        return lambda model, *arguments: decoder(model).step(*arguments)
    return getattr(torch.ops.nybble, op).default


def written(op: str) -> list[int]:
    """Places of the arguments that the op is declared to write."""
    if op == "decode":
        return [4]  # the cache
    declared = overload(op)._schema.arguments
    return [place for place, argument in enumerate(declared) if argument.alias_info and argument.alias_info.is_write]


def widened(argument: Any) -> Any:
    """The argument in fp32, where it is a number in fewer bits."""
    if isinstance(argument, Out):
        return Out(widened(argument.like))
    if isinstance(argument, DecoderModel):
        return replace(argument, dtype=torch.float32)
    if isinstance(argument, Tensor) and argument.is_floating_point():
        buffer = argument if argument._base is None else argument._base
        return buffer.float().as_strided(argument.shape, argument.stride(), argument.storage_offset())
    return torch.float32 if isinstance(argument, torch.dtype) else argument


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """Floating point within the type's rounding; of codes a few may lie on the other side of a midpoint."""
    assert got.shape == expected.shape
    if got.is_floating_point():
        assert torch.isfinite(got).all()
        error = (got.double() - expected.double()).abs()
        assert error.numel() == 0 or error.max() <= times * TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    else:
        assert got.dtype == expected.dtype and (got != expected).double().mean() <= 0.01


# ---- tests ---------------------------------------------------------------------------------------


def test_results_are_the_twins_and_nothing_else_is_written(body: Body) -> None:
    for dtype, arguments in cases(body):
        returned, given = call(body, arguments)
        with registry.use("reference"):
            wide = tuple(map(widened, arguments))
            expected, expected_given = call(Body(body.op, "reference", "cpu", None), wide)
        times = MANY_ROUNDINGS.get(body.op, 1.0)  # of what is written too: a cache's keys lie behind layers
        for got, right in zip(returned, expected, strict=True):
            assert_near(got, right, dtype, times)
        for place, (before, after) in enumerate(zip(arguments, given, strict=True)):
            if place in written(body.op) and after is not None:
                assert_near(after, expected_given[place], dtype, times)
            elif isinstance(before, Tensor):
                assert torch.equal(after, before), f"argument {place} was changed"
            lies = before.like if isinstance(before, Out) else before
            if isinstance(lies, Tensor) and lies._base is not None:
                assert after._base.isnan().sum() == len(after) * GAP, "the gaps between rows were written"


def in_place(op: str, arguments: tuple[Any, ...]) -> Iterator[dict[int, int]]:
    """All ways in which outputs can be inputs of their shape and type: each output none or one, each input once."""
    outputs = [place for place, argument in enumerate(arguments) if isinstance(argument, Out)]
    assert set(outputs) <= set(written(op))
    choices = []
    for place in outputs:
        like = arguments[place].like
        same = [
            source
            for source, argument in enumerate(arguments)
            if isinstance(argument, Tensor)
            and source not in written(op)
            and (argument.shape, argument.dtype, argument.stride()) == (like.shape, like.dtype, like.stride())
        ]
        choices.append([None, *(same if arguments[place].may_be_input else [])])
    for chosen in itertools.product(*choices):
        taken = {place: source for place, source in zip(outputs, chosen, strict=True) if source is not None}
        if taken and len(set(taken.values())) == len(taken):
            yield taken


def test_outputs_that_are_inputs_get_the_same_bits(body: Body) -> None:
    taken = [(dtype, arguments) for dtype, arguments in cases(body) if dtype != torch.float16]  # goes bf16's ways
    widest = {(dtype, *map(type, arguments)): arguments for dtype, arguments in taken}  # the last of each kind
    for arguments in widest.values():
        ways = list(in_place(body.op, arguments))
        returned, apart = call(body, arguments) if ways else ([], [])
        for aliases in ways:
            again, given = call(body, arguments, aliases)
            assert all(map(torch.equal, again, returned)), aliases
            for place in written(body.op):
                assert given[place] is None or torch.equal(given[place], apart[place]), (place, aliases)


def test_which_outputs_are_tried_as_inputs() -> None:
    """Of the ops that the decoder block uses in place, that use is among those tried."""
    *arguments, _ = swiglu_backward(torch.float32)
    tried = list(in_place("swiglu_backward_out", arguments[0]))
    assert {3: 1, 4: 2} in tried and {3: 1, 4: 2, 5: 0} in tried and len(tried) == 33
    assert {6: 0} in list(in_place("rms_norm_backward_out", next(rms_norm_backward(torch.float32))))


def test_gradients_of_attention_in_the_memory_of_what_they_are_made_of_are_refused() -> None:
    q, k, v, borders, grad = next(heads(torch.float32))
    out, lse = attention_forward(q, k, v, borders, 20)
    fresh = tuple(torch.empty_like(x) for x in (q, k, v))
    for place, shared in itertools.product(range(3), (q, k, v, grad, out)):
        grads = (*fresh[:place], shared, *fresh[place + 1 :])
        with pytest.raises(FormatError, match="memory of its own"):
            attention_backward(grad, q, k, v, out, lse, borders, 20, grads=grads)
