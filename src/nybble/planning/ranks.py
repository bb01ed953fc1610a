"""--rank auto: how large an adapter must be for what there is to learn.

"LoRA Without Regret" (Schulman et al. 2025): LoRA learns as full fine-tuning does as long as its parameters can hold
what the data say. A token of text says about one bit that a language model does not know yet, and a parameter holds
about two (Allen-Zhu & Li 2024, arXiv 2404.05405). Passes after the first say nothing new.
"""

from dataclasses import dataclass
from typing import ClassVar

from nybble.data.encoded_rows import EncodedRows
from nybble.events import Event

LEAST_RANK, MOST_RANK = 8, 128  # below, an adapter takes next to nothing; above, full fine-tuning is near
BITS_A_TOKEN, BITS_A_PARAMETER = 1, 2


@dataclass(frozen=True)
class RankChosen(Event):
    """--rank auto: the rank that the run takes, or at most."""

    kind: ClassVar[str] = "rank"
    rank: int
    why: str


def enough_rank(tokens: int, parameters: int) -> RankChosen:
    """The least power of two whose adapters can hold what the data say.

    Args:
        tokens: supervised ones that the run meets, each once.
        parameters: of all adapters, a rank.
    """
    needed = tokens * BITS_A_TOKEN / BITS_A_PARAMETER
    rank = LEAST_RANK
    while rank < MOST_RANK and rank * parameters < needed:
        rank *= 2
    least = max(1, round(needed / parameters))
    why = f"{tokens:,} supervised tokens at {BITS_A_TOKEN} bit fill {least} x {parameters:,} parameters of 2 bits"
    if rank == LEAST_RANK:
        why += f"; {LEAST_RANK} is the least"
    if rank == MOST_RANK and rank * parameters < needed:
        why += f"; {MOST_RANK} is the most"
    return RankChosen(rank, why)


def tokens_met(train: EncodedRows, rows: int) -> int:
    """Supervised tokens of so many training rows, each counted once."""
    return round(int(train.supervised_tokens.sum()) * min(1.0, rows / len(train)))
