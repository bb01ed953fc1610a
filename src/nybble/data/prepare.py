"""From a data source to training and validation sequences, with the audit."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nybble.data import audit as checks
from nybble.data.audit import Audit, Finding
from nybble.data.examples import EncodedExample, Example
from nybble.data.mixture import Mixture
from nybble.data.new_tokens import ReadRows, find_new_tokens
from nybble.data.readers import FieldNames, ReadResult, read_examples
from nybble.data.sources import DataSource, refuse_weights
from nybble.data.split import split_validation
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import DataError
from nybble.options.groups import DataOptions, RowOptions

Encode = Callable[[ChatTemplate, Example], list[EncodedExample]]  # raises RowError


@dataclass(frozen=True)
class PreparedData:
    """Sequences of at most `max_seq_len` tokens, each with at least one supervised target, and their audit.

    Args:
        mixture: the weights of the data sets that the training sequences are of; None where they have none.
    """

    train: list[EncodedExample]
    validation: list[EncodedExample]
    audit: Audit
    mixture: Mixture | None = None

    def lengths(self) -> list[int]:
        """Tokens of every sequence before truncation, training sequences first."""
        return [len(row) + row.num_truncated for row in (*self.train, *self.validation)]


@dataclass(frozen=True)
class EncodedRow:
    """A row that is kept, its number among all rows read, and its sequences (one, unless the template rewrites
    history)."""

    number: int
    example: Example
    sequences: list[EncodedExample]


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
    encode: Encode = ChatTemplate.encode_example,
) -> PreparedData:
    """Read, encode, split and audit. Findings are in the audit, errors too; `audit.check()` raises them.

    Args:
        source: what `read_examples` takes.
        validation_source: as `source`: rows to validate on; by default they are split off the source's own.
        validation_fraction, validation_rows: see `split_validation`.
        vocab_size: rows of the model's embedding matrix, to check the ids against.
        embedding_rows: reads rows of it, to find tokens that were never trained.
        allow: ids of findings that need not stop training.
        encode: makes an example's sequences, untruncated; an objective's own, or the template's.

    Raises:
        ConfigError: there is no such finding to allow.
        DataError: the source cannot be read, or no row of it.
    """
    checks.check_allowed(allow)
    if validation_source:
        refuse_weights(_listed(validation_source), "held-out rows are all evaluated")
    own = read_examples(source, fields)
    extra = read_examples(validation_source, fields) if validation_source else ReadResult()
    reads, num_rows = (own, extra), own.num_rows + extra.num_rows
    rows, findings, dropped = _encode_rows([*own.examples, *extra.examples], template, max_seq_len, encode)
    dropped += Counter(error.finding for read in reads for error in read.odd)
    findings += [*checks.find_in_reading(reads), *checks.find_many_dropped(dropped, num_rows)]
    if validation_source:
        train = [row for row in rows if row.number < len(own.examples)]
        validation = [row for row in rows if row.number >= len(own.examples)]
    else:
        kept = [row.example for row in rows]
        numbers, held_out = split_validation(kept, validation_fraction, validation_rows, seed)
        train, validation = [rows[number] for number in numbers], [rows[number] for number in held_out]
    train_sequences, validation_sequences = _sequences(train), _sequences(validation)
    sequences = train_sequences + validation_sequences
    findings += _find_in_rows(train, validation, template, vocab_size)
    if vocab_size is not None and embedding_rows is not None:
        findings += find_new_tokens(sequences, template.tokenizer, template.chat_template, vocab_size, embedding_rows)
    lengths = [len(sequence) + sequence.num_truncated for sequence in sequences]
    parts = _parts(own.sources, train)
    mixture = _mixture(own.sources, [len(part) for part in parts])
    audit = Audit(
        source=", ".join(_listed(source)),
        validation_source=", ".join(_listed(validation_source)) if validation_source else None,
        layout=own.layout,
        max_seq_len=max_seq_len,
        num_rows=num_rows,
        num_dropped=num_rows - len(rows),
        num_truncated=sum(sequence.num_truncated > 0 for sequence in sequences),
        num_train=len(train_sequences),
        num_validation=len(validation_sequences),
        tokens=sum(map(len, train_sequences)),
        supervised_tokens=sum(sequence.supervised_tokens for sequence in train_sequences),
        validation_tokens=sum(map(len, validation_sequences)),
        validation_supervised_tokens=sum(sequence.supervised_tokens for sequence in validation_sequences),
        truncated_tokens=sum(sequence.num_truncated for sequence in sequences),
        longest=max(lengths, default=0),
        length_percentiles=checks.percentiles(lengths),
        notices=(*template.notices, *own.notices, *extra.notices),
        findings=tuple(sorted(findings, key=lambda finding: finding.level != "error")),
        allowed=tuple(allow),
        mixture=() if mixture is None else checks.audit_mixture(mixture, parts),
    )
    return PreparedData(train_sequences, validation_sequences, audit, mixture)


def _listed(sources: str | Sequence[str]) -> Sequence[str]:
    return [sources] if isinstance(sources, str) else sources


def _parts(sources: Sequence[tuple[DataSource, int]], train: Sequence[EncodedRow]) -> list[list[EncodedExample]]:
    """The training sequences of each source, in its order."""
    ends = list(accumulate(count for _, count in sources))
    parts: list[list[EncodedExample]] = [[] for _ in sources]
    for row in train:
        parts[bisect_right(ends, row.number)] += row.sequences
    return parts


def _mixture(sources: Sequence[tuple[DataSource, int]], rows: Sequence[int]) -> Mixture | None:
    """
    Raises:
        DataError: a source with a weight has no row to draw.
    """
    weights = [source.weight for source, _ in sources if source.weight is not None]
    if not weights or not any(rows):
        return None
    names = [source.given for source, _ in sources]
    if empty := next((name for name, count in zip(names, rows, strict=True) if not count), None):
        raise DataError(
            f"{empty}: a weight, and no row of it is left to train on",
            "needed: at least one row of each --data that has a weight",
            "look at it alone with nybble data check, or leave it out",
        )
    return Mixture.of(names, rows, weights)


def _encode_rows(
    examples: Sequence[Example], template: ChatTemplate, max_seq_len: int, encode: Encode
) -> tuple[list[EncodedRow], list[Finding], Counter[str]]:
    """The rows that can be trained on, what became of the others, and how many of them each finding took out."""
    rows: list[EncodedRow] = []
    refused: dict[str, list[RowError]] = defaultdict(list)
    concerned: dict[str, list[str]] = defaultdict(list)  # finding id: origins
    dropped: Counter[str] = Counter()  # finding id: rows that it takes out
    for number, example in enumerate(examples):
        try:
            _check_size(example)
            whole = encode(template, example)
        except RowError as error:
            refused[error.finding].append(error)
            dropped[error.finding] += 1
            continue
        supervised = [sequence for sequence in whole if sequence.supervised_tokens]
        kept = [cut for sequence in supervised if (cut := sequence.truncate(max_seq_len)).supervised_tokens]
        for finding, concerns in (
            ("template-rewrites-history", len(whole) > 1),
            ("no-supervised-tokens", len(supervised) < len(whole) or not whole),
            ("too-long", len(kept) < len(supervised)),
            ("truncated", any(sequence.num_truncated for sequence in kept)),
        ):
            if concerns:
                concerned[finding].append(example.origin)
        if kept:
            rows.append(EncodedRow(number, example, kept))
        else:
            dropped["too-long" if supervised else "no-supervised-tokens"] += 1
    findings = [f for id, origins in concerned.items() for f in checks.find(id, origins)]
    for id, errors in refused.items():
        findings += checks.find(id, (error.origin for error in errors), errors[0].detail)
    return rows, findings, dropped


def _check_size(example: Example) -> None:
    if (size := len(example.full_text())) > checks.MAX_ROW_CHARACTERS:
        raise RowError("huge-row", example.origin, f"{size:,} characters")


def _find_in_rows(
    train: list[EncodedRow], validation: list[EncodedRow], template: ChatTemplate, vocab_size: int | None
) -> list[Finding]:
    """What is wrong with the rows that are kept."""
    train_examples, validation_examples = [row.example for row in train], [row.example for row in validation]
    sequences = _sequences([*train, *validation])
    findings = checks.find_without_end_of_turn(sequences, template.stop_ids)
    if vocab_size is not None:
        findings += checks.find_ids_beyond(sequences, vocab_size)
    findings += checks.find_special_tokens(train_examples + validation_examples, template.encoder.special_tokens)
    findings += checks.find_unread_keys(train_examples + validation_examples)
    findings += checks.find_marked_prompts(train_examples + validation_examples)
    if template.folds_system:
        findings += checks.find_folded_system(train_examples + validation_examples)
    findings += checks.find_duplicates(train_examples)
    findings += checks.find_leaks(train_examples, validation_examples)
    findings += checks.find_near_leaks(train_examples, validation_examples)
    findings += checks.find_same_answer(train_examples)
    if not train:
        findings.append(Finding("no-rows", 0, ()))
    if not validation:
        findings.append(Finding("no-validation", 0, ()))
    return findings


def _sequences(rows: Sequence[EncodedRow]) -> list[EncodedExample]:
    return [sequence for row in rows for sequence in row.sequences]


def prepare_data(
    options: DataOptions,
    template: ChatTemplate,
    vocab_size: int,
    embedding_rows: ReadRows | None = None,
    encode: Encode = ChatTemplate.encode_example,
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
        encode=encode,
    )


def field_names(options: RowOptions) -> FieldNames:
    """The user's own column names."""
    return FieldNames(options.prompt_field, options.completion_field, options.messages_field, options.text_field)
