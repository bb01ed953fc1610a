"""AdamW over the adapters (Loshchilov & Hutter 2019, arXiv 1711.05101): fp32 masters, fp32 moments."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nybble.kernels import block_ops


@dataclass
class Moments:
    """The state of one parameter: running means of its gradient and of the gradient's square."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


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
        self.moments = [Moments(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name: the moments of the i-th parameter, and the number of steps taken."""
        state = {"num_steps": torch.tensor(self.num_steps)}
        for index, moments in enumerate(self.moments):
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
