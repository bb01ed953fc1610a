"""Recurrences over packed rows, chunk by chunk, in plain PyTorch: no row's state knows what came before the row.

Each is the sum that its sequential form gives, written as products of matrices within chunks of CHUNK tokens, and a
state that passes from chunk to chunk (Dao and Gu 2024, arXiv 2405.21060; Yang et al. 2024, arXiv 2412.06464). A row may
begin anywhere in a chunk: factors between tokens of different rows are 0 exactly, and so are those of a state that
comes from another row. Everything is fp32, or what the arguments are.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """A convolution of each channel by itself over the tokens before, of the same row:
    y[t, c] = bias[c] + sum over j of weight[c, width - 1 - j] * x[t - j, c].

    Args:
        x: (T, C). weight: (C, width). bias: (C). rows: (T), the number of each token's row.
    """
    y = x * weight[:, -1]
    for back in range(1, min(weight.shape[1], len(x))):
        same = (rows[back:] == rows[:-back])[:, None]
        y = y + F.pad(torch.where(same, x[:-back], 0) * weight[:, -1 - back], (0, 0, back, 0))
    return y if bias is None else y + bias


@dataclass(frozen=True)
class Chunks:
    """How T tokens lie in chunks, the last one filled up with a row of its own.

    Args:
        within: (chunks, CHUNK, CHUNK), whether a token may see another: of its row, and no later one.
        reads: (chunks, CHUNK), whether a token's row has begun in an earlier chunk.
        leaves: (chunks, CHUNK), whether a token's row goes on to the end of its chunk.
        carries: whether the state before each chunk is that behind it, too.
    """

    within: Tensor
    reads: Tensor
    leaves: Tensor
    carries: list[bool]

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """Of each token's row, (T), which may be any numbers from 0 on."""
        numbers = F.pad(rows, (0, -len(rows) % CHUNK), value=-1).view(-1, CHUNK)
        before = F.pad(numbers[:-1, -1], (1, 0), value=-2)
        within = (numbers[:, :, None] == numbers[:, None, :]).tril()
        carries = (numbers[:, -1] == before).tolist()
        return cls(within, numbers == before[:, None], numbers == numbers[:, -1:], carries)

    def cut(self, x: Tensor) -> Tensor:
        """(T, H, ..) -> (H, chunks, CHUNK, ..), filled up with zeros."""
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, self.reads.numel() - len(x)))
        return x.unflatten(0, self.reads.shape).movedim(2, 0)

    def summed(self, steps: Tensor) -> Tensor:
        """Of each token and those before it in its row and chunk, (H, chunks, CHUNK): the log of what is left of the
        state before them. A sum over all of the chunk would cancel only up to roundings.
        """
        return (self.within.to(steps.dtype) @ steps[..., None])[..., 0]

    def joined(self, x: Tensor, num_tokens: int) -> Tensor:
        """(H, chunks, CHUNK, ..) -> (T, H, ..)."""
        return x.movedim(0, 2).flatten(0, 1)[:num_tokens]


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, rows: Tensor
) -> Tensor:
    """Per head, S = exp(log_decay_t) S;  S = S + beta_t k_t (v_t - S^T k_t)^T;  o_t = S^T q_t;  S = 0 before a row.

    Within a chunk the updates are one triangular system (the UT transform of arXiv 2412.06464).

    Args:
        query, key: (T, heads, width of keys), as the rule takes them. value: (T, heads, width of values).
        log_decay, beta: (T, heads). rows: (T), the number of each token's row.

    Returns:
        (T, heads, width of values).
    """
    chunks = Chunks.of(rows)
    q, k, v, beta, steps = (chunks.cut(x) for x in (query, key, value, beta[..., None], log_decay))
    passed = chunks.summed(steps)
    decay = _decay(passed, chunks)
    scaled = k * beta
    system = (scaled @ k.mT) * decay
    reading = _left(passed, chunks.reads)[..., None]
    leaving = _left(passed[..., -1:] - passed, chunks.leaves)[..., None]
    sides = torch.cat([v * beta, scaled * reading], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    written, read = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    seen, q, k = (q @ k.mT) * decay, q * reading, k * leaving
    last = passed[..., -1].exp()[..., None, None]
    state: Tensor | None = None
    outputs = []
    for i, carries in enumerate(chunks.carries):
        new = written[:, i] if state is None else written[:, i] - read[:, i] @ state
        output = seen[:, i] @ new
        outputs.append(output if state is None else output + q[:, i] @ state)
        left = k[:, i].mT @ new
        state = left if state is None or not carries else state * last[:, i] + left
    return chunks.joined(torch.stack(outputs, dim=1), len(rows))


def state_space_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, rows: Tensor) -> Tensor:
    """Per head, S = exp(dt_t a) S + dt_t b_t x_t^T;  y_t = S^T c_t, S = 0 before a row (arXiv 2405.21060).

    Args:
        x: (T, heads, width). dt: (T, heads), step sizes. a: (heads), below 0.
        b, c: (T, groups, state), each for heads / groups neighbouring heads. rows: (T), the number of each token's row.

    Returns:
        (T, heads, width).
    """
    num_tokens, num_heads, width = x.shape
    groups = b.shape[1]
    chunks = Chunks.of(rows)
    steps, moved = chunks.cut(dt * a), chunks.cut(x * dt[..., None])  # (H, chunks, CHUNK), (.., width)
    b, c = chunks.cut(b), chunks.cut(c)  # (G, chunks, CHUNK, state)
    passed = chunks.summed(steps)
    scores = (c @ b.mT).repeat_interleave(num_heads // groups, dim=0) * _decay(passed, chunks)
    y = scores @ moved
    reading = _left(passed, chunks.reads)[..., None]
    leaving = _left(passed[..., -1:] - passed, chunks.leaves)[..., None]
    # The heads of a group side by side: one product with what they share.
    left = b.mT @ _side_by_side(moved * leaving, groups)  # (G, chunks, state, heads of the group * width)
    last = passed[..., -1].exp()[..., None, None].expand(-1, -1, 1, width)
    last = _side_by_side(last, groups)  # (G, chunks, 1, heads of the group * width)
    states = [torch.zeros_like(left[:, 0])]
    for i, carries in enumerate(chunks.carries[:-1]):
        states.append(states[-1] * last[:, i] + left[:, i] if carries else left[:, i])
    read = c @ torch.stack(states, dim=1)  # (G, chunks, CHUNK, heads of the group * width)
    read = read.unflatten(-1, (num_heads // groups, width)).movedim(-2, 1).flatten(0, 1)
    return chunks.joined(y + read * reading, num_tokens)


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, rows: Tensor) -> Tensor:
    """Per channel, s = exp(dt_t a) s + dt_t x_t b_t;  y_t = <s, c_t>;  s = 0 before a row (Gu and Dao 2023, arXiv
    2312.00752).

    Each element of a state decays by a factor of its own, so that there are no products of matrices to make of it:
    token by token, forward and backward. Kept for the backward pass is a state for each CHUNK tokens.

    Args:
        x, dt: (T, channels). a: (channels, state), below 0. b, c: (T, state).
        rows: (T), the number of each token's row.

    Returns:
        (T, channels).
    """
    y: Tensor = _SelectiveScan.apply(x, dt, a, b, c, rows)
    return y


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, rows: Tensor) -> Tensor:
        begins = F.pad(rows[1:] != rows[:-1], (1, 0), value=True)
        y, state, starts = torch.empty_like(x), x.new_zeros(a.shape), []
        for at in range(0, len(x), CHUNK):
            part = slice(at, at + CHUNK)
            starts.append(state)
            states, _ = _states(x[part], dt[part], a, b[part], begins[part], state)
            y[part] = (states @ c[part][:, :, None])[..., 0]
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, a, b, c, begins, torch.stack(starts))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, begins, starts = ctx.saved_tensors
        grad_x, grad_dt, grad_a = torch.empty_like(x), torch.empty_like(dt), torch.zeros_like(a)
        grad_b, grad_c = torch.empty_like(b), torch.empty_like(c)
        later = torch.zeros_like(a)  # the gradient of the state behind the chunk
        for number in reversed(range(len(starts))):
            part = slice(number * CHUNK, (number + 1) * CHUNK)
            states, decay = _states(x[part], dt[part], a, b[part], begins[part], starts[number])
            grad_c[part] = (grad[part][:, None] @ states)[:, 0]
            # From here on what a state gives its successor, decay * state before, is all that is asked of the states.
            states = torch.cat([starts[number][None], states[:-1]]).mul_(decay)
            inner = grad[part][:, :, None] * c[part][:, None]
            inner[-1] += later
            for t in range(len(inner) - 2, -1, -1):
                inner[t].addcmul_(inner[t + 1], decay[t + 1])
            later = inner[0] * decay[0]
            taken = (inner @ b[part][:, :, None])[..., 0]
            grad_x[part] = taken * dt[part]
            grad_b[part] = ((x[part] * dt[part])[:, None] @ inner)[:, 0]
            inner.mul_(states)
            grad_dt[part] = taken * x[part] + (inner * a).sum(-1)
            grad_a += (inner * dt[part][..., None]).sum(0)
        return grad_x, grad_dt, grad_a, grad_b, grad_c, None


def _states(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states behind each token of a chunk, (CHUNK, channels, state), and what is left of the one before it."""
    decay = (dt[..., None] * a).exp_().masked_fill_(begins[:, None, None], 0)
    states = (x * dt)[..., None] * b[:, None]
    for t in range(len(states)):
        states[t].addcmul_(state, decay[t])
        state = states[t]
    return states, decay


def _decay(passed: Tensor, chunks: Chunks) -> Tensor:
    """What is left at a token of what another gave, (H, chunks, CHUNK, CHUNK)."""
    return _left(passed[..., :, None] - passed[..., None, :], chunks.within)


def _left(log_decay: Tensor, seen: Tensor) -> Tensor:
    """Its exponential, 0 exactly where nothing is seen, even where it would overflow, as between two rows."""
    return log_decay.masked_fill(~seen, float("-inf")).exp()


def _side_by_side(x: Tensor, groups: int) -> Tensor:
    """(H, chunks, n, width) -> (G, chunks, n, H / G * width)."""
    return x.unflatten(0, (groups, -1)).movedim(1, -2).flatten(-2)
