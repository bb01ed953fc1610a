"""`lengths.png`: how long the sequences of a data set are."""

from collections.abc import Sequence
from pathlib import Path


def draw_lengths(lengths: Sequence[int], max_seq_len: int, out: Path) -> None:
    """Draw a histogram of `lengths` (tokens, before truncation) into the picture `out`."""
    from matplotlib.figure import Figure  # here, since importing it takes half a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=min(60, max(1, len(set(lengths)))), color="tab:blue")
    if max(lengths, default=0) > max_seq_len:
        axes.axvline(max_seq_len, color="tab:red", label=f"cut at {max_seq_len}")
        axes.legend()
    axes.set_xlabel("tokens")
    axes.set_ylabel("sequences")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
