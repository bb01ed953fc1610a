"""What becomes of each row when it is encoded; where rows are many that is kept in the run's folder, so that encoding
which is stopped goes on where it was.

It is found again by what the row says and where it stands, and only where the same tokenizer, template and options
would encode it: what is read from the disk is what encoding would give.
"""

import hashlib
import importlib.metadata
import io
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import nybble.data.examples as examples_module
from nybble.data.examples import EncodedExample, Example
from nybble.data.findings import MAX_ROW_CHARACTERS
from nybble.data.row_records import RowRecords, described
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import RunError
from nybble.events import MANY, Listener, Note, tracked_rows

PACKAGES = ("nybble", "transformers", "tokenizers", "jinja2")  # whose versions decide what a row becomes


class Encoded(NamedTuple):
    """What becomes of a row.

    Args:
        kept: its sequences, of at most `max_seq_len` tokens.
        concerned: findings of the audit that name it.
        lost: the finding that takes it out; "" where something of it is kept.
        refused: what is wrong with it, where it cannot be encoded at all.
    """

    kept: tuple[EncodedExample, ...] = ()
    concerned: tuple[str, ...] = ()
    lost: str = ""
    refused: RowError | None = None


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows.

    Args:
        encode: the sequences of an example, untruncated; raises RowError where it cannot be trained on.
        several: finding of rows of which there are several sequences; "" where that is how it should be.
    """

    template: ChatTemplate
    encode: Callable[[ChatTemplate, Example], list[EncodedExample]]
    several: str
    max_seq_len: int

    def __call__(self, example: Example) -> Encoded:
        try:
            _check_size(example)
            whole = self.encode(self.template, example)
        except RowError as error:
            return Encoded(lost=error.finding, refused=error)
        supervised = [sequence for sequence in whole if sequence.supervised_tokens]
        cuts = (sequence.truncate(self.max_seq_len) for sequence in supervised)
        kept = tuple(cut for cut in cuts if cut.supervised_tokens)
        concerns = {
            self.several: len(whole) > 1 and bool(self.several),
            "no-supervised-tokens": len(supervised) < len(whole) or not whole,
            "too-long": len(kept) < len(supervised),
            "truncated": any(sequence.num_truncated for sequence in kept),
        }
        lost = "" if kept else "too-long" if supervised else "no-supervised-tokens"
        return Encoded(kept, tuple(finding for finding, holds in concerns.items() if holds), lost)

    def encode_all(
        self, examples: Sequence[Example], folder: Path | None, report: Listener
    ) -> Iterator[tuple[Example, Encoded]]:
        """Each, and what becomes of it.

        Args:
            folder: that keeps it, where rows are many; nothing does where it is None.
            report: told how far that has come, and what was known before.
        """
        tokenizer = tokenizer_text(self.template.tokenizer) if len(examples) >= MANY else None
        if folder is None or tokenizer is None or self.template.reader is not None:  # pictures' files may change
            return ((example, self(example)) for example in tracked_rows(examples, "encoding rows", report))
        about, before = self._about(tokenizer), described(folder)
        records = RowRecords[Example](folder, about, _content)
        if before is not None and before != about:
            changed = ", ".join(name for name, value in about.items() if before.get(name) != value)
            report(Note(f"rows are encoded anew: since they were, others are: {changed}"))
        elif len(records) and (unknown := len(records.unknown(examples))):
            known = len(examples) - unknown
            report(Note(f"{known} of {len(examples)} rows were encoded before; the others are new, or were changed"))
        records.ask(examples, self._answers, "encoding rows", report)
        return ((example, _decoded(records.read(example))) for example in examples)

    def _answers(self, examples: Sequence[Example]) -> Iterator[tuple[Example, bytes]]:
        for example in examples:
            yield example, zlib.compress(pickle.dumps(tuple(self(example)), protocol=5), 1)

    def _about(self, tokenizer: str) -> dict[str, Any]:
        """What decides how rows are encoded beside what they say.

        Args:
            tokenizer: all of it.
        """
        template = self.template
        said = template.chat_template or ""
        return {
            "the objective": f"{self.encode.__module__}.{self.encode.__qualname__} {self.several}",
            "--max-seq-len": self.max_seq_len,
            "what is learnt of them": list(template.learnt),
            "the chat template": _digest(f"{template.mode} {said}"),
            "the day": time.strftime("%Y-%m-%d") if "strftime_now" in said else "",
            "the tokenizer": _digest(tokenizer),
            "versions of packages": " ".join(map(importlib.metadata.version, PACKAGES)),
        }


def tokenizer_text(tokenizer: Any) -> str | None:
    """All that decides which tokens a text becomes; None where a tokenizer does not tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else f"{backend.to_str()} {tokenizer.special_tokens_map}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _check_size(example: Example) -> None:
    if (size := len(example.full_text())) > MAX_ROW_CHARACTERS:
        raise RowError("huge-row", example.origin, f"{size:,} characters")


def _content(example: Example) -> bytes:
    """All that a row says, and where it stands."""
    said = [getattr(example, field.name) for field in fields(example)]
    return f"{type(example).__name__} {said!r}".encode(errors="surrogatepass")


class _Reader(pickle.Unpickler):
    """Of sequences and what is wrong with rows; a file in a run's folder may be anyone's, and makes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: list[Any] = [examples_module._unpickled, RowError, *_kinds_of(EncodedExample)]
        found = next((each for each in allowed if (each.__module__, each.__qualname__) == (module, name)), None)
        if found is None:
            raise RunError(
                f"Rows that were encoded before hold {module}.{name}, which no row is made of.",
                "",
                "Remove the folder's rows.partial, or the run's rows: they are encoded again.",
            )
        return found


def _kinds_of(kind: type[EncodedExample]) -> list[type[EncodedExample]]:
    return [kind, *(each for own in kind.__subclasses__() for each in _kinds_of(own))]


def _decoded(content: bytes | None) -> Encoded:
    assert content is not None, "a row that was asked about has no record"
    return Encoded(*_Reader(io.BytesIO(zlib.decompress(content))).load())
