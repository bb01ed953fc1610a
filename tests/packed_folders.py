"""Weights as other programs store them in few bits, and what they stand for: written out slowly, an element at a time.

Codes are drawn at random. A row of codes is one large integer, whose bytes are the words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
Made = tuple[dict[str, Tensor], Tensor]  # end of name -> tensor; the weight in fp32, [out, in]


@dataclass(frozen=True)
class PackedCase:
    """One way to store the linear layers of a folder."""

    config: Mapping[str, Any]
    make: Callable[[int, int], Made]  # of (out, in)


def codes(bits: int, rows: int, columns: int) -> Tensor:
    return torch.randint(1 << bits, (rows, columns), generator=torch.Generator().manual_seed(bits))


def scales(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.01 + 0.001).to(dtype)


def words(rows: Tensor, bits: int) -> Tensor:
    """int32 [n, columns * bits / 32] of codes [n, columns]."""
    packed = [sum(code << bits * place for place, code in enumerate(row)) for row in rows.tolist()]
    data = b"".join(value.to_bytes(rows.shape[1] * bits // 8, "little") for value in packed)
    return torch.from_numpy(np.frombuffer(data, dtype=np.int32).copy()).view(len(rows), -1)


def each(rows: int, columns: int, value: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[value(o, i) for i in range(columns)] for o in range(rows)], dtype=torch.float64).float()


def gptq(bits: int, group_size: int, ordered: bool = False, minus_one: bool = True) -> Callable[[int, int], Made]:
    def make(rows: int, columns: int) -> Made:
        groups = 1 if group_size == -1 else columns // group_size
        q, zeros, s = codes(bits, rows, columns), codes(bits, rows, groups), scales(groups, rows)
        group = torch.arange(columns) // (columns // groups)
        if ordered:
            group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        stored = (zeros - 1) % (1 << bits) if minus_one else zeros
        parts = {".qweight": words(q, bits).T, ".qzeros": words(stored.T, bits), ".scales": s, ".g_idx": group.int()}
        lists = q.tolist(), zeros.tolist(), s.double().tolist(), group.tolist()
        weight = each(rows, columns, lambda o, i: (lists[0][o][i] - lists[1][o][g := lists[3][i]]) * lists[2][g][o])
        return parts, weight

    return make


def awq(rows: int, columns: int) -> Made:
    q, zeros, s = codes(4, columns, rows), codes(4, columns // 32, rows), scales(columns // 32, rows)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved = (torch.arange(0, rows, 8)[:, None] + order).flatten()
    parts = {".qweight": words(q[:, interleaved], 4), ".qzeros": words(zeros[:, interleaved], 4), ".scales": s}
    lists = q.tolist(), zeros.tolist(), s.double().tolist()
    return parts, each(rows, columns, lambda o, i: (lists[0][i][o] - lists[1][i // 32][o]) * lists[2][i // 32][o])


def llm_int8(rows: int, columns: int) -> Made:
    import bitsandbytes.functional as functional

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    q, maxima, _ = functional.int8_vectorwise_quant(weight.half())
    parts = {".weight": q, ".SCB": maxima, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, functional.int8_vectorwise_dequant(q, maxima).float()


def fp8(end: str, block: tuple[int, int] | None, kind: str = "one", dtype: torch.dtype = torch.float32) -> Any:
    def make(rows: int, columns: int) -> Made:
        height, width = block or (rows if kind == "one" else 1, columns)
        q = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
        s = scales(-(-rows // height), -(-columns // width), torch.float32).to(dtype)
        stored = s.reshape(()) if kind == "one" and block is None else s
        lists = q.double().tolist(), s.double().tolist()
        weight = each(rows, columns, lambda o, i: lists[0][o][i] * lists[1][o // height][i // width])
        return {".weight": q, end: stored, ".input_scale": torch.ones(())}, weight

    return make


def integers(bits: int, group_size: int, symmetric: bool = True, packed: bool = True, dtype=torch.bfloat16) -> Any:
    def make(rows: int, columns: int) -> Made:
        groups = columns // group_size if group_size > 0 else 1
        half = 1 << (bits - 1)
        q, zeros, s = codes(bits, rows, columns), codes(bits, rows, groups), scales(rows, groups, dtype)
        parts = {".weight_scale": s}
        if packed:
            parts |= {".weight_packed": words(q, bits), ".weight_shape": torch.tensor([rows, columns])}
            parts |= {} if symmetric else {".weight_zero_point": words(zeros.T.contiguous(), bits).T}
        else:
            parts |= {".weight": (q - half).to(torch.int8)}
            parts |= {} if symmetric else {".weight_zero_point": (zeros - half).to(torch.int8)}
        zero = [[half] * groups] * rows if symmetric else zeros.tolist()
        lists, width = (q.tolist(), s.double().tolist()), columns // groups
        return parts, each(rows, columns, lambda o, i: (lists[0][o][i] - zero[o][i // width]) * lists[1][o][i // width])

    return make


def four_bit_floats(kind: str) -> Callable[[int, int], Made]:
    def make(rows: int, columns: int) -> Made:
        width = 32 if kind == "mxfp4" else 16
        q = codes(4, rows, columns)
        packed = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)
        if kind == "mxfp4":
            s = codes(3, rows, columns // width).to(torch.uint8) + 120
            parts = {".weight_packed": packed, ".weight_scale": s}
            factors = (2.0 ** (s.double() - 127)).tolist()
        else:
            s = (scales(rows, columns // width, torch.float32) * 1e4).to(torch.float8_e4m3fn)
            parts = {".weight": packed, ".weight_scale": s, ".weight_scale_2": torch.tensor(2.0**-9)}
            if kind == "nvfp4":
                parts = {".weight_packed": packed, ".weight_scale": s, ".weight_global_scale": torch.tensor([512.0])}
            factors = (s.double() / 512).tolist()
        values = [sign * level for sign in (1, -1) for level in E2M1]
        listed = q.tolist()
        return parts, each(rows, columns, lambda o, i: values[listed[o][i]] * factors[o][i // width])

    return make


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """As compressed-tensors writes a config."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "re:.*k_proj$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {"dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None} | weights,
            }
        },
    }


def gptq_config(bits: int, group_size: int, **fields: Any) -> dict[str, Any]:
    history = {
        "damp_percent": 0.01,
        "true_sequential": True,
        "sym": False,
        "lm_head": False,
        "meta": {"quantizer": "x"},
    }
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False} | history | fields


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
PACKED_CASES = {
    "GPTQ 4 bits": PackedCase(gptq_config(4, 32), gptq(4, 32)),
    "GPTQ 4 bits, rows": PackedCase(gptq_config(4, -1), gptq(4, -1)),
    "GPTQ 4 bits, ordered, v2": PackedCase(
        gptq_config(4, 32, desc_act=True, checkpoint_format="gptq_v2"), gptq(4, 32, True, minus_one=False)
    ),
    "GPTQ 2 bits": PackedCase(gptq_config(2, 32), gptq(2, 32)),
    "GPTQ 3 bits, ordered": PackedCase(gptq_config(3, 32, desc_act=True), gptq(3, 32, ordered=True)),
    "GPTQ 8 bits": PackedCase(gptq_config(8, 64, checkpoint_format="gptq"), gptq(8, 64)),
    "AWQ": PackedCase(AWQ_CONFIG, awq),
    "bitsandbytes 8 bits": PackedCase(
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0},
        llm_int8,
    ),
    "fp8, 48 x 40": PackedCase(FP8 | {"weight_block_size": [48, 40]}, fp8(".weight_scale_inv", (48, 40))),
    "fp8, powers of two": PackedCase(
        FP8 | {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        fp8(".weight_scale_inv", (32, 32), dtype=torch.float8_e8m0fnu),
    ),
    "fp8, one scale": PackedCase(FP8 | {"weight_block_size": None}, fp8(".weight_scale_inv", None)),
    "fp8, one scale, AutoFP8": PackedCase(FP8 | {"ignored_layers": ["lm_head"]}, fp8(".weight_scale", None)),
    "fp8, FBGEMM": PackedCase(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8(".weight_scale", None, "row")
    ),
    "fp8, ModelOpt": PackedCase(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, fp8(".weight_scale", None)
    ),
    "compressed int4": PackedCase(compressed("pack-quantized", **INT4), integers(4, 32)),
    "compressed int4, asymmetric": PackedCase(
        compressed("pack-quantized", **INT4 | {"symmetric": False}), integers(4, 32, symmetric=False)
    ),
    "compressed int8, rows": PackedCase(
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), integers(8, -1)
    ),
    "compressed int8, unpacked": PackedCase(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        integers(8, -1, symmetric=False, packed=False, dtype=torch.float32),
    ),
    "compressed fp8": PackedCase(
        compressed("float-quantized", **FLOAT8, strategy="channel"), fp8(".weight_scale", None, "row", torch.bfloat16)
    ),
    "compressed fp8, blocks": PackedCase(
        compressed("float-quantized", **FLOAT8, strategy="block", block_structure=[48, 40]),
        fp8(".weight_scale", (48, 40)),
    ),
    "compressed NVFP4": PackedCase(
        compressed("nvfp4-pack-quantized", **FLOAT4, strategy="tensor_group", group_size=16), four_bit_floats("nvfp4")
    ),
    "compressed MXFP4": PackedCase(
        compressed("mxfp4-pack-quantized", **FLOAT4, strategy="group", group_size=32), four_bit_floats("mxfp4")
    ),
    "NVFP4, ModelOpt": PackedCase(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
        four_bit_floats("modelopt"),
    ),
}
