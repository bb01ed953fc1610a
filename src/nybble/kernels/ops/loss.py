"""Cross-entropy and its gradient in one pass: `nybble::cross_entropy_`, in place of the logits."""

import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.kernels import registry
from nybble.kernels.heap import lies_in_heap
from nybble.kernels.ops.checks import FP32, check_rows, check_tensor, refusal


def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: Tensor | float) -> Tensor:
    """The loss of each row, and the gradient of `gradient_scale * sum(losses)` in place of the logits.

    Args:
        logits: rows [tokens, vocabulary]; overwritten.
        targets: int64 [tokens]; a negative one leaves its row out: loss 0, gradient 0.
        gradient_scale: a number, or one in memory of the device, fp32 [], which may be another in a graph's next run.

    Returns:
        fp32 [tokens].

    Raises:
        KernelError: a target lies outside the vocabulary; on a GPU, where looking would be waiting, callers see to it.
    """
    if not isinstance(gradient_scale, Tensor):
        gradient_scale = torch.full((), gradient_scale, dtype=torch.float32, device=logits.device)
    return torch.ops.nybble.cross_entropy_(logits, targets, gradient_scale)


def _check_cross_entropy(logits: Tensor, targets: Tensor, gradient_scale: Tensor) -> None:
    check_rows(2, logits=logits)
    if logits.shape[1] == 0:
        raise refusal("logits", logits, "a vocabulary of at least one token")
    check_tensor("targets", targets, logits, logits.shape[:1], (torch.int64,))
    check_tensor("gradient_scale", gradient_scale, logits, (), FP32)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """For the bodies on CPUs: looks at values, which fake tensors do not have."""
    largest = int(targets.max()) if targets.numel() and lies_in_heap(targets.device) else -1
    if largest >= vocabulary:
        raise KernelError(f"A target is {largest}.", f"The logits' vocabulary ends at {vocabulary - 1}.")


registry.declare(
    "cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, Tensor gradient_scale) -> Tensor",
    _check_cross_entropy,
    lambda logits, *rest: logits.new_empty(logits.shape[:1], dtype=torch.float32),
)
