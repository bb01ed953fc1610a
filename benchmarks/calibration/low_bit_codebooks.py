"""Which 8 and which 4 levels? Candidate tables on real weights: relative squared error, absmax and searched scales.

    python benchmarks/calibration/low_bit_codebooks.py --out benchmarks/results/low-bit-codebooks.json

Candidates for each number of levels:

    quantile   the construction of NF4: quantiles of the normal distribution, a zero, -1 and 1
    lloyd      least squared error for a block of 64 normal values divided by their absmax (Lloyd 1982, Max 1960)
    pinned     the same with -1 and 1 among the levels
    signed     least squared error where the value of largest magnitude is divided to +1 (the scale carries its sign)

A demo model on a Q4 lattice is dithered first: seeded uniform noise of half a step each way.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 64
MATRICES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYERS = (0, 7, 15, 22, 29)


def quantile_levels(count: int) -> list[float]:
    """NF4's construction with `count` levels instead of 16."""
    offset = ((1 - 1 / (2 * count - 2)) + (1 - 1 / (2 * count))) / 2
    quantile, half = statistics.NormalDist().inv_cdf, count // 2
    positive = [quantile(offset + (0.5 - offset) * i / half) for i in range(half)]
    negative = [-quantile(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    return sorted(value / positive[0] for value in [*positive, 0.0, *negative])


def lloyd_levels(count: int, kind: str) -> list[float]:
    """Levels of least squared error for normal blocks over their absmax, by Lloyd's iteration.

    A block of BLOCK values with largest magnitude m holds one value at m (or -m) and BLOCK - 1 that are normal
    within (-m, m). With x the value and q its level the error is (x - m q)^2, so over a cell q = E[m x] / E[m^2].
    """
    m = torch.linspace(0.5, 7, 2001, dtype=torch.float64)  # the integral over m is a sum
    inside = cumulative(m) - cumulative(-m)  # P(|x| < m)
    of_m = inside ** (BLOCK - 1) * density(m)
    others = (BLOCK - 1) * of_m / inside
    tops = [1.0] if kind == "signed" else [-1.0, 1.0]
    fixed = (-1.0, 1.0) if kind == "pinned" else ()
    levels = torch.tensor(quantile_levels(count), dtype=torch.float64)
    for _ in range(5000):
        middle = (levels[1:] + levels[:-1]) / 2
        borders = (
            torch.cat([middle.new_tensor([-1.0]), middle, middle.new_tensor([1.0])])[:, None] * m
        )  # (count + 1, m)
        moment = (others * m * (density(borders[:-1]) - density(borders[1:]))).sum(1)
        mass = (others * m**2 * (cumulative(borders[1:]) - cumulative(borders[:-1]))).sum(1)
        for top in tops:
            cell = int(torch.bucketize(torch.tensor(top, dtype=torch.float64), middle))
            moment[cell] += top * (of_m * m**2).sum() / len(tops)
            mass[cell] += (of_m * m**2).sum() / len(tops)
        means = (moment / mass).tolist()
        levels = levels.new_tensor(
            [old if old in fixed else new for old, new in zip(levels.tolist(), means, strict=True)]
        )
    return levels.tolist()


def density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def cumulative(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def absmax_error(blocks: Tensor, levels: Tensor, signed: bool) -> float:
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = scale if signed else scale.abs()
    return float((blocks - nearest(blocks / scale, levels) * scale).square().sum() / blocks.square().sum())


def search_error(blocks: Tensor, levels: Tensor) -> float:
    """As DESIGN.md has it: eight starts, two rounds of assignment and least squares, the best kept."""
    absmax = blocks.abs().amax(1, keepdim=True)
    best = torch.full((len(blocks),), math.inf)
    for start in (-1.1, -1.0, -0.9, -0.8, 0.8, 0.9, 1.0, 1.1):
        scale = start * absmax
        for _ in range(2):
            value = nearest(blocks / scale, levels)
            scale = (blocks * value).sum(1, keepdim=True) / value.square().sum(1, keepdim=True)
        best = torch.minimum(best, (blocks - scale * nearest(blocks / scale, levels)).square().sum(1))
    return float(best.sum() / blocks.square().sum())


def dithered(w: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise of half a lattice step each way; the step of 32 values in a row is their least difference."""
    rows = w.view(-1, 32)
    gaps = rows.sort(1).values.diff(dim=1)
    step = torch.where(gaps > 1e-6 * rows.abs().amax(1, keepdim=True), gaps, math.inf).amin(1, keepdim=True)
    noise = torch.rand(rows.shape, generator=generator) - 0.5
    return (rows + noise * step.nan_to_num(posinf=0.0)).view(w.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from nybble.sources.open import open_model

    source, generator = open_model(options.model), torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{name}.weight" for layer in LAYERS for name in MATRICES]
    blocks = [dithered(source.read(name).float(), generator).view(-1, BLOCK) for name in names]
    results = {}
    for count in (4, 8, 16):
        kinds = {"quantile": quantile_levels(count)}
        kinds |= {kind: lloyd_levels(count, kind) for kind in ("lloyd", "pinned", "signed")}
        for kind, values in kinds.items():
            levels = torch.tensor(values)
            absmax = statistics.mean(absmax_error(b, levels, kind == "signed") for b in blocks)
            search = statistics.mean(search_error(b[:: 1 if count < 16 else 4], levels) for b in blocks)
            results[f"{count} {kind}"] = {"levels": values, "absmax": absmax, "search": search}
            print(
                f"{count:3d} {kind:9s} absmax {absmax:.5f} search {search:.5f}  {[round(v, 4) for v in values]}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
