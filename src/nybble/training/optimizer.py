"""AdamW over the adapters (Loshchilov & Hutter 2019, arXiv 1711.05101): fp32 masters, moments in 32 or 8 bits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nybble.kernels.hardware import as_double
from nybble.kernels.heap import trim_heap
from nybble.kernels.ops.optimizer import ADAMW_BLOCK, SIGNED_ZERO, adamw_, adamw_8bit_
from nybble.memory.measure import has_own_memory
from nybble.memory.pager import Layout, PagedState, State, deal_into_pages, layout_bytes

Bits = Literal[32, 8]


class FlatParameters:
    """Parameters as slices of one fp32 buffer, and their gradients as slices of another.

    Each slice begins with a block of ADAMW_BLOCK elements, so that none is of two parameters; between are zeros.

    Args:
        parameters: fp32. Their values move into the buffer; `.grad` is a slice from now on, which backward adds to.

    Attributes:
        values, gradients: the buffers.
        slices: the gradients, as the parameters have them.
        starts: of each parameter in the buffers, and the end.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = list(parameters)
        blocks = [-(-parameter.numel() // ADAMW_BLOCK) for parameter in self.parameters]
        self.starts = [ADAMW_BLOCK * start for start in accumulate(blocks, initial=0)]
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.values = torch.zeros(self.starts[-1], device=self.device)
        self.gradients = torch.zeros(self.starts[-1], device=self.device)
        self.slices: list[Tensor] = []
        for start, parameter in zip(self.starts, self.parameters, strict=False):
            value, gradient = (
                flat[start : start + parameter.numel()].view(parameter.shape) for flat in (self.values, self.gradients)
            )
            parameter.data, parameter.grad = value.copy_(parameter.detach()), gradient
            self.slices.append(gradient)
        trim_heap()  # where they lay before

    def check(self) -> None:
        """What backward passes have added is in the buffer."""
        for parameter, gradient in zip(self.parameters, self.slices, strict=True):
            assert parameter.grad is gradient, "a gradient was replaced instead of added to"

    def elements(self, parameters: range) -> slice:
        """Where these lie in the buffers."""
        return slice(self.starts[parameters.start], self.starts[parameters.stop])


class AdamW:
    """Decoupled weight decay Adam over all parameters at once, clipping folded in.

    Args:
        parameters: fp32; they move into one buffer, and so do their gradients (see `FlatParameters`).
        beta1, beta2: decay of the two moments.
        weight_decay: each step multiplies a parameter by 1 - lr * weight_decay.
        eps: added to the root of the second moment.
        bits: of a moment between steps; 8 are codes with a scale for each 256 (see `adamw_8bit_`).
        rates: of each parameter, what its learning rate is multiplied by (LoRA+); 1 where not given. Parameters of one
            rate lie side by side in the buffer, so that a step takes one call for each.
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
        rates: Sequence[float] | None = None,
        paged_in: Path | None = None,
    ):
        given = list(parameters)
        of_given = [1.0] * len(given) if rates is None else list(rates)
        self._order = sorted(range(len(given)), key=of_given.__getitem__)  # place in the buffer -> as it was given
        self._rates = [of_given[i] for i in self._order]
        self._flat = FlatParameters(given[i] for i in self._order)
        self.beta1, self.beta2, self.weight_decay, self.eps, self.bits = beta1, beta2, weight_decay, eps, bits
        self.num_steps = 0
        self._update = adamw_ if bits == 32 else adamw_8bit_
        # Neighbouring parameters whose moments lie side by side: all of them, or those of a page.
        self._groups = [range(len(self.parameters))] if self.parameters else []
        self._state: list[State] | PagedState = []
        if paged_in is None:
            self._state = [self._zeros(layout) for layout in self._layouts(self._groups)]
        else:
            self.page_out(paged_in)

    @property
    def parameters(self) -> list[Tensor]:
        return self._flat.parameters

    def _layouts(self, groups: Iterable[range]) -> list[Layout]:
        elements = [self._flat.elements(group) for group in groups]
        return [moments_layout((each.stop - each.start,), self.bits) for each in elements]

    def _zeros(self, layout: Layout) -> State:
        """The moments that a first step begins with."""
        return {name: torch.zeros(n, dtype=dtype, device=self._flat.device) for name, (dtype, n) in layout.items()}

    def page_out(self, folder: Path) -> None:
        """Move the moments to a file on the disk of `folder`, from where each step pages them through memory.

        Raises:
            PlanError: the disk has no room for them.
        """
        if isinstance(self._state, PagedState):
            return
        alone = self._layouts(range(i, i + 1) for i in range(len(self.parameters)))
        groups = deal_into_pages([layout_bytes(layout) for layout in alone])
        paged = PagedState(self._layouts(groups), folder, self._flat.device)
        if self.num_steps:  # else both are zeros
            for group, state in zip(groups, paged, strict=True):
                for name, moment in state.items():
                    moment.copy_(self._part(self._state[0][name], self._groups[0], self._flat.elements(group)))
        self._groups, self._state = groups, paged

    @property
    def paged(self) -> bool:
        return isinstance(self._state, PagedState)

    @property
    def can_page_out(self) -> bool:
        """Whether `page_out` would make room where steps ran out of it; a GPU's plan has said whether it pages."""
        return not self.paged and not has_own_memory(self._flat.device)

    def materialise(self) -> None:
        """Write the zeros that gradients and moments begin with, so that they take the memory that they will take."""
        self._flat.gradients.zero_()
        for state in self._state if self.num_steps == 0 else ():
            for moment in state.values():
                moment.zero_()

    def _part(self, moment: Tensor, group: range, elements: slice) -> Tensor:
        """What a group's moment, codes or scales, has of these elements."""
        whole = self._flat.elements(group)
        share = (whole.stop - whole.start) // len(moment)  # elements that share an entry
        start, stop = elements.start - whole.start, elements.stop - whole.start
        return moment[start // share : -(-stop // share)]

    def _moments(self, group: range, state: State) -> Iterator[tuple[str, Tensor]]:
        """The moments of a group's parameters, by the names that a checkpoint knows them by."""
        for place in group:
            i, parameter, start = self._order[place], self.parameters[place], self._flat.starts[place]
            for name, (_, shape) in moments_layout(parameter.shape, self.bits).items():
                part = self._part(state[name], group, slice(start, start + parameter.numel()))
                yield f"{i}.{name}", part.view(shape)

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of all that a checkpoint keeps, by name."""
        layouts = [moments_layout(parameter.shape, self.bits) for parameter in self.parameters]
        named = zip(self._order, layouts, strict=True)
        kept = {f"{i}.{name}": place for i, layout in named for name, place in layout.items()}
        return {"num_steps": (torch.int64, ()), **kept}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint keeps: the number of steps taken, and the moments of the i-th parameter by name.

        Each is valid until the next is asked for: where moments are paged, they are never in memory together.
        """
        yield "num_steps", torch.tensor(self.num_steps)
        states = self._state.reading() if isinstance(self._state, PagedState) else self._state
        for group, state in zip(self._groups, states, strict=True):
            yield from self._moments(group, state)

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Continue from what `tensors` gave; `read` gives one of them by name.

        Raises:
            ValueError: a tensor has another shape or type than the moment it is for.
        """
        self.num_steps = int(read("num_steps"))
        for group, state in zip(self._groups, self._state, strict=True):
            if self.bits == 8 and self.num_steps:
                state["exp_avg"].fill_(SIGNED_ZERO)  # between parameters too, where steps have left it
            for name, moment in self._moments(group, state):
                saved = read(name)
                if saved.shape != moment.shape or saved.dtype != moment.dtype:
                    is_, was = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (moment, saved))
                    raise ValueError(f"{name} is {was}, here {is_}")
                moment.copy_(saved)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together: a scalar on their device, fp64 where it has that."""
        self._flat.check()
        norms = torch._foreach_norm(self._flat.slices)  # one launch on a GPU
        return as_double(torch.stack(norms)).norm()

    def drop_gradients(self) -> None:
        """Forget what was accumulated."""
        self._flat.gradients.zero_()

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """One update with `grad_scale` times the gradients, which it then drops.

        Raises:
            OSError: the disk that has the moments failed; parameters may be half updated.
        """
        self._flat.check()
        self.num_steps += 1
        for group, state in zip(self._groups, self._state, strict=True):
            for rate, places in groupby(group, key=self._rates.__getitem__):
                self._step_part(group, state, list(places), lr * rate, grad_scale)
        increment_version(self.parameters)  # written past autograd, and copies of the masters must notice
        self.drop_gradients()

    def _step_part(self, group: range, state: State, places: list[int], lr: float, grad_scale: float) -> None:
        """Those of a group that have one learning rate."""
        elements = self._flat.elements(range(places[0], places[-1] + 1))
        self._update(
            self._flat.values[elements],
            self._flat.gradients[elements],
            **{name: self._part(moment, group, elements) for name, moment in state.items()},
            step=self.num_steps,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_scale=grad_scale,
        )


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
