"""AdamW over the adapters (Loshchilov & Hutter 2019, arXiv 1711.05101): fp32 masters, moments in 32 or 8 bits."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nybble.kernels.ops.optimizer import ADAMW_BLOCK, adamw_, adamw_8bit_
from nybble.memory.measure import has_own_memory
from nybble.memory.pager import Layout, PagedState, State

Bits = Literal[32, 8]


class AdamW:
    """Decoupled weight decay Adam, one kernel call a parameter, clipping folded in.

    Args:
        parameters: fp32, contiguous.
        beta1, beta2: decay of the two moments.
        weight_decay: each step multiplies a parameter by 1 - lr * weight_decay.
        eps: added to the root of the second moment.
        bits: of a moment between steps; 8 are codes with a scale for each 256 (see `adamw_8bit_`).
        paged_in: the folder that the moments are paged in from the start (see `page_out`); None keeps them in memory.

    Raises:
        PlanError: the disk of `paged_in` has no room for them.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float = 1e-8,
        bits: Bits = 32,
        paged_in: Path | None = None,
    ):
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.weight_decay, self.eps = beta1, beta2, weight_decay, eps
        self.num_steps = 0
        self._update = adamw_ if bits == 32 else adamw_8bit_
        self._device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._layouts = [moments_layout(parameter.shape, bits) for parameter in self.parameters]
        self._state: list[State] | PagedState = (
            self._zeros() if paged_in is None else PagedState(self._layouts, paged_in, self._device)
        )
        # Made by backward passes, gradients would lie in the C library's heap among what those free, and pin gaps.
        self._keeps_gradients = not has_own_memory(self._device)
        if self._keeps_gradients:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def _zeros(self) -> list[State]:
        """The moments that a first step begins with."""
        return [
            {name: torch.zeros(shape, dtype=dtype, device=self._device) for name, (dtype, shape) in layout.items()}
            for layout in self._layouts
        ]

    def page_out(self, folder: Path) -> None:
        """Move the moments to a file on the disk of `folder`, from where each step pages them through memory.

        Raises:
            PlanError: the disk has no room for them.
        """
        if not isinstance(self._state, PagedState):
            paged = PagedState(self._layouts, folder, self._device)
            if self.num_steps:  # else both are zeros
                _copy(self._state, paged)
            self._state = paged

    @property
    def paged(self) -> bool:
        return isinstance(self._state, PagedState)

    @property
    def can_page_out(self) -> bool:
        """Whether `page_out` would make room where steps ran out of it; a GPU's plan has said whether it pages."""
        return not self.paged and not has_own_memory(self._device)

    def materialise(self) -> None:
        """Write the zeros that gradients and moments begin with, so that they take the memory that they will take."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 0.0) if parameter.grad is None else parameter.grad.zero_()
        for state in self._state if self.num_steps == 0 else ():
            for moment in state.values():
                moment.zero_()

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of all that a checkpoint keeps, by name."""
        kept = {f"{i}.{name}": place for i, layout in enumerate(self._layouts) for name, place in layout.items()}
        return {"num_steps": (torch.int64, ()), **kept}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint keeps: the number of steps taken, and the moments of the i-th parameter by name.

        Each is valid until the next is asked for: where moments are paged, they are never in memory together.
        """
        yield "num_steps", torch.tensor(self.num_steps)
        states = self._state.reading() if isinstance(self._state, PagedState) else self._state
        for index, state in enumerate(states):
            for name, moment in state.items():
                yield f"{index}.{name}", moment

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Continue from what `tensors` gave; `read` gives one of them by name.

        Raises:
            ValueError: a tensor has another shape or type than the moment it is for.
        """
        self.num_steps = int(read("num_steps"))
        for index, state in enumerate(self._state):
            for name, moment in state.items():
                saved = read(f"{index}.{name}")
                if saved.shape != moment.shape or saved.dtype != moment.dtype:
                    is_, was = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (moment, saved))
                    raise ValueError(f"{index}.{name} is {was}, here {is_}")
                moment.copy_(saved)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together: a scalar on their device, fp64."""
        norms = [p.grad.norm().double() for p in self.parameters if p.grad is not None]
        return torch.stack(norms).norm()

    def drop_gradients(self) -> None:
        """Forget what was accumulated."""
        for parameter in self.parameters:
            self._drop(parameter)

    def _drop(self, parameter: Tensor) -> None:
        if self._keeps_gradients and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """One update with `grad_scale` times the gradients, which it then drops.

        Raises:
            OSError: the disk that has the moments failed; parameters may be half updated.
        """
        self.num_steps += 1
        for parameter, state in zip(self.parameters, self._state, strict=True):
            if parameter.grad is None:
                continue
            self._update(
                parameter,
                parameter.grad,
                **state,
                step=self.num_steps,
                lr=lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                grad_scale=grad_scale,
            )
            increment_version(parameter)  # the kernel writes past autograd, and copies of the masters must notice
            self._drop(parameter)


def moments_layout(shape: tuple[int, ...], bits: Bits) -> Layout:
    """Type and shape of a parameter's moments, by the names that the kernels give them."""
    if bits == 32:
        return {"exp_avg": (torch.float32, shape), "exp_avg_sq": (torch.float32, shape)}
    scales = (-(-torch.Size(shape).numel() // ADAMW_BLOCK),)
    return {
        "exp_avg": (torch.uint8, shape),
        "exp_avg_sq": (torch.uint8, shape),
        "exp_avg_absmax": (torch.float32, scales),
        "exp_avg_sq_absmax": (torch.float32, scales),
    }


def _copy(source: Iterable[State], target: Iterable[State]) -> None:
    for read, written in zip(source, target, strict=True):
        for name, moment in read.items():
            written[name].copy_(moment)
