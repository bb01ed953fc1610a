"""Rotary position embedding of heads, forward and backward: `nybble::rope_`, in place, in fp32 with one rounding."""

import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.checks import FP32, check_rows, check_tensor, nothing, refusal


def rope_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
    """Rotate in place (arXiv 2104.09864).

    Args:
        x: rows [tokens, heads, head_dim]; elements from rotary_dim on are left alone.
        cos, sin: fp32 [tokens, rotary_dim / 2], the angles of each token's position (times the variant's scaling).
        neighbours: elements 2 i and 2 i + 1 are a pair, as in GLM and Cohere; else i and i + rotary_dim / 2.
    """
    torch.ops.nybble.rope_(x, cos, sin, neighbours, False)


def rope_backward_(grad: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
    """The gradient of `rope_` for its input, in place of the gradient for its output."""
    torch.ops.nybble.rope_(grad, cos, sin, neighbours, True)


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, backward: bool) -> None:
    check_rows(3, x=x)
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise refusal("cos", cos, f"at most {x.shape[-1] // 2} angles a token, half a head")
    check_tensor("cos", cos, x, torch.Size((x.shape[0], half)), FP32)
    check_tensor("sin", sin, x, torch.Size((x.shape[0], half)), FP32)


registry.declare(
    "rope_", "(Tensor(a!) x, Tensor cos, Tensor sin, bool neighbours, bool backward) -> ()", _check_rope, nothing
)
