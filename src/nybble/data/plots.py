"""`lengths.png`: how long the sequences of a data set are."""

from pathlib import Path

import numpy as np

from nybble.pictures import picture


def draw_lengths(lengths: np.ndarray, max_seq_len: int, out: Path) -> None:
    """Draw a histogram of `lengths` (tokens, before truncation) into the picture `out`."""
    with picture(out, "tokens", "sequences") as axes:
        axes.stairs(*np.histogram(lengths, bins=min(60, max(1, len(np.unique(lengths))))), fill=True, color="tab:blue")
        if lengths.max(initial=0) > max_seq_len:
            axes.axvline(max_seq_len, color="tab:red", label=f"cut at {max_seq_len}")
            axes.legend()
