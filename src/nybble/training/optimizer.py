"""AdamW over the adapters (Loshchilov & Hutter 2019, arXiv 1711.05101): fp32 masters, fp32 moments."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nybble.kernels import block_ops
from nybble.memory.pager import Moments, PagedMoments


class AdamW:
    """Decoupled weight decay Adam, one kernel call a parameter, clipping folded in.

    Args:
        parameters: fp32, contiguous.
        beta1, beta2: decay of the two moments.
        weight_decay: each step multiplies a parameter by 1 - lr * weight_decay.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, beta1: float, beta2: float, weight_decay: float, eps: float = 1e-8
    ):
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.weight_decay, self.eps = beta1, beta2, weight_decay, eps
        self.num_steps = 0
        self.moments: list[Moments] | PagedMoments = [
            Moments(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters
        ]

    def page_out(self, folder: Path) -> None:
        """Move the moments to a file on the disk of `folder`, from where each step pages them through memory.

        Raises:
            PlanError: the disk has no room for them.
        """
        if isinstance(self.moments, PagedMoments):
            return
        paged = PagedMoments([p.shape for p in self.parameters], folder)
        if self.num_steps:
            _copy(self.moments, paged)
        self.moments = paged

    @property
    def paged(self) -> bool:
        return isinstance(self.moments, PagedMoments)

    def settle(self) -> None:
        """Write the zeros that moments begin with, so that they take the memory that they will take."""
        for moments in self.moments if self.num_steps == 0 else ():
            moments.exp_avg.zero_()
            moments.exp_avg_sq.zero_()

    def page_in(self) -> None:
        """Move the moments back into memory."""
        if isinstance(self.moments, PagedMoments):
            resident = [Moments(torch.empty_like(p), torch.empty_like(p)) for p in self.parameters]
            _copy(self.moments, resident)
            self.moments = resident

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name: the moments of the i-th parameter, and the number of steps taken."""
        state = {"num_steps": torch.tensor(self.num_steps)}
        kept = self.moments.views() if isinstance(self.moments, PagedMoments) else self.moments
        for index, moments in enumerate(kept):
            state |= {f"{index}.exp_avg": moments.exp_avg, f"{index}.exp_avg_sq": moments.exp_avg_sq}
        return state

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Continue from `state()`; `read` gives one of its tensors by name.

        Raises:
            ValueError: a tensor has another shape than its parameter.
        """
        self.num_steps = int(read("num_steps"))
        for index, moments in enumerate(self.moments):
            for name, own in vars(moments).items():
                saved = read(f"{index}.{name}")
                if saved.shape != own.shape:
                    raise ValueError(f"{index}.{name} has the shape {tuple(saved.shape)}, here {tuple(own.shape)}")
                own.copy_(saved)

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together, summed in fp64."""
        norms = [p.grad.norm().double() for p in self.parameters if p.grad is not None]
        return float(torch.stack(norms).norm())

    def drop_gradients(self) -> None:
        """Forget what was accumulated."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """One update with `grad_scale` times the gradients, which it then drops."""
        self.num_steps += 1
        for parameter, moments in zip(self.parameters, self.moments, strict=True):
            if parameter.grad is None:
                continue
            block_ops.adamw_(
                parameter,
                parameter.grad,
                moments.exp_avg,
                moments.exp_avg_sq,
                step=self.num_steps,
                lr=lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                grad_scale=grad_scale,
            )
            increment_version(parameter)  # the kernel writes past autograd, and copies of the masters must notice
            parameter.grad = None


def _copy(source: Iterable[Moments], target: Iterable[Moments]) -> None:
    for read, written in zip(source, target, strict=True):
        written.exp_avg.copy_(read.exp_avg)
        written.exp_avg_sq.copy_(read.exp_avg_sq)
