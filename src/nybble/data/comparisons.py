"""What rows have in common that they should not: duplicates, leaks into the validation rows, one answer for all."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nybble.data.examples import Example
from nybble.data.findings import ROWS_NAMED, Finding, find
from nybble.data.near_duplicates import near_duplicates
from nybble.data.split import group_starts
from nybble.events import Listener, tracked_rows

MOST_OF_AT_LEAST = 10  # rows, below which "most rows" says nothing


def find_at(finding: str, examples: Sequence[Example], numbers: np.ndarray) -> list[Finding]:
    """A finding about examples by their numbers, or none; as `find`."""
    named = tuple(examples[number].origin for number in numbers[:ROWS_NAMED].tolist())
    return [Finding(finding, len(numbers), named)] if named else []


def find_duplicates(examples: Sequence[Example], ranks: np.ndarray) -> list[Finding]:
    """Rows that say the same as an earlier one.

    Args:
        ranks: their `content_ranks`.
    """
    order = np.argsort(ranks, kind="stable")
    repeated = np.sort(np.delete(order, group_starts(ranks[order])))
    return find_at("duplicates", examples, repeated)


def find_same_answer(examples: Sequence[Example]) -> list[Finding]:
    """Rows with the answer that more than half of them have (Boyer and Moore's majority vote: no answers are kept)."""
    commonest, lead, num_answers = "", 0, 0
    for answer in _answers(examples):
        commonest = answer if lead == 0 else commonest
        lead += 1 if answer == commonest else -1
        num_answers += 1
    if (
        lead == 0
        or num_answers < MOST_OF_AT_LEAST
        or 2 * sum(a == commonest for a in _answers(examples)) <= num_answers
    ):
        return []
    origins = (e.origin for e in examples if (said := e.last_answer()) is not None and _squeeze(said) == commonest)
    return find("same-answer", origins, repr(commonest[:60]))


def _answers(examples: Iterable[Example]) -> Iterator[str]:
    return (_squeeze(answer) for e in examples if (answer := e.last_answer()) is not None)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def find_near_leaks(
    train: Sequence[Example],
    validation: Sequence[Example],
    train_ranks: np.ndarray,
    validation_ranks: np.ndarray,
    report: Listener,
) -> list[Finding]:
    """Validation rows that are like a training row, and do not say the same.

    Args:
        train_ranks, validation_ranks: their `content_ranks`.
        report: told how far it has come, where rows are many.
    """
    texts = (e.full_text() for e in tracked_rows(train, "comparing rows", report))
    pairs = near_duplicates(texts, [e.full_text() for e in validation])
    near = [(train[i].origin, validation[j].origin) for i, j in pairs if train_ranks[i] != validation_ranks[j]]
    detail = f"{near[0][1]} is like {near[0][0]}" if near else ""
    return find("near-leak", (origin for _, origin in near), detail)


def find_leaks(validation: Sequence[Example], train_ranks: np.ndarray, validation_ranks: np.ndarray) -> list[Finding]:
    """Validation rows that say the same as a training row; arguments as of `find_near_leaks`."""
    return find_at("validation-leak", validation, np.flatnonzero(np.isin(validation_ranks, train_ranks)))
