"""The learning rate over a run: linear warm-up, then constant, cosine or linear decay to zero."""

import math


def warmup_steps(warmup: float, total_steps: int) -> int:
    """A fraction of the run if below 1, else a number of steps; at most the run."""
    steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    return min(steps, total_steps)


def learning_rate(step: int, total_steps: int, num_warmup: int, schedule: str, peak: float) -> float:
    """The learning rate of step `step`, which counts from 1 to `total_steps`.

    The first warm-up step already moves (peak / num_warmup); a decaying schedule is still above zero
    at the last step, so that no step is computed in vain.
    """
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - 1 - num_warmup) / max(1, total_steps - num_warmup)  # 0 at the first step after warm-up, below 1
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    assert schedule == "constant", schedule
    return peak
