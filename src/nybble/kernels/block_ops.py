"""The decoder block's small ops, the loss and the optimizer step, declared once: schema, checks, fake.

    nybble::rms_norm_out, rms_norm_backward_out, rms_norm_weight_gradient
    nybble::rope_
    nybble::swiglu_out, swiglu_backward_out
    nybble::cross_entropy_
    nybble::adamw_, adamw_8bit_
    nybble::gemv_4bit

Call the functions below; bodies are in block_reference.py (plain PyTorch) and block_cpu.py (C++). None has an autograd
formula: forward and backward are ops of their own, for modules that write their backward out. Arithmetic is fp32 with
one rounding to the result's dtype. Outputs may be inputs: elements are read before they are written.

"Rows" below means a tensor [tokens, width], or [tokens, heads, width] with the heads side by side, whose tokens may lie
any distance apart: a slice of a fused q/k/v or gate/up buffer is such rows.
"""

import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels import registry
from nybble.kernels.ops import FLOAT_DTYPES, _check_packed

ADAMW_BLOCK = 256  # elements of an 8-bit moment that share a scale

_FP32 = (torch.float32,)

# ---- functions -----------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x * rstd * (weight + weight_offset)` with `rstd = 1 / sqrt(mean(x^2) + eps)` (arXiv 1910.07467).

    Args:
        x: rows [tokens, width] or [tokens, heads, width].
        weight: [width]; its dtype may differ from that of x.
        weight_offset: 1 for Gemma, whose stored weights are offsets from one.
        out: rows like x, may be x; a fresh tensor where None.

    Returns:
        the result, and rstd fp32 [tokens] or [tokens, heads], which the backward needs.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return out, torch.ops.nybble.rms_norm_out(x, weight, eps, weight_offset, out)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The gradient of `rms_norm` for x.

    With g = grad * (weight + weight_offset) and n = x * rstd: rstd * (g - n * mean(g * n)).

    Args:
        grad, x: rows of one shape and dtype; x is what `rms_norm` was given.
        rstd: what `rms_norm` returned.
        out: where to put it, may be grad; a fresh tensor where None.
        accumulate: add to what `out` holds (the residual branch's gradient) instead of overwriting it.
    """
    assert out is not None or not accumulate
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    torch.ops.nybble.rms_norm_backward_out(grad, x, weight, rstd, weight_offset, accumulate, out)
    return out


def rms_norm_weight_gradient(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of `rms_norm` for the weight: sum over rows of grad * x * rstd, fp32 [width]; contiguous inputs."""
    return torch.ops.nybble.rms_norm_weight_gradient(grad, x, rstd)


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate in place (arXiv 2104.09864; Hugging Face's layout: element i pairs with i + rotary_dim / 2).

    Args:
        x: rows [tokens, heads, head_dim]; elements from rotary_dim on are left alone.
        cos, sin: fp32 [tokens, rotary_dim / 2], the angles of each token's position (times the variant's scaling).
    """
    torch.ops.nybble.rope_(x, cos, sin, False)


def rope_backward_(grad: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The gradient of `rope_` for its input, in place of the gradient for its output."""
    torch.ops.nybble.rope_(grad, cos, sin, True)


def swiglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` (arXiv 2002.05202).

    Args:
        gate, up: rows [tokens, width].
        out: rows like them, may be either; a fresh tensor where None.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    torch.ops.nybble.swiglu_out(gate, up, out)
    return out


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
    act: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` for gate and up.

    Args:
        grad, gate, up: rows [tokens, width] of one shape and dtype.
        grad_gate, grad_up: where to put them, may be gate and up; fresh tensors where None.
        act: where to put silu(gate) * up once more, may be grad; not computed where None.
    """
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if grad_gate is None else grad_gate
    grad_up = torch.empty(up.shape, dtype=up.dtype, device=up.device) if grad_up is None else grad_up
    torch.ops.nybble.swiglu_backward_out(grad, gate, up, grad_gate, grad_up, act)
    return grad_gate, grad_up


def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: float) -> Tensor:
    """The loss of each row, and the gradient of `gradient_scale * sum(losses)` in place of the logits.

    Args:
        logits: rows [tokens, vocabulary]; overwritten.
        targets: int64 [tokens]; a negative one leaves its row out: loss 0, gradient 0.

    Returns:
        fp32 [tokens].

    Raises:
        KernelError: a target lies outside the vocabulary.
    """
    return torch.ops.nybble.cross_entropy_(logits, targets, gradient_scale)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step in place, as torch.optim.AdamW takes it (arXiv 1711.05101).

    How the elements are split into calls changes no bit of the result.

    Args:
        param, grad, exp_avg, exp_avg_sq: fp32, contiguous, one size; grad is not changed.
        step: 1 for the first.
        grad_scale: grad is multiplied by it first (clipping).
    """
    torch.ops.nybble.adamw_(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale)


def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """`adamw_` with its moments in 8 bits between steps: codes of the dynamic map, a scale for each 256 elements.

    A step reads the moments, updates them and the parameter in fp32, and rounds the moments to the nearest code of
    their new scale. The parameter's update sees them unrounded. A mean that is negative never rounds to zero. (Dettmers
    et al. 2022, arXiv 2110.02861; as `kOptimizerStatic8bit2StateBlockwise` in bitsandbytes' csrc/kernels.cu.)

    Args:
        param, grad: fp32, contiguous, one size; grad is not changed.
        exp_avg, exp_avg_sq: uint8, contiguous, of that size; the second in the map without signs. Zeros at first.
        exp_avg_absmax, exp_avg_sq_absmax: fp32 `[ceil(numel / 256)]`; zeros at first.
        step: 1 for the first.
        grad_scale: grad is multiplied by it first (clipping).
    """
    torch.ops.nybble.adamw_8bit_(
        param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax,
        step, lr, beta1, beta2, eps, weight_decay, grad_scale,
    )  # fmt: skip


def gemv_4bit(x: Tensor, q: QuantizedTensor) -> Tensor:
    """`x @ W.T` for a few rows x, without ever writing W out; fp32 accumulation.

    For generation: from about 8 rows on, dequantising once and a matrix product are faster.

    Args:
        x: [rows, in_features], contiguous.
        q: the weight, shape (out_features, in_features).

    Returns:
        [rows, out_features], the dtype of x.
    """
    spec = q.spec
    return torch.ops.nybble.gemv_4bit(x, q.packed, q.scales, q.shape, spec.format, spec.block_size, spec.double_quant)


# ---- checks: bodies trust their arguments --------------------------------------------------------
# They run at every call, so messages are put together only when there is something to say.


def _refusal(name: str, tensor: Tensor, allowed: str) -> KernelError:
    return KernelError(
        f"{name} is {tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}.",
        f"Allowed: {allowed}.",
    )


def _is_rows(x: Tensor) -> bool:
    sizes, strides = x.shape, x.stride()
    if x.dtype not in FLOAT_DTYPES or len(sizes) not in (2, 3):
        return False
    beside = len(sizes) == 2 or sizes[1] == 1 or strides[1] == sizes[2]  # heads side by side
    return beside and (sizes[-1] == 1 or strides[-1] == 1)


def _check_rows(dim: int | None, **tensors: Tensor) -> None:
    """All are rows, of one shape, dtype and device; with `dim` dimensions where it is given."""
    like = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not _is_rows(tensor) or (dim is not None and tensor.dim() != dim):
            shapes = {2: "[tokens, width]", 3: "[tokens, heads, width]", None: "[tokens, (heads,) width]"}
            raise _refusal(name, tensor, f"fp32, bf16 or fp16 rows {shapes[dim]}, contiguous within a token")
        if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
            raise _refusal(name, tensor, f"{like.dtype}, shape {tuple(like.shape)}, on {like.device}")


def _check_tensor(name: str, tensor: Tensor, like: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> None:
    right = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == like.device
    if not (right and tensor.is_contiguous()):
        names = " or ".join(map(str, dtypes))
        raise _refusal(name, tensor, f"{names}, contiguous, shape {tuple(shape)}, on {like.device}")


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float, out: Tensor) -> None:
    _check_rows(None, x=x, out=out)
    _check_tensor("weight", weight, x, x.shape[-1:], FLOAT_DTYPES)


def _check_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, accumulate: bool, out: Tensor
) -> None:
    _check_rows(None, grad=grad, x=x, out=out)
    _check_tensor("weight", weight, x, x.shape[-1:], FLOAT_DTYPES)
    _check_tensor("rstd", rstd, x, x.shape[:-1], _FP32)


def _check_rms_norm_weight_gradient(grad: Tensor, x: Tensor, rstd: Tensor) -> None:
    _check_rows(None, grad=grad, x=x)
    _check_tensor("grad", grad, x, x.shape, FLOAT_DTYPES)
    _check_tensor("x", x, x, x.shape, FLOAT_DTYPES)
    _check_tensor("rstd", rstd, x, x.shape[:-1], _FP32)


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    _check_rows(3, x=x)
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise _refusal("cos", cos, f"at most {x.shape[-1] // 2} angles a token, half a head")
    _check_tensor("cos", cos, x, torch.Size((x.shape[0], half)), _FP32)
    _check_tensor("sin", sin, x, torch.Size((x.shape[0], half)), _FP32)


def _check_swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _check_rows(2, gate=gate, up=up, out=out)


def _check_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, act: Tensor | None
) -> None:
    _check_rows(2, gate=gate, grad=grad, up=up, grad_gate=grad_gate, grad_up=grad_up)
    if act is not None:
        _check_rows(2, gate=gate, act=act)


def _check_cross_entropy(logits: Tensor, targets: Tensor, gradient_scale: float) -> None:
    _check_rows(2, logits=logits)
    if logits.shape[1] == 0:
        raise _refusal("logits", logits, "a vocabulary of at least one token")
    _check_tensor("targets", targets, logits, logits.shape[:1], (torch.int64,))


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """For the bodies: looks at values, which fake tensors do not have."""
    largest = int(targets.max()) if targets.numel() else -1
    if largest >= vocabulary:
        raise KernelError(f"A target is {largest}.", f"The logits' vocabulary ends at {vocabulary - 1}.")


def _check_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    if step < 1:
        raise KernelError(f"AdamW step {step}.", "Steps are counted from 1.")
    for name, tensor in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_tensor(name, tensor, param, param.shape, _FP32)


def _check_adamw_8bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: int,
    *numbers: float,
) -> None:
    if step < 1:
        raise KernelError(f"AdamW step {step}.", "Steps are counted from 1.")
    blocks = torch.Size((-(-param.numel() // ADAMW_BLOCK),))
    for name, tensor in (("param", param), ("grad", grad)):
        _check_tensor(name, tensor, param, param.shape, _FP32)
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_tensor(name, tensor, param, param.shape, (torch.uint8,))
    for name, tensor in (("exp_avg_absmax", exp_avg_absmax), ("exp_avg_sq_absmax", exp_avg_sq_absmax)):
        _check_tensor(name, tensor, param, blocks, _FP32)


def _check_gemv(
    x: Tensor, packed: Tensor, scales: Tensor, shape: list[int], format: str, block_size: int, double_quant: bool
) -> None:
    if len(shape) != 2:
        raise KernelError(f"The weight has shape {tuple(shape)}.", "Allowed: (out_features, in_features).")
    _check_packed(packed, scales, shape, format, block_size, double_quant)
    _check_tensor("x", x, packed, torch.Size((x.shape[0], shape[1])), FLOAT_DTYPES)


# ---- declarations --------------------------------------------------------------------------------


def _nothing(*arguments: object) -> None:
    return None


registry.declare(
    "rms_norm_out",
    "(Tensor x, Tensor weight, float eps, float weight_offset, Tensor(a!) out) -> Tensor",
    _check_rms_norm,
    lambda x, *rest: x.new_empty(x.shape[:-1], dtype=torch.float32),
)
registry.declare(
    "rms_norm_backward_out",
    "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float weight_offset, bool accumulate, Tensor(a!) out) -> ()",
    _check_rms_norm_backward,
    _nothing,
)
registry.declare(
    "rms_norm_weight_gradient",
    "(Tensor grad, Tensor x, Tensor rstd) -> Tensor",
    _check_rms_norm_weight_gradient,
    lambda grad, *rest: grad.new_empty(grad.shape[-1:], dtype=torch.float32),
)
registry.declare("rope_", "(Tensor(a!) x, Tensor cos, Tensor sin, bool backward) -> ()", _check_rope, _nothing)
registry.declare("swiglu_out", "(Tensor gate, Tensor up, Tensor(a!) out) -> ()", _check_swiglu, _nothing)
registry.declare(
    "swiglu_backward_out",
    "(Tensor grad, Tensor gate, Tensor up, Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor(c!)? act) -> ()",
    _check_swiglu_backward,
    _nothing,
)
registry.declare(
    "cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, float gradient_scale) -> Tensor",
    _check_cross_entropy,
    lambda logits, *rest: logits.new_empty(logits.shape[:1], dtype=torch.float32),
)
registry.declare(
    "adamw_",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, float grad_scale) -> ()",
    _check_adamw,
    _nothing,
)
registry.declare(
    "adamw_8bit_",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) exp_avg_absmax,"
    " Tensor(e!) exp_avg_sq_absmax, int step, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " float grad_scale) -> ()",
    _check_adamw_8bit,
    _nothing,
)
registry.declare(
    "gemv_4bit",
    "(Tensor x, Tensor packed, Tensor scales, int[] shape, str format, int block_size, bool double_quant) -> Tensor",
    _check_gemv,
    lambda x, packed, scales, shape, *rest: x.new_empty((x.shape[0], shape[0])),
)
