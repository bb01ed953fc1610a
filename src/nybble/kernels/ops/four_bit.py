"""Frozen weights in four bits: quantising, dequantising, multiplying by a few rows.

    nybble::quantize_4bit        weight -> packed, scales
    nybble::dequantize_4bit      packed, scales -> weight
    nybble::dequantize_4bit_out  packed, scales -> written into `out`
    nybble::augmented_weight_    packed, scales, B -> written into rows that are wider than the weight, B beside it
    nybble::gemv_4bit            x, packed, scales -> x @ weight.T

They serve the three- and two-bit formats too, and ggml's blocks, which are read and never made. `packed` and
`scales` are laid out as nybble.formats.quantized_tensor says. A body gets contiguous tensors whose sizes have been
checked. None of the ops has a gradient: the weights are frozen.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from nybble.errors import FormatError, KernelError
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops.checks import FLOAT_DTYPES, FP32, check_tensor, nothing, refusal


def quantize(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Put a weight into four, three or two bits, on its own device.

    Args:
        weight: any shape, fp32, bf16 or fp16.

    Raises:
        FormatError: empty, not floating point, or with non-finite values.
        KernelError: the backend asked for cannot run.
    """
    packed, scales = torch.ops.nybble.quantize_4bit(
        weight.detach().contiguous(), spec.format, spec.block_size, spec.double_quant
    )
    return QuantizedTensor(packed, scales, spec, tuple(weight.shape), weight.dtype)


def dequantize(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype` (fp32, bf16 or fp16), shape `q.shape`: fp32 arithmetic, one rounding.

    Raises:
        FormatError: another dtype.
        KernelError: the backend asked for cannot run.
    """
    weight: Tensor = torch.ops.nybble.dequantize_4bit(*_arguments(q), dtype)
    return weight


def dequantize_into(q: QuantizedTensor, out: Tensor) -> None:
    """As `dequantize`, written into `out`: contiguous, shape `q.shape`, fp32, bf16 or fp16."""
    torch.ops.nybble.dequantize_4bit_out(*_arguments(q), out)


def augmented_weight_(out: Tensor, q: QuantizedTensor, b: Tensor | None, scaling: float, first: int) -> None:
    """Write `[weight, 0 .. 0, scaling * b, 0 .. 0]`: a frozen weight, and B of its adapter beside it.

    Args:
        out: [out_features, in_features + R], contiguous within a row; rows may lie any distance apart.
        q: the weight, shape (out_features, in_features); its values are those of `dequantize` in out's dtype.
        b: fp32 [out_features, rank], contiguous; None for zeros alone.
        first: of the R columns beside the weight, b's first.
    """
    torch.ops.nybble.augmented_weight_(*_arguments(q), b, scaling, first, out)


def write_beside(columns: Tensor, b: Tensor | None, scaling: float, first: int) -> None:
    """What `augmented_weight_` has beside the weight, `[out_features, R]`, in plain PyTorch."""
    columns.zero_()
    if b is not None:
        columns[:, first : first + b.shape[1]] = b * scaling


def gemv_4bit(x: Tensor, q: QuantizedTensor) -> Tensor:
    """`x @ W.T` for a few rows x, without ever writing W out; fp32 accumulation.

    For generation: from about 8 rows on, dequantising once and a matrix product are faster.

    Args:
        x: [rows, in_features], contiguous.
        q: the weight, shape (out_features, in_features).

    Returns:
        [rows, out_features], the dtype of x.
    """
    return torch.ops.nybble.gemv_4bit(x, *_arguments(q))


def _arguments(q: QuantizedTensor) -> tuple[Tensor, Tensor, tuple[int, ...], str, int, bool]:
    """As the ops take a weight."""
    return q.packed, q.scales, q.shape, q.spec.format, q.spec.block_size, q.spec.double_quant


def allocating(dequantize_out: Callable[..., None]) -> Callable[..., Tensor]:
    """The body of `dequantize_4bit` that a backend's body of `dequantize_4bit_out` makes."""

    def dequantize_4bit(
        packed: Tensor,
        scales: Tensor,
        shape: Sequence[int],
        format: str,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        out = packed.new_empty(shape, dtype=dtype)
        dequantize_out(packed, scales, shape, format, block_size, double_quant, out)
        return out

    return dequantize_4bit


def _check_quantize(weight: Tensor, format: str, block_size: int, double_quant: bool) -> None:
    if QuantSpec(format, block_size, double_quant).entry.block is not None:
        raise FormatError(f"{format} is read and never made.", f"Formats to put weights into: {', '.join(FORMATS)}.")
    _check_dtype(weight.dtype)
    if weight.numel() == 0 or not weight.is_contiguous():
        raise FormatError(
            f"A weight of shape {tuple(weight.shape)} and strides {weight.stride()} cannot be quantised.",
            "Allowed: contiguous tensors with at least one element.",
        )


def _fake_quantize(weight: Tensor, format: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor]:
    spec = QuantSpec(format, block_size, double_quant)
    packed = weight.new_empty(spec.packed_shape(tuple(weight.shape)), dtype=torch.uint8)
    return packed, weight.new_empty((spec.scales_bytes(weight.numel()),), dtype=torch.uint8)


def _check_packed(
    packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, block_size: int, double_quant: bool
) -> None:
    spec = QuantSpec(format, block_size, double_quant)
    numel = prod(shape)
    for name, tensor, expected in (
        ("packed", packed, spec.packed_bytes(numel)),
        ("scales", scales, spec.scales_bytes(numel)),
    ):
        if tensor.dtype != torch.uint8 or tensor.numel() != expected or not tensor.is_contiguous():
            raise FormatError(
                f"{name} is {tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}.",
                f"{spec} over shape {tuple(shape)} needs {expected} contiguous bytes (uint8).",
            )
    if packed.device != scales.device:
        raise FormatError(f"packed is on {packed.device}, scales on {scales.device}.", "Both must be on one device.")


def _check_dequantize(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    _check_packed(packed, scales, shape, format, block_size, double_quant)
    _check_dtype(dtype)


def _check_dequantize_out(
    packed: Tensor, scales: Tensor, shape: Sequence[int], format: str, block_size: int, double_quant: bool, out: Tensor
) -> None:
    _check_packed(packed, scales, shape, format, block_size, double_quant)
    _check_dtype(out.dtype)
    if tuple(out.shape) != tuple(shape) or not out.is_contiguous() or out.device != packed.device:
        raise FormatError(
            f"out has shape {tuple(out.shape)}, strides {out.stride()}, on {out.device}.",
            f"It must be contiguous, of shape {tuple(shape)}, on {packed.device}.",
        )


def _check_augmented(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    format: str,
    block_size: int,
    double_quant: bool,
    b: Tensor | None,
    scaling: float,
    first: int,
    out: Tensor,
) -> None:
    _check_packed(packed, scales, shape, format, block_size, double_quant)
    rows, columns = shape
    wide = out.dim() == 2 and out.shape[0] == rows and out.shape[1] >= columns
    if not (wide and out.stride(1) == 1 and out.dtype in FLOAT_DTYPES and out.device == packed.device):
        raise refusal("out", out, f"rows [{rows}, {columns} or more] of fp32, bf16 or fp16, on {packed.device}")
    if b is not None:
        check_tensor("b", b, packed, torch.Size((rows, b.shape[-1])), FP32)
        if not 0 <= first <= out.shape[1] - columns - b.shape[1]:
            raise KernelError(
                f"b's {b.shape[1]} columns begin with {first} of {out.shape[1] - columns}.", "They must fit."
            )


def _check_gemv(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> None:
    if len(shape) != 2:
        raise KernelError(f"The weight has shape {tuple(shape)}.", "Allowed: (out_features, in_features).")
    _check_packed(packed, scales, shape, format, block_size, double_quant)
    check_tensor("x", x, packed, torch.Size((x.shape[0], shape[1])), FLOAT_DTYPES)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise FormatError(f"{dtype} weights are not supported.", "Allowed: float32, bfloat16, float16.")


registry.declare(
    "quantize_4bit",
    "(Tensor weight, str format, int block_size, bool double_quant) -> (Tensor packed, Tensor scales)",
    _check_quantize,
    _fake_quantize,
)
registry.declare(
    "dequantize_4bit",
    "(Tensor packed, Tensor scales, int[] shape, str format, int block_size, bool double_quant, ScalarType dtype)"
    " -> Tensor",
    _check_dequantize,
    allocating(nothing),
)
registry.declare(
    "dequantize_4bit_out",
    "(Tensor packed, Tensor scales, int[] shape, str format, int block_size, bool double_quant, Tensor(a!) out) -> ()",
    _check_dequantize_out,
    nothing,
)
registry.declare(
    "augmented_weight_",
    "(Tensor packed, Tensor scales, int[] shape, str format, int block_size, bool double_quant, Tensor? b,"
    " float scaling, int first, Tensor(a!) out) -> ()",
    _check_augmented,
    nothing,
)
registry.declare(
    "gemv_4bit",
    "(Tensor x, Tensor packed, Tensor scales, int[] shape, str format, int block_size, bool double_quant) -> Tensor",
    _check_gemv,
    lambda x, packed, scales, shape, *rest: x.new_empty((x.shape[0], shape[0])),
)
