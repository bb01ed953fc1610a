"""The reference of DPO, IPO and KTO: the model that training begins with, asked without a second one in memory.

In the same step: the base, its adapters switched off (`adapters_off`), on the very batch. Or once before the first step
(`ask_reference`): its log-probabilities of all rows that the run will meet, kept in the run folder. That is the
default: it is one forward pass a row, where the same step takes one each time that the row is met or evaluated; and
the reference may be another than the bare base, where training begins with an adapter or with `--init`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted
from nybble.data.examples import EncodedExample
from nybble.data.preference_rows import EncodedPair, PreferenceBatch, PreferenceRow, compare
from nybble.data.sampler import split_micro_batches
from nybble.errors import RunError
from nybble.events import Listener, Note, silent, tracked
from nybble.files.disk import write_complete
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, enable_adapters

ROWS_AT_ONCE = 64  # that are dealt into micro-batches together
SAVE_SECONDS = 60.0
ADAPTER = "adapter"  # begins what a reference begins with, where that is one


@contextmanager
def as_evaluated(model: CausalLM) -> Iterator[None]:
    """Within the block nothing is dropped."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_off(model: CausalLM) -> Iterator[None]:
    """Within the block the model is its base, and nothing is dropped."""
    were_on = any(adapter.enabled for adapter in adapters_of(model.module).values())
    enable_adapters(model.module, False)
    try:
        with as_evaluated(model):
            yield
    finally:
        enable_adapters(model.module, were_on)


@torch.no_grad()
def reference_of(model: CausalLM, batch: PreferenceBatch) -> Tensor:
    """Summed log-probabilities of a batch's answers by the reference, fp64 `(documents,)`: those that it brings, or the
    base's.
    """
    if batch.reference is not None:
        return batch.reference
    with adapters_off(model):
        return batch.sums(as_double(-model.token_losses(batch)))


@torch.no_grad()
def answer_log_probs(model: CausalLM, documents: Sequence[EncodedExample], micro_batch_size: int) -> Tensor:
    """Summed log-probability of each document's supervised tokens, fp64 `(documents,)` on the CPU; nothing is dropped.

    Args:
        micro_batch_size: documents that are computed at once.
    """
    found = torch.zeros(len(documents), dtype=torch.float64)
    lengths = [len(document) for document in documents]
    with as_evaluated(model):
        for micro in split_micro_batches(range(len(documents)), lengths, micro_batch_size, model.packed):
            batch = packing.collate([documents[i] for i in micro], model.packed).to(model.device)
            log_p = -model.token_losses(batch).cpu().double()
            counts = [documents[i].supervised_tokens for i in micro]
            found[micro] = torch.stack([part.sum() for part in log_p.split(counts)])
    return found


def _asked(
    model: CausalLM, rows: Sequence[PreferenceRow], micro_batch_size: int
) -> Iterator[tuple[PreferenceRow, tuple[float, ...]]]:
    """Each row with the summed log-probabilities of its documents' answers."""
    if not isinstance(rows[0], EncodedPair):
        documents = [document for row in rows for document in row.documents]
        log_p = iter(answer_log_probs(model, documents, micro_batch_size).tolist())
        yield from ((row, tuple(next(log_p) for _ in row.documents)) for row in rows)
        return
    with torch.no_grad(), as_evaluated(model):
        lengths = [len(row) for row in rows]
        for micro in split_micro_batches(range(len(rows)), lengths, micro_batch_size, model.packed):
            batch = compare([rows[i] for i in micro], model.packed, model.shares).to(model.device)
            chosen, rejected = batch.sums(as_double(-model.token_losses(batch))).view(-1, 2).T.tolist()
            yield from ((rows[i], sides) for i, sides in zip(micro, zip(chosen, rejected, strict=True), strict=True))


@dataclass
class References:
    """What a reference says of rows, in a file: log-probabilities under each row's digest.

    Args:
        path: of the file; it need not exist yet.
        model: which base, in which bits and type.
        begins_with: the adapter that is beside it; empty where that does nothing.
        known: digest -> summed log-probabilities of the row's documents.
    """

    path: Path
    model: str
    begins_with: str
    known: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, model: str, begins_with: str) -> "References":
        """What the file knows, if it is of this reference; else it is begun anew.

        Args:
            begins_with: ADAPTER alone where it is one whose run goes on, and only the file knows which.
        """
        found = cls.read(path)
        if found is None or found.model != model:
            return cls(path, model, begins_with)
        same = found.begins_with == begins_with or (begins_with == ADAPTER and found.begins_with.startswith(ADAPTER))
        return found if same else cls(path, model, begins_with)

    @classmethod
    def read(cls, path: Path) -> "References | None":
        """What a file holds, whatever reference it is of; None where there is none.

        Raises:
            RunError: it is damaged.
        """
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {digest: tuple(map(float, log_p)) for digest, log_p in found["rows"].items()}
            return cls(path, found["model"], found["begins_with"], known)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "Restore it; or remove it, and what training began with is asked again where that is the bare base."
            raise RunError(f"{path} is damaged: {error!r}.", "", fix) from error

    def missing(self, rows: Iterable[EncodedExample]) -> list[PreferenceRow]:
        """Those rows that it knows nothing of."""
        return [row for row in rows if isinstance(row, PreferenceRow) and _digest(row) not in self.known]

    def ask(
        self, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int, report: Listener = silent
    ) -> None:
        """Ask the model, as it is, about rows that are not known; what was found is saved every minute and at the end,
        so that a run which is stopped goes on where it was.

        Args:
            micro_batch_size: rows computed at once. Which rows are computed together does not depend on what is known.
        """
        saved = time.monotonic()
        try:
            for start in tracked(range(0, len(rows), ROWS_AT_ONCE), "reference", report):
                part = [row for row in rows[start : start + ROWS_AT_ONCE] if isinstance(row, PreferenceRow)]
                if self.missing(part):
                    self.known |= {_digest(row): log_p for row, log_p in _asked(model, part, micro_batch_size)}
                if time.monotonic() - saved >= SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.save()

    def save(self) -> None:
        """Write the file; a crash leaves the old one or the new."""
        write_complete(
            self.path, json.dumps({"model": self.model, "begins_with": self.begins_with, "rows": self.known})
        )

    @overload
    def attached(self, rows: EncodedRows) -> EncodedRows: ...
    @overload
    def attached(self, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]: ...
    def attached(self, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
        """The rows, with what is known of each."""

        def attach(number: int, row: EncodedExample) -> EncodedExample:
            assert isinstance(row, PreferenceRow), row
            return replace(row, reference=self.known.get(_digest(row), ()))

        return ChangedRows(counted(rows), attach)


def ask_reference(
    references: References,
    model: CausalLM,
    parts: Iterable[Sequence[EncodedExample]],
    *,
    micro_batch_size: int,
    resumed: bool,
    seconds_of: Callable[[int], float],
    report: Listener,
) -> None:
    """Ask the model that training begins with about the rows that the run will meet.

    Args:
        parts: of these rows, one after another.
        resumed: the run goes on, and `model` is its base, its adapters without effect.
        seconds_of: so many tokens, predicted.

    Raises:
        RunError: rows are not known, and the run began with an adapter that `model` no longer has.
    """
    for rows in parts:
        missing = [(row.origin, sum(map(len, row.documents)) - row.shared_tokens) for row in references.missing(rows)]
        if not missing:
            continue
        if resumed and references.begins_with:
            raise RunError(
                f"{references.path} does not say what the reference makes of {len(missing)} rows, such as "
                f"{missing[0][0]}.",
                f"The reference of this run is what it began with ({references.begins_with}), and it has trained on "
                "since.",
                "Restore that file or the examples, or start a new run.",
            )
        tokens = sum(count for _, count in missing)
        seconds = f"{seconds_of(tokens):.0f} s predicted"
        report(Note(f"asking the reference about {len(missing)} rows once: {tokens} tokens forward, {seconds}"))
        references.ask(model, rows, micro_batch_size, report)


def known_references(path: Path, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
    """The rows with what a run's file says of them; without, where there is no file, or it does not know all."""
    references = References.read(path)
    return rows if references is None or references.missing(rows) else references.attached(rows)


def _digest(row: PreferenceRow) -> str:
    digest = hashlib.blake2b(row.content, digest_size=16)
    for document in row.documents[len(row.document_lengths) :]:  # what it is compared with beside its own
        digest.update(document.content)
    return digest.hexdigest()
