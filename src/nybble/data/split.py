"""The validation split: seeded, and no row of it says the same as a training row."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from nybble.data.examples import Example


def split_validation(
    examples: Sequence[Example], fraction: float = 0.05, max_rows: int = 512, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Row numbers (train, validation), each in the order of the rows.

    Rows with the same `content_key` go to the same side. The sides are drawn by a hash of (seed, content), so
    they do not depend on the order of the rows, and rows added later leave most others on their side.

    Args:
        fraction: of the rows; at least one row is held out where it is above 0 and two different rows exist.
        max_rows: an upper limit to the validation rows.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        groups[example.content_key].append(number)
    if fraction <= 0 or max_rows < 1 or len(groups) < 2:
        return list(range(len(examples))), []
    wanted = min(max_rows, max(1, round(fraction * len(examples))))
    drawn = sorted(groups.values(), key=lambda rows: _rank(seed, examples[rows[0]].content_key))
    validation: list[int] = []
    for rows in drawn:
        if len(validation) + len(rows) <= wanted:
            validation += rows
    if not validation:  # every group is larger than what is wanted: take the smallest
        validation = min(drawn, key=len)
    held_out = set(validation)
    return [n for n in range(len(examples)) if n not in held_out], sorted(held_out)


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
