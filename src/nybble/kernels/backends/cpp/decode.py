"""csrc/decode.cpp: all layers and the head in one call and one parallel region."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.backends.cpp.four_bit import codebook_for_bf16, scale_pointers
from nybble.kernels.backends.cpp.library import DTYPES, FLOAT, INT64, POINTER, function, pointer
from nybble.kernels.ops.decode import MAX_ROWS, DecoderLayer, DecoderLinear, DecoderModel, DecoderNorm

GATES = {  # by activation, and whether it is that of a gate: enum Gate of csrc/glu.h
    ("silu", True): 0,
    ("gelu_pytorch_tanh", True): 1,
    ("gelu_pytorch_tanh", False): 2,
    ("gelu_new", False): 2,
}

_decode = function("decode", POINTER, INT64, POINTER, POINTER)


# ---- the structs of the kernel, field by field ---------------------------------------------------


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, INT64) for name in ("out_features", "in_features", "block_size")),
        *((name, POINTER) for name in ("packed", "absmax", "codes", "code_values", "absmax2", "offset", "zero_points")),
        ("codebook", POINTER),
        ("factor", FLOAT),
        ("dense", POINTER),
        ("dense_dtype", INT64),
        ("bias", POINTER),
        ("rank", INT64),
        ("b", POINTER),
    )


class _Projection(ctypes.Structure):
    _fields_ = (
        ("in_features", INT64),
        ("num_linears", INT64),
        ("ranks", INT64),
        ("linears", ctypes.POINTER(_Linear)),
        ("a", POINTER),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", POINTER),
        ("bias", POINTER),
        *((name, INT64) for name in ("width", "centred", "by_head")),
        ("eps", FLOAT),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("qkv", "o", "gate_up", "down", "input_gate", "input_project")),
        *((name, _Norm) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm", "v_norm")),
        *((name, _Norm) for name in ("attention_output_norm", "mlp_output_norm", "own_norm")),
        *((name, INT64) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, INT64) for name in ("rope", "query_rope", "neighbours", "gate", "parallel")),
        *((name, INT64) for name in ("reads_keys", "values_are_keys")),
        *((name, FLOAT) for name in ("scale", "softcap", "residual", "factor")),
    )


class _Head(ctypes.Structure):
    _fields_ = (("norm", _Norm), ("projection", _Projection))


class _Angles(ctypes.Structure):
    _fields_ = (("cos", POINTER), ("sin", POINTER), ("half", INT64))


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", INT64),
        *((name, POINTER) for name in ("x", "angles", "cache")),
        *((name, INT64) for name in ("cache_dtype", "texts", "capacity")),
        ("inputs", POINTER),
        ("layers", INT64),
        *((name, POINTER) for name in ("text", "column", "start", "logits")),
    )


# ---- the body ------------------------------------------------------------------------------------


def _missing(model: DecoderModel, *others: object) -> str | None:
    """What the kernel lacks for this model, or None."""
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"keeps keys and values in float32 and bfloat16, not {model.dtype}"
    specs = {each.weight.spec for each in model.linears() if isinstance(each.weight, QuantizedTensor)}
    formats = sorted({spec.format for spec in specs if spec.bits != 4})
    return f"multiplies weights in four bits, not {formats[0]}" if formats else None


@registry.register("decode", "cpp", _missing)
class Kernel:
    """A `Decoder`. It holds the structs that the kernel reads, and every tensor that they point into."""

    def __init__(self, model: DecoderModel):
        self._kept: list[object] = []  # what the structs point into
        self.dtype = model.dtype
        self._num_layers = len(model.layers)
        widths = {each.own_input.gate[0].weight.shape[0] for each in model.layers if each.own_input is not None}
        assert len(widths) <= 1, widths
        self._input_width = max(widths, default=0)
        self._layers = (_Layer * len(model.layers))(*map(self._layer, model.layers))
        self._head = _Head(self._norm(model.norm), self._projection([model.head]))
        self._vocabulary, self._hidden = model.head.weight.shape

    def step(
        self,
        x: Tensor,
        cos: Sequence[Tensor],
        sin: Sequence[Tensor],
        cache: Sequence[Tensor],
        texts: Tensor,
        columns: Tensor,
        starts: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        _, num_texts, _, capacity, _ = cache[0].shape
        for layer, each in zip(self._layers, cache, strict=True):
            assert each.dtype == self.dtype and each.is_contiguous()
            assert each.shape == (2, num_texts, layer.num_kv_heads, capacity, layer.head_dim)
            kinds = {kind for kind in (layer.rope, layer.query_rope) if kind >= 0}
            assert all(2 * cos[kind].shape[1] <= layer.head_dim for kind in kinds)
        assert all(each.dtype == torch.int64 and each.shape == x.shape[:1] for each in (texts, columns, starts))
        assert inputs is None or inputs.shape == (len(x), self._num_layers, self._input_width)
        assert (inputs is None) == (self._input_width == 0)
        texts, columns, starts = where = [each.contiguous() for each in (texts, columns, starts)]
        angles = [(c.contiguous(), s.contiguous()) for c, s in zip(cos, sin, strict=True)]
        assert all(c.shape == s.shape and c.shape[0] == len(x) and c.dtype == torch.float32 for c, s in angles)
        described = (_Angles * len(angles))(*(_Angles(pointer(c), pointer(s), c.shape[1]) for c, s in angles))
        caches = (POINTER * len(cache))(*map(pointer, cache))
        own = None if inputs is None else inputs.to(torch.float32).contiguous()
        logits = self._run(
            self._num_layers, x, angles=ctypes.addressof(described), cache=ctypes.addressof(caches), texts=num_texts,
            capacity=capacity, inputs=None if own is None else pointer(own), layers=self._num_layers,
            **{name: pointer(each) for name, each in zip(("text", "column", "start"), where, strict=True)},
        )  # fmt: skip
        del own, angles  # until here the kernel reads them
        return logits

    def logits(self, x: Tensor) -> Tensor:
        return self._run(0, x)

    def _run(self, num_layers: int, x: Tensor, **fields: int | None) -> Tensor:
        assert 0 < len(x) <= MAX_ROWS and x.shape[1] == self._hidden, x.shape
        rows = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # the kernel writes into them
        logits = torch.empty(len(x), self._vocabulary)
        step = _Step(rows=len(x), x=pointer(rows), cache_dtype=DTYPES[self.dtype], logits=pointer(logits), **fields)
        _decode(ctypes.addressof(self._layers), num_layers, ctypes.addressof(self._head), ctypes.addressof(step))
        return logits

    def _layer(self, layer: DecoderLayer) -> _Layer:
        own = layer.own_input
        projections = [self._projection(each) for each in layer.projections]
        return _Layer(
            *projections, *([_Projection(), _Projection()] if own is None else ()),
            *map(self._norm, (layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm, layer.v_norm)),
            *map(self._norm, (layer.attention_output_norm, layer.mlp_output_norm, None if own is None else own.norm)),
            layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window,
            layer.rope, layer.query_rope, layer.neighbours, GATES[layer.activation, layer.gated], layer.parallel,
            layer.reads_keys is not None, layer.values_are_keys,
            layer.scale, layer.softcap, layer.residual, layer.factor,
        )  # fmt: skip

    def _norm(self, norm: DecoderNorm | None) -> _Norm:
        if norm is None:
            return _Norm(None)
        bias = None if norm.bias is None else self._fp32(norm.bias)
        width = norm.weight.shape[-1]
        return _Norm(self._fp32(norm.weight), bias, width, norm.centred, norm.weight.dim() == 2, norm.eps)

    def _projection(self, linears: Sequence[DecoderLinear]) -> _Projection:
        structs = (_Linear * len(linears))(*map(self._linear, linears))
        self._kept.append(structs)
        a = [linear.a for linear in linears if linear.a is not None]
        ranks = sum(map(len, a))
        return _Projection(
            linears[0].weight.shape[1], len(linears), ranks, structs, self._fp32(torch.cat(a)) if a else None
        )

    def _linear(self, linear: DecoderLinear) -> _Linear:
        weight = linear.weight
        struct = _Linear(out_features=weight.shape[0])
        if isinstance(weight, QuantizedTensor):
            struct.in_features, struct.block_size = weight.shape[1], weight.spec.block_size
            struct.packed = self._keep(weight.packed)
            spec = weight.spec
            (struct.absmax, struct.codes, struct.code_values, struct.absmax2, struct.offset, struct.zero_points) = (
                scale_pointers(weight.scales, spec.format, spec.block_size, spec.double_quant, weight.numel)
            )
            self._keep(weight.scales)
            codebook, struct.factor = codebook_for_bf16(spec.format)
            struct.codebook = self._keep(codebook)
        else:
            struct.dense, struct.dense_dtype = self._keep(weight), DTYPES[weight.dtype]
        if linear.bias is not None:
            struct.bias = self._fp32(linear.bias)
        if linear.b is not None:
            struct.rank, struct.b = linear.b.shape[1], self._fp32(linear.b.T)
        return struct

    def _fp32(self, tensor: Tensor) -> int | None:
        return self._keep(tensor.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int | None:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return pointer(tensor)
