"""--rank auto in a run: what its tokens bound, then a probe of the gradients that training begins with."""

from dataclasses import replace

import torch
from torch import Tensor

from nybble.data.encoded_rows import lengths_of
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.events import Listener, tracked
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, parameters_a_rank
from nybble.layers.lora import LoraEmbedding
from nybble.options.adapter_groups import TAKES_FROM_BASE
from nybble.options.option import with_options
from nybble.planning.ranks import LEAST_RANK, RankChosen, enough_rank, tokens_met
from nybble.training.accumulation import forward_backward
from nybble.training.objectives import asks_before
from nybble.training.rng import capture_rng, restore_rng
from nybble.training.start import Examples, Opened

ENOUGH = 0.9  # of the gradients' energy
PROBED_STEPS = 8  # at most, and no more than a hundredth of the run


def bound_rank(opened: Opened, examples: Examples, report: Listener) -> Opened:
    """With the most that --rank auto takes in place of it: by the tokens that there are to learn.

    A resumed run has its rank already.
    """
    config, resumed = opened.config, opened.resumed
    if config.adapters.rank != "auto":
        return opened
    if resumed is not None:  # with other options than it began with
        return replace(opened, config=with_options(config, rank=resumed.state["settled"].get("rank", LEAST_RANK)))
    met = examples.num_steps * config.memory.rows_per_step
    tokens = tokens_met(examples.data.train, met)
    chosen = enough_rank(tokens, parameters_a_rank(opened.source.skeleton, config.adapters))
    report(chosen)
    return replace(opened, config=with_options(config, rank=chosen.rank))


def is_probed(opened: Opened) -> bool:
    """Whether a probe may lower the rank that the tokens bound.

    Not where adapters begin with a part of the weights, which was taken out of them before; nor where rows need what a
    reference says of them, which is asked afterwards.
    """
    config = opened.config
    begins = opened.given.adapters.rank == "auto" and opened.resumed is None
    late = config.adapters.init in TAKES_FROM_BASE or asks_before(config.objective)
    return begins and config.adapters.settled_rank > LEAST_RANK and not late


def probe_rank(opened: Opened, examples: Examples, model: CausalLM, micro_batch_size: int, report: Listener) -> int:
    """The least power of two of directions in which nearly all of the first steps' gradients lie.

    B begins with zeros, and its gradient is s·G·Aᵀ: the gradient G of the weight in as many random directions as the
    rank, a sketch of it (Halko et al. 2011, arXiv 0909.4061). The r leading ones are what an adapter of rank r takes of
    a step at first order, as LoRA-GA has it (Wang et al. 2024, arXiv 2407.05000). They are those of several batches
    together, each with its own, so that directions count that a mean over all rows would not show. Every layer counts
    alike: AdamW gives each the same length of step.

    Args:
        model: with adapters of the largest rank; nothing of it is changed, and no gradient is left.
    """
    config, train = opened.config, examples.data.train
    adapters = {n: each for n, each in adapters_of(model.module).items() if not isinstance(each, LoraEmbedding)}
    largest, rng = config.adapters.settled_rank, capture_rng(model.device)
    sampler = StepSampler(len(train), config.memory.rows_per_step, config.data.seed, examples.data.mixture)
    steps = [sampler.next_step() for _ in range(max(1, min(PROBED_STEPS, examples.num_steps // 100)))]
    lengths = lengths_of(train)
    micro_batches = [m for rows in steps for m in split_micro_batches(rows, lengths, micro_batch_size, model.packed)]
    grams = {name: torch.zeros(each.rank, each.rank, dtype=torch.float64) for name, each in adapters.items()}
    model.train()
    for micro in tracked(micro_batches, "probing gradients", report):
        rows = [train[row] for row in micro]
        batch = examples.objective.collate(rows, model).to(model.device)
        forward_backward(examples.objective, model, batch, examples.objective.totals(model, rows, micro_batch_size))
        for name, adapter in adapters.items():
            assert adapter.lora_B.grad is not None, name
            grams[name] += (adapter.lora_B.grad.T @ adapter.lora_B.grad).cpu().double()
        for parameter in model.parameters():
            parameter.grad = None
    restore_rng(rng, model.device)
    shares = torch.stack([energy_shares(gram) for gram in grams.values() if len(gram) == largest]).mean(dim=0)
    rank = LEAST_RANK
    while rank < largest and shares[rank - 1] < ENOUGH:
        rank *= 2
    found = f"{shares[rank - 1]:.0%} of the energy of the first gradients lies in {rank} of {largest} directions"
    report(RankChosen(rank, found))
    return rank


def energy_shares(gram: Tensor) -> Tensor:
    """Of the sum of the eigenvalues of a `(r, r)` positive matrix, what the 1, 2, .. r largest are, fp64 `(r,)`."""
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    total = values.sum()
    return values.cumsum(0) / total if total > 0 else torch.ones_like(values)
