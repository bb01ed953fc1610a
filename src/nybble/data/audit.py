"""The audit: what will be trained on, counted, and everything that looks wrong with it, named.

It runs before every training. Findings have ids that stay the same from version to version; those of level
"error" stop training, those of level "warning" are shown and kept in `data_audit.json`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from nybble.data.examples import EncodedExample, Example
from nybble.data.findings import MOST_DROPPED, NEVER_ALLOWED, Finding, find
from nybble.data.mixture import MixedPart
from nybble.data.readers import COLUMNS_NAMED, ReadResult
from nybble.data.text_encoder import RowError
from nybble.errors import DataError
from nybble.events import Event
from nybble.files.spool import Spool

ABOUT_LOST_ROWS = ("no-rows", "many-dropped")


@dataclass(frozen=True)
class Audit:
    """What was found in the examples of a run: counts, and what is wrong.

    Args:
        source, validation_source: as the user gave them; the latter is None where the rows were split.
        layout: which columns were read.
        num_rows: rows read, validation file included.
        num_dropped: rows of which nothing is trained or validated on.
        num_truncated: sequences that lost their end to `max_seq_len`.
        num_train, num_validation: sequences.
        tokens, supervised_tokens: over the training sequences.
        validation_tokens, validation_supervised_tokens: over the validation sequences.
        truncated_tokens: tokens lost to `max_seq_len`.
        longest: tokens of the longest sequence before truncation.
        length_percentiles: of those lengths, keys "p50", "p90", "p99".
        notices: what the template has to say.
        findings: errors first.
        allowed: ids of findings that the user accepts.
        mixture: where the data sets have weights.
    """

    source: str
    validation_source: str | None
    layout: str
    max_seq_len: int
    num_rows: int
    num_dropped: int
    num_truncated: int
    num_train: int
    num_validation: int
    tokens: int
    supervised_tokens: int
    validation_tokens: int
    validation_supervised_tokens: int
    truncated_tokens: int
    longest: int
    length_percentiles: dict[str, int]
    notices: tuple[str, ...]
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...] = ()
    mixture: tuple[MixedPart, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What must stop training."""
        return tuple(f for f in self.findings if f.level == "error" and f.id not in self.allowed)

    def check(self, use: str = "trained on") -> None:
        """Let pass what can be trained on, or put to the `use` that the message names.

        Raises:
            DataError: a finding must stop training; all such findings are in the message.
        """
        if not self.errors:
            return
        # Where rows are missing, what dropped them belongs in the message too.
        shown = self.findings if any(finding.id in ABOUT_LOST_ROWS for finding in self.errors) else self.errors
        got = "\n".join(str(finding) for finding in shown if finding.id != "no-validation")
        fix = "\n".join(f"{f.id}: {f.fix}" for f in shown if f.id not in (*ABOUT_LOST_ROWS, "no-validation"))
        raise DataError(f"{self.source} cannot be {use}.\n{got}", fix=fix + self._way_out())

    def _way_out(self) -> str:
        """How to accept the errors, where that leads on: nothing is offered beside an error that cannot be accepted."""
        ids = [finding.id for finding in self.errors]
        if not set(ids).isdisjoint(NEVER_ALLOWED):
            return ""
        return f"\nTo go on all the same, with the rows that can be used: --allow {','.join(ids)}"

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        findings = [{**asdict(f), "rows": list(f.rows), "level": f.level, "message": f.message} for f in self.findings]
        lists = {"notices": list(self.notices), "allowed": list(self.allowed), "findings": findings}
        lists["mixture"] = [asdict(part) for part in self.mixture]
        return {**asdict(self), **lists}


@dataclass(frozen=True)
class Audited(Event):
    """The examples have been read and looked at."""

    kind: ClassVar[str] = "audit"
    audit: Audit

    def fields(self) -> dict[str, Any]:
        return self.audit.to_json()


def find_in_reading(reads: Sequence[ReadResult]) -> list[Finding]:
    """What was noticed while rows were read: those that could not be, and what of the others is not learnt from."""
    kinds: dict[str, Spool[RowError]] = defaultdict(Spool)
    for error in (error for read in reads for error in read.odd):
        kinds[error.finding].append(error)
    findings = [f for id, errors in kinds.items() for f in find(id, (e.origin for e in errors), errors[0].detail)]
    as_text = Spool.of(change for read in reads for change in read.as_text)
    left_out = Spool.of(column for read in reads for column in read.left_out)
    unread = sum((read.unread for read in reads), Counter[str]())
    findings += find("number-as-text", (origin for origin, _ in as_text), as_text[0][1] if as_text else "")
    columns = Counter(column for _, column in left_out)
    findings += find("unread-lesson", (origin for origin, _ in left_out), _count_columns(columns))
    if others := Counter({column: count for column, count in unread.items() if column not in columns}):
        findings.append(Finding("unread-columns", max(others.values()), (), _count_columns(others)))
    return findings


def _count_columns(rows: Counter[str]) -> str:
    named = [f"{column!a} in {count}" for column, count in rows.most_common(COLUMNS_NAMED)]
    return ", ".join(named) + (f" and {len(rows) - len(named)} more" if len(rows) > len(named) else "")


def find_ids_beyond(sequences: Sequence[EncodedExample], vocab_size: int) -> list[Finding]:
    """Sequences with an id of `vocab_size` (the rows of the model's embedding matrix) or more."""
    largest = ((s.origin, int(s.input_ids.max())) for s in sequences)
    beyond = Spool.of((origin, id) for origin, id in largest if id >= vocab_size)
    detail = f"largest id {max(id for _, id in beyond)}, embedding {vocab_size} rows" if beyond else ""
    return find("ids-beyond-vocabulary", (origin for origin, _ in beyond), detail)


def find_without_end_of_turn(sequences: Sequence[EncodedExample], stop_ids: Sequence[int]) -> list[Finding]:
    """Sequences in which a run of supervised tokens, not cut off by truncation, ends in none of `stop_ids`."""
    stops = np.array(stop_ids, dtype=np.int32)
    return find("no-end-of-turn", (s.origin for s in sequences if not _ends(s, stops)))


def _ends(sequence: EncodedExample, stops: np.ndarray) -> bool:
    return all(_each_run_ends(document, stops) for document in sequence.learnt_documents)


def _each_run_ends(sequence: EncodedExample, stops: np.ndarray) -> bool:
    supervised = sequence.supervised.numpy()
    last = supervised.copy()
    last[:-1] &= ~supervised[1:]
    last[-1] &= sequence.num_truncated == 0
    return bool(np.isin(sequence.input_ids.numpy()[last], stops).all())


def find_special_tokens(examples: Sequence[Example], special_tokens: Sequence[str]) -> list[Finding]:
    if not special_tokens:
        return []
    pattern = re.compile("|".join(map(re.escape, special_tokens)))
    spelled: dict[str, Spool[tuple[str, str]]] = defaultdict(Spool)
    for example in examples:
        if match := pattern.search(example.full_text()):
            id = "special-token-in-content" if example.text is None else "special-token-in-text"
            spelled[id].append((example.origin, match[0]))
    return [
        found
        for id, concerned in sorted(spelled.items())
        for found in find(id, (origin for origin, _ in concerned), repr(concerned[0][1]))
    ]


def find_many_dropped(dropped: Counter[str], num_rows: int) -> list[Finding]:
    """An error where more than `MOST_DROPPED` of the rows are lost, whatever they are lost to.

    Args:
        dropped: id of a finding -> rows of which nothing is left because of it.
    """
    lost = dropped.total()
    if lost <= MOST_DROPPED * num_rows:
        return []
    causes = ", ".join(f"{count} by {id}" for id, count in dropped.most_common())
    return [Finding("many-dropped", lost, (), f"of {num_rows}: {causes}")]


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Nearest-rank percentiles; zeros for no lengths."""
    ranked = np.sort(lengths) if len(lengths) else np.zeros(1, dtype=np.int64)
    return {f"p{p}": int(ranked[max(0, -(-p * len(ranked) // 100) - 1)]) for p in (50, 90, 99)}
