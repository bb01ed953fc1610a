"""From a data source to training and validation sequences, with the audit."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from nybble.data import audit as checks
from nybble.data import comparisons
from nybble.data.audit import Audit
from nybble.data.conversation_findings import find_in_conversations, say_what_is_learnt
from nybble.data.encoded_rows import EncodedRows, SequenceFile, counted
from nybble.data.examples import EncodedExample, Example
from nybble.data.field_names import FieldNames, field_names
from nybble.data.findings import Finding, check_allowed, find
from nybble.data.mixture import Mixture, audit_mixture
from nybble.data.new_tokens import ReadRows, find_new_tokens
from nybble.data.picture_reader import find_in_conversation_pictures, have_pictures
from nybble.data.readers import EXAMPLES, ReadResult, RowForms, read_examples
from nybble.data.row_encoding import Encoded, RowEncoder
from nybble.data.sources import DataSource, refuse_weights
from nybble.data.split import content_ranks, split_validation
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import DataError
from nybble.events import Listener, silent
from nybble.files.spool import Chosen, Spool
from nybble.options.groups import DataOptions

# What is wrong with a picture of a conversation.
PICTURES_OF_TURNS = {"missing-picture", "broken-picture", "huge-picture", "picture-url", "picture-marks"}


@dataclass(frozen=True)
class RowKind:
    """What rows an objective learns from.

    Args:
        forms: how they are read.
        encode: the sequences of an example, untruncated; raises RowError where it cannot be trained on.
        several: finding of rows of which there are several sequences; none where that is how it should be.
        find: what is wrong with all sequences together: those to train on, and those to validate on.
        describe: sentences about them that a user should see.
        documents: of a row, to the model.
        conversations: rows are written down by the chat template, and answers end in its end of turn.
    """

    forms: RowForms
    encode: Callable[[ChatTemplate, Example], list[EncodedExample]]
    several: str = "template-rewrites-history"
    find: Callable[[Sequence[EncodedExample], Sequence[EncodedExample]], list[Finding]] = lambda rows, held_out: []
    describe: Callable[[Sequence[EncodedExample], Sequence[EncodedExample]], list[str]] = lambda rows, held_out: []
    documents: int = 1
    conversations: bool = True


def _find_in_examples(rows: Sequence[EncodedExample], held_out: Sequence[EncodedExample]) -> list[Finding]:
    both = [part for part in map(counted, (rows, held_out)) if have_pictures(part)]
    return find_in_conversation_pictures(chain.from_iterable(both))


EXAMPLE_ROWS = RowKind(  # what the template marks as the assistant's is learnt
    EXAMPLES, ChatTemplate.encode_example, find=_find_in_examples
)


@dataclass(frozen=True)
class PreparedData:
    """Sequences of at most `max_seq_len` tokens, each with at least one supervised target, and their audit.

    Args:
        mixture: the weights of the data sets that the training sequences are of; None where they have none.
    """

    train: EncodedRows
    validation: EncodedRows
    audit: Audit
    mixture: Mixture | None

    def changed(self, change: Callable[[EncodedRows], EncodedRows]) -> "PreparedData":
        """With other sequences of the same tokens in place of these, in each part."""
        return replace(self, train=change(self.train), validation=change(self.validation))

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence before truncation, training sequences first."""
        rows = self.train + self.validation
        return rows.lengths + rows.num_truncated


@dataclass(frozen=True)
class KeptRows:
    """Rows that are kept, of all that were encoded.

    Args:
        numbers: int64, of each its number among all rows read.
        firsts: int64 `(len(numbers), 2)`: of each the numbers of its first sequence, and of the first behind it (one
            further, unless the template rewrites history).
    """

    examples: Sequence[Example]
    sequences: SequenceFile
    numbers: np.ndarray
    firsts: np.ndarray

    def chosen(self, places: np.ndarray) -> "KeptRows":
        """Some of them, by their places among these."""
        return replace(self, numbers=self.numbers[places], firsts=self.firsts[places])

    def as_examples(self) -> Chosen[Example]:
        """As their owner wrote them."""
        return Chosen(self.examples, self.numbers)

    def encoded(self) -> EncodedRows:
        """Their sequences."""
        counts = self.firsts[:, 1] - self.firsts[:, 0]  # a row's sequences lie side by side
        before = np.cumsum(counts) - counts
        return self.sequences.rows(np.arange(counts.sum()) + np.repeat(self.firsts[:, 0] - before, counts))


def prepare(
    source: str | Sequence[str],
    template: ChatTemplate,
    *,
    max_seq_len: int,
    fields: FieldNames | None = None,
    validation_source: str | Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    validation_rows: int = 512,
    seed: int = 0,
    vocab_size: int | None = None,
    embedding_rows: ReadRows | None = None,
    allow: Sequence[str] = (),
    kind: RowKind = EXAMPLE_ROWS,
    scratch: Path | None = None,
    encoded: Path | None = None,
    report: Listener = silent,
) -> PreparedData:
    """Read, encode, split and audit. Findings are in the audit, errors too; `audit.check()` raises them.

    Args:
        source: what `read_examples` takes.
        validation_source: as `source`: rows to validate on; by default they are split off the source's own.
        validation_fraction, validation_rows: see `split_validation`.
        vocab_size: rows of the model's embedding matrix, to check the ids against.
        embedding_rows: reads rows of it, to find tokens that were never trained.
        allow: ids of findings that need not stop training.
        kind: of rows, an objective's own or examples to follow.
        scratch: as of `read_examples`.
        encoded: folder that keeps rows as they are encoded, where they are many, for a run that is begun again.
        report: told how far reading and encoding have come, where rows are many.

    Raises:
        ConfigError: there is no such finding to allow.
        DataError: the source cannot be read, or no row of it.
    """
    check_allowed(allow)
    if validation_source:
        refuse_weights(_listed(validation_source), "held-out rows are all evaluated")
    own = read_examples(source, fields, scratch, kind.forms, report)
    extra = ReadResult()
    if validation_source:
        extra = read_examples(validation_source, fields, scratch, kind.forms, report)
    reads, num_rows = (own, extra), own.num_rows + extra.num_rows
    if kind.conversations and template.reader is None:
        for read in reads:
            read.odd = _pictures_unread(read.odd, scratch)
    examples = own.examples
    examples.extend(extra.examples)
    num_own = len(own.examples) - len(extra.examples)
    file = SequenceFile(Spool(scratch))
    encoder = RowEncoder(template, kind.encode, kind.several, max_seq_len)
    rows, findings, dropped = _sort_out(examples, encoder.encode_all(examples, encoded, report), file)
    dropped += Counter(error.finding for read in reads for error in read.odd)
    findings += [*checks.find_in_reading(reads), *checks.find_many_dropped(dropped, num_rows)]
    ranks = content_ranks(rows.as_examples(), seed)
    if validation_source:
        places, held_out = np.flatnonzero(rows.numbers < num_own), np.flatnonzero(rows.numbers >= num_own)
    else:
        places, held_out = split_validation(ranks, validation_fraction, validation_rows)
    train, validation = rows.chosen(places), rows.chosen(held_out)
    train_sequences, validation_sequences = train.encoded(), validation.encoded()
    sequences = train_sequences + validation_sequences
    findings += _find_in_rows(rows.chosen(np.concatenate((places, held_out))), template, vocab_size, kind)
    findings += _find_between(train, validation, ranks[places], ranks[held_out], report)
    findings += kind.find(train_sequences, validation_sequences)
    if vocab_size is not None and embedding_rows is not None:
        findings += find_new_tokens(sequences, template.tokenizer, template.chat_template, vocab_size, embedding_rows)
    lengths = sequences.lengths + sequences.num_truncated
    mixture = _mixture(own.sources, train)
    audit = Audit(
        source=", ".join(_listed(source)),
        validation_source=", ".join(_listed(validation_source)) if validation_source else None,
        layout=own.layout,
        max_seq_len=max_seq_len,
        num_rows=num_rows,
        num_dropped=num_rows - len(rows.numbers),
        num_truncated=int((sequences.num_truncated > 0).sum()),
        num_train=len(train_sequences),
        num_validation=len(validation_sequences),
        tokens=int(train_sequences.lengths.sum()),
        supervised_tokens=int(train_sequences.supervised_tokens.sum()),
        validation_tokens=int(validation_sequences.lengths.sum()),
        validation_supervised_tokens=int(validation_sequences.supervised_tokens.sum()),
        truncated_tokens=int(sequences.num_truncated.sum()),
        longest=int(lengths.max(initial=0)),
        length_percentiles=checks.percentiles(lengths),
        notices=(
            *template.notices,
            *own.notices,
            *extra.notices,
            *(say_what_is_learnt(rows.as_examples(), template.learnt) if kind.conversations else ()),
            *kind.describe(train_sequences, validation_sequences),
        ),
        findings=tuple(sorted(findings, key=lambda finding: finding.level != "error")),
        allowed=tuple(allow),
        mixture=() if mixture is None else audit_mixture(mixture, train_sequences),
    )
    return PreparedData(train_sequences, validation_sequences, audit, mixture)


def _listed(sources: str | Sequence[str]) -> Sequence[str]:
    return [sources] if isinstance(sources, str) else sources


def _mixture(sources: Sequence[tuple[DataSource, int]], train: KeptRows) -> Mixture | None:
    """The weights of the sources, where they have some.

    Raises:
        DataError: a source with a weight has no row to draw.
    """
    weights = [source.weight for source, _ in sources if source.weight is not None]
    if not weights or not len(train.numbers):
        return None
    ends = np.cumsum([count for _, count in sources])
    sequences = np.repeat(train.numbers, train.firsts[:, 1] - train.firsts[:, 0])
    rows = np.bincount(np.searchsorted(ends, sequences, side="right"), minlength=len(sources)).tolist()
    names = [source.given for source, _ in sources]
    if empty := next((name for name, count in zip(names, rows, strict=True) if not count), None):
        raise DataError(
            f"{empty}: a weight, and no row of it is left to train on",
            "needed: at least one row of each --data that has a weight",
            "look at it alone with nybble data check, or leave it out",
        )
    return Mixture.of(names, rows, weights)


def _pictures_unread(odd: Spool[RowError], scratch: Path | None) -> Spool[RowError]:
    """What is wrong with rows, of which a model that reads text alone needs no other picture."""
    told: Spool[RowError] = Spool(scratch)
    for error in odd:
        finding = "pictures-unread" if error.finding in PICTURES_OF_TURNS else error.finding
        told.append(RowError(finding, error.origin, error.detail))
    return told


def _sort_out(
    examples: Sequence[Example], outcomes: Iterable[tuple[Example, Encoded]], sequences: SequenceFile
) -> tuple[KeptRows, list[Finding], Counter[str]]:
    """The rows that can be trained on, what became of the others, and how many of them each finding took out."""
    numbers, firsts = array("q"), array("q")
    refused: dict[str, Spool[RowError]] = defaultdict(Spool)
    concerned: dict[str, Spool[str]] = defaultdict(Spool)  # finding id: origins
    dropped: Counter[str] = Counter()  # finding id: rows that it takes out
    for number, (example, encoded) in enumerate(outcomes):
        for finding in encoded.concerned:
            concerned[finding].append(example.origin)
        if encoded.refused is not None:
            refused[encoded.lost].append(encoded.refused)
        if encoded.lost:
            dropped[encoded.lost] += 1
            continue
        first = len(sequences)
        sequences.extend(encoded.kept)
        numbers.append(number)
        firsts.extend((first, len(sequences)))
    findings = [f for id, origins in concerned.items() for f in find(id, origins)]
    for id, errors in refused.items():
        findings += find(id, (error.origin for error in errors), errors[0].detail)
    rows = KeptRows(examples, sequences, np.array(numbers, dtype=np.int64), np.array(firsts, np.int64).reshape(-1, 2))
    return rows, findings, dropped


def _find_in_rows(rows: KeptRows, template: ChatTemplate, vocab_size: int | None, kind: RowKind) -> list[Finding]:
    """What is wrong with the rows that are kept, training rows first."""
    examples, sequences = rows.as_examples(), rows.encoded()
    findings = checks.find_without_end_of_turn(sequences, template.stop_ids) if kind.conversations else []
    if vocab_size is not None:
        findings += checks.find_ids_beyond(sequences, vocab_size)
    if not kind.conversations:
        return findings
    findings += checks.find_special_tokens(examples, template.encoder.special_tokens)
    findings += find_in_conversations(examples, template)
    return findings


def _find_between(
    train: KeptRows,
    validation: KeptRows,
    train_ranks: np.ndarray,
    validation_ranks: np.ndarray,
    report: Listener,
) -> list[Finding]:
    """What rows have in common that they should not."""
    train_examples, validation_examples = train.as_examples(), validation.as_examples()
    findings = comparisons.find_duplicates(train_examples, train_ranks)
    findings += comparisons.find_leaks(validation_examples, train_ranks, validation_ranks)
    findings += comparisons.find_near_leaks(train_examples, validation_examples, train_ranks, validation_ranks, report)
    findings += comparisons.find_same_answer(train_examples)
    if not len(train.numbers):
        findings.append(Finding("no-rows", 0, ()))
    if not len(validation.numbers):
        findings.append(Finding("no-validation", 0, ()))
    return findings


def prepare_data(
    options: DataOptions,
    template: ChatTemplate,
    vocab_size: int | None,
    embedding_rows: ReadRows | None = None,
    kind: RowKind = EXAMPLE_ROWS,
    scratch: Path | None = None,
    encoded: Path | None = None,
    report: Listener = silent,
) -> PreparedData:
    """Read, encode, split and audit the examples that the options name, as `prepare` does."""
    return prepare(
        options.data,
        template,
        max_seq_len=options.max_seq_len,
        seed=options.seed,
        fields=field_names(options),
        validation_source=options.validation_data,
        validation_fraction=options.validation_fraction,
        validation_rows=options.validation_rows,
        vocab_size=vocab_size,
        embedding_rows=embedding_rows,
        allow=options.allow,
        kind=kind,
        scratch=scratch,
        encoded=encoded,
        report=report,
    )
