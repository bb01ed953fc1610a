"""The reference of DPO, IPO and KTO: the model that training begins with, asked without a second one in memory.

In the same step: the base, its adapters switched off (`adapters_off`), on the very batch. Or once before the first step
(`ask_reference`): its log-probabilities of all rows that the run will meet, kept in the run folder
(`data/row_records.py`). That is the default: it is one forward pass a row, where the same step takes one each time
that the row is met or evaluated; and the reference may be another than the bare base, where training begins with an
adapter or with `--init`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.data import packing
from nybble.data.encoded_rows import ChangedRows, EncodedRows, counted
from nybble.data.examples import EncodedExample
from nybble.data.preference_rows import EncodedPair, PreferenceBatch, PreferenceRow, compare
from nybble.data.row_records import RowRecords, described
from nybble.data.sampler import split_micro_batches
from nybble.errors import RunError
from nybble.events import Listener, Note, silent
from nybble.kernels.hardware import as_double
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, enable_adapters

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


class References:
    """What a reference says of rows: the summed log-probability of each of a row's documents.

    Args:
        records: of it, on the disk. What they are about is the `model` (which base, in which bits and type) and what it
            `begins_with` (the adapter that is beside it; empty where that does nothing).
    """

    def __init__(self, records: RowRecords):
        self.records = records

    @classmethod
    def open(cls, folder: Path, model: str, begins_with: str) -> "References":
        """What the folder knows, if it is of this reference; else it is begun anew.

        Args:
            begins_with: ADAPTER alone where it is one whose run goes on, and only the folder knows which.
        """
        about, before = {"model": model, "begins_with": begins_with}, described(folder)
        if begins_with == ADAPTER and before is not None and str(before.get("begins_with")).startswith(ADAPTER):
            about["begins_with"] = before["begins_with"]
        return cls(RowRecords(folder, about, _content))

    @property
    def begins_with(self) -> str:
        """The adapter beside the base."""
        return str(self.records.about["begins_with"])

    def ask(
        self, model: CausalLM, rows: Sequence[EncodedExample], micro_batch_size: int, report: Listener = silent
    ) -> None:
        """Ask the model, as it is, about rows that are not known.

        Args:
            micro_batch_size: rows computed at once.
        """

        def answers(part: Sequence[EncodedExample]) -> Iterator[tuple[EncodedExample, bytes]]:
            for row, log_p in _asked(model, [row for row in part if isinstance(row, PreferenceRow)], micro_batch_size):
                yield row, np.array(log_p, dtype=np.float64).tobytes()

        self.records.ask(rows, answers, "reference", report)

    def attached(self, rows: Sequence[EncodedExample]) -> EncodedRows:
        """The rows, with what is known of each."""

        def attach(number: int, row: EncodedExample) -> EncodedExample:
            assert isinstance(row, PreferenceRow), row
            content = self.records.read(row) or b""
            return replace(row, reference=tuple(np.frombuffer(content, dtype=np.float64).tolist()))

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
        unknown = references.records.unknown(rows)
        if not len(unknown):
            continue
        if resumed and references.begins_with:
            raise RunError(
                f"{references.records.folder} does not say what the reference makes of {len(unknown)} rows, such as "
                f"{rows[int(unknown[0])].origin}.",
                f"The reference of this run is what it began with ({references.begins_with}), and it has trained on "
                "since.",
                "Restore that folder or the examples, or start a new run.",
            )
        tokens = sum(_tokens_of(rows[number]) for number in unknown.tolist())
        seconds = f"{seconds_of(tokens):.0f} s predicted"
        report(Note(f"asking the reference about {len(unknown)} rows once: {tokens} tokens forward, {seconds}"))
        references.ask(model, rows, micro_batch_size, report)


def known_references(folder: Path, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
    """The rows with what a run's folder says of them; without, where there is none, or it does not know all."""
    about = described(folder)
    if about is None:
        return rows
    references = References(RowRecords(folder, about, _content))
    return rows if len(references.records.unknown(rows)) else references.attached(rows)


def _tokens_of(row: EncodedExample) -> int:
    """That go through the model for it."""
    assert isinstance(row, PreferenceRow), row
    return sum(map(len, row.documents)) - row.shared_tokens


def _content(row: EncodedExample) -> bytes:
    """All that is asked of a row: what it is compared with beside its own documents too."""
    assert isinstance(row, PreferenceRow), row
    return b"".join([row.content, *(document.content for document in row.documents[len(row.document_lengths) :])])
