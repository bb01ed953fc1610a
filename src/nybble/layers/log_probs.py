"""log p of each target with a gradient, for losses that are no sum over tokens: of a sequence's log-probability, say.

All of a loss's gradient through the head is d loss / d log p(target), a number a row, times the row's own gradient,
which does not depend on that number. So the rows' own gradients are made where the logits are, a chunk at a time as
for a sum of losses, and multiplied in the backward pass: the logits are made once and never held all at once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from nybble.kernels.hardware import wide_dtype
from nybble.layers.loss_head import Head, LossHead


def log_probs(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each row in nats, fp32 `(N,)`.

    Args:
        hidden: `(N, hidden)`, the states that the head reads.
        targets: `(N,)` int64.

    Returns:
        What `-head.token_losses` gives, and its backward the gradient of `hidden`, and of what is trained of the head.
    """
    if not torch.is_grad_enabled():
        return -head.token_losses(hidden, targets)
    if not hidden.requires_grad:  # only the head is trained
        hidden = hidden.detach().requires_grad_()
    if isinstance(head, LossHead) and not head.is_trained:
        kept: Tensor = _GradientsKept.apply(hidden, head, targets)
        return kept
    again: Tensor = _HeadAgain.apply(hidden, head, targets)
    return again


class _GradientsKept(torch.autograd.Function):
    """Keeps d log p / d hidden of each row, `(N, hidden)`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: LossHead, targets: Tensor) -> Tensor:
        factor = torch.full((), -1.0, dtype=wide_dtype(hidden.device), device=hidden.device)
        losses, first = [hidden.new_zeros(0, dtype=torch.float32)], 0
        gradients = head.gradient_room(hidden, targets)
        for rows, chunk, buffer in head.chunks(hidden, targets):
            out, first = gradients[first : first + len(rows)], first + len(rows)
            nats, _ = head.loss_and_gradient(rows, chunk, buffer, factor, head.regularisers, out)
            losses.append(nats[0])
        ctx.save_for_backward(gradients[: len(targets)])
        return -torch.cat(losses)[: len(targets)]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_outputs[0][:, None]).to(gradients.dtype), None, None


class _HeadAgain(torch.autograd.Function):
    """Computes the head again in the backward pass, as a sum of weighted losses: the gradient of what is trained in it
    is a sum over rows, which cannot be weighted afterwards. What was dropped is dropped again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        ctx.head = head
        ctx.cpu_rng, (ctx.devices, ctx.device_rngs) = torch.get_rng_state(), get_device_states(hidden)
        ctx.save_for_backward(hidden, targets)
        return -head.token_losses(hidden, targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        with torch.enable_grad(), torch.random.fork_rng(ctx.devices):
            torch.set_rng_state(ctx.cpu_rng)
            set_device_states(ctx.devices, ctx.device_rngs)
            again = hidden.detach().requires_grad_()
            ctx.head.loss(again, targets, 1.0, -grad_outputs[0]).backward()
        return again.grad, None, None
