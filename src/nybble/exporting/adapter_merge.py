"""One adapter of several that belong on one base, in PEFT's format; the names of the ways are PEFT's.

With weights w and scalings s of adapters B A:

    cat          A of all, times w s, one under the other, and B of all side by side: exactly the sum of their ΔW, and
                 of their ranks
    linear       Σ ±√|w s| A and Σ √|w s| B: of one rank, with products of one adapter's B and another's A in it
    ties         the same, of each matrix only the largest entries, and of those the ones whose sign most weight has
                 (Yadav et al. 2023, arXiv 2306.01708)
    dare_linear  linear, of entries drawn at random and scaled up for those left out (Yu et al. 2023, arXiv 2311.03099)
    dare_ties    those, and of them the ones whose sign most weight has
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import ConfigError
from nybble.events import Listener, Note, silent
from nybble.files.disk import complete_folder
from nybble.options.use_groups import AdapterMethod
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.adapter_writing import write_merged_adapter
from nybble.runs.continued import open_adapter
from nybble.runs.folder import RunFolder

Pair = tuple[Tensor, Tensor]


def merge_adapters(
    folders: Sequence[str],
    weights: Sequence[float],
    out: Path,
    *,
    method: AdapterMethod = "cat",
    density: float = 0.5,
    seed: int = 0,
    report: Listener = silent,
) -> Path:
    """Write the merged adapter into a new folder, which appears complete or not at all; returns the folder.

    Args:
        folders: of adapters, nybble's or PEFT's, or of runs.
        weights: of each.
        density: the part of each matrix's entries that ties and dare keep.
        seed: of what dare draws.

    Raises:
        ConfigError: they do not go together, or not in this way.
        RunError: one of them is missing or damaged.
    """
    adapters = [open_adapter(folder) for folder in folders]
    _check_bases(adapters)
    for adapter in adapters:
        _check_addable(adapter)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.names))
    generator, merged = torch.Generator().manual_seed(seed), {}
    for name in names:
        there = [(each, weight) for each, weight in zip(adapters, weights, strict=True) if name in each.names]
        scaled = [weight * each.scaling_of(name) for each, weight in there]
        pairs = [each.matrices(name, *each.features(name)) for each, _ in there]
        if method != "cat" and len({a.shape for a, _ in pairs}) > 1:
            raise ConfigError(
                f"The adapters have ranks {', '.join(str(len(a)) for a, _ in pairs)} on {name}.",
                f"--method {method} is for adapters of one rank.",
                "Use --method cat.",
            )
        merged[name] = _merge(pairs, scaled, method, density, generator)
    with complete_folder(out) as temporary:
        write_merged_adapter(adapters, merged, temporary)
    report(Note(f"{out} holds {' + '.join(f'{w:g} x {f}' for f, w in zip(folders, weights, strict=True))} ({method})."))
    return out


def _merge(
    pairs: Sequence[Pair], scaled: Sequence[float], method: AdapterMethod, density: float, generator: torch.Generator
) -> Pair:
    """A and B of one layer, whose scaling is in them."""
    if method == "cat":
        rows = [a * weight for (a, _), weight in zip(pairs, scaled, strict=True)]
        return torch.cat(rows), torch.cat([b for _, b in pairs], dim=1)
    roots = [abs(weight) ** 0.5 for weight in scaled]
    signed = [-root if weight < 0 else root for root, weight in zip(roots, scaled, strict=True)]
    a = _added([a for a, _ in pairs], signed, method, density, generator)
    return a, _added([b for _, b in pairs], roots, method, density, generator)


def _added(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    method: AdapterMethod,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    if method == "ties":
        matrices = [_largest(matrix, density) for matrix in matrices]
    if method.startswith("dare"):
        matrices = [_drawn(matrix, density, generator) for matrix in matrices]
    stacked = torch.stack(list(matrices))  # (adapters, rows, columns)
    weighted = stacked * torch.tensor(weights)[:, None, None]
    if not method.endswith("ties"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == elected
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _largest(matrix: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, the others zero."""
    kept = torch.topk(matrix.abs().flatten(), int(density * matrix.numel())).indices
    return torch.zeros_like(matrix).flatten().index_copy(0, kept, matrix.flatten()[kept]).view_as(matrix)


def _drawn(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries drawn with this probability, divided by it."""
    return matrix * torch.bernoulli(torch.full_like(matrix, density), generator=generator) / density


def _check_bases(adapters: Sequence[StoredAdapter]) -> None:
    runs = [adapter.folder.parent for adapter in adapters]
    known = {run: base for run in runs if (base := RunFolder(run).recorded().get("fingerprint")) is not None}
    if len(set(known.values())) > 1:
        first, *others = known
        other = next(run for run in others if known[run] != known[first])
        raise ConfigError(
            f"{first} and {other} were trained on different bases.",
            "Merged are adapters that belong on one base.",
            "Merge each into its base (`nybble merge --run`).",
        )


def _check_addable(adapter: StoredAdapter) -> None:
    why = "is DoRA's, whose lengths do not add up" if adapter.dora else ""
    why = "has trained rows of tokens" if adapter.tokens else why
    why = "has adapters on experts" if adapter.experts else why
    why = f"has {next(iter(adapter.modules))} trained whole" if adapter.modules else why
    why = "began with what quantising lost of its base" if adapter.has_initial else why
    if why:
        raise ConfigError(
            f"The adapter in {adapter.folder} {why}.",
            "Merged are adapters that began with nothing (--init default, eva).",
            "Merge it into its base (`nybble merge --run`).",
        )
