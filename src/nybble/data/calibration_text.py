"""What calibrated weights are calibrated on: the user's own text in windows, and a slice of general text.

Calibrating on a narrow data set alone makes the weights good for that and worse for all else (docs/lab-notes.md has the
figures), so half of the windows are general text that every machine has: the topics of Python's own help, prose and
code (`pydoc_data.topics`, the language reference).
"""

import importlib.util
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.field_names import FieldNames
from nybble.data.readers import read_examples
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.errors import DataError

WINDOW = 512  # tokens
GENERAL_SHARE = 0.5  # measured: docs/lab-notes.md
TEXT_SUFFIXES = (".txt", ".md")
NAMED = 3
MIN_OVERLAP = 40  # characters of an answer that make its appearance in a text no accident


@dataclass(frozen=True)
class CalibrationText:
    """Args:
    windows: int64 `(windows, tokens)`.
    description: for the user: where they come from.
    """

    windows: Tensor
    description: str


def calibration_text(
    own: Sequence[Tensor],
    name: str,
    template: ChatTemplate,
    *,
    num_tokens: int,
    context: int | None = None,
    seed: int = 0,
    general_share: float = GENERAL_SHARE,
) -> CalibrationText:
    """Windows from the user's text, shuffled by documents, and from general text.

    Args:
        own: token ids of the user's documents; none for general text alone.
        name: of the user's text, for messages.
        num_tokens: at most so many, in whole windows; less where the user's text is shorter.
        context: tokens that the model was made for.

    Raises:
        DataError: the user's text is shorter than one window, or this Python has no general text.
    """
    window = min(WINDOW, context or WINDOW)
    total = max(1, num_tokens // window)
    num_general = round(total * general_share) if own else total
    windows = []
    found = 0
    if own:
        wanted = max(1, total - num_general)
        tokens = torch.cat(list(_enough(own, seed, wanted * window))).long()
        found = min(len(tokens) // window, wanted)
        if found == 0:
            raise DataError(
                f"{name}: {len(tokens)} tokens in it",
                f"needed: at least one window of {window} tokens to calibrate on",
                "use a longer text, or --quality search",
            )
        windows.append(tokens[: found * window].view(found, window))
    if num_general:
        general = torch.tensor(template.encoder.encode(general_text(seed, num_general * window)), dtype=torch.int64)
        num_general = min(num_general, len(general) // window)
        windows.append(general[: num_general * window].view(num_general, window))
    parts = [f"{found} from {name}"] * bool(own) + [f"{num_general} of general text"] * bool(num_general)
    return CalibrationText(torch.cat(windows), f"{found + num_general} windows of {window} tokens: {', '.join(parts)}")


def _enough(documents: Sequence[Tensor], seed: int, num_tokens: int) -> Iterator[Tensor]:
    """Documents in a seeded order, no more than give so many tokens where there are so many."""
    for number in _shuffled(len(documents), seed):
        yield documents[number]
        num_tokens -= len(documents[number])
        if num_tokens <= 0:
            return


def _shuffled(count: int, seed: int) -> "array[int]":
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    return order


def general_text(seed: int, num_tokens: int) -> str:
    """Topics of Python's help in a seeded order, some ten characters for each token that is wanted.

    Raises:
        DataError: this Python came without them.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        raise DataError(
            "This Python has no pydoc_data, from which the general calibration text comes.",
            "needed: Python's whole standard library",
            "install it, or use --quality search",
        )
    from pydoc_data.topics import topics

    texts = list(topics.values())
    random.Random(seed).shuffle(texts)
    return "\n\n".join(texts)[: 10 * num_tokens]


def read_calibration_file(
    source: str,
    template: ChatTemplate,
    fields: FieldNames | None = None,
    validation: Sequence[EncodedExample] = (),
    num_tokens: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """The documents of --calibrate as token ids: a text file, or examples rendered as training would.

    Args:
        source: a .txt or .md file in UTF-8, or what `read_examples` takes.
        validation: rows that must not be in it.
        num_tokens: of examples, in an order drawn by `seed`, no more are rendered than give so many; all where None.

    Raises:
        DataError: the source is missing, empty or unreadable, or holds validation rows; the message names them.
    """
    if Path(source).suffix in TEXT_SUFFIXES:
        text = _read_text(Path(source))
        _check_text(source, text, template, validation)
        return [torch.tensor(template.encoder.encode(text), dtype=torch.int32)]
    encoded: list[EncodedExample] = []
    found = 0
    read = read_examples(source, fields)
    read.check_whole()
    for number in _shuffled(len(read.examples), seed):
        if num_tokens is not None and not validation and found >= num_tokens:
            break  # rendering takes longer than anything else here; with validation rows all must be compared
        try:
            rows = template.encode_example(read.examples[number])
        except RowError:  # training would drop the row too
            continue
        if any(row.picture_values for row in rows):
            raise DataError(f"{rows[0].origin}: a row with pictures", "needed: text to calibrate on")
        encoded += rows
        found += sum(map(len, rows))
    if not encoded:
        raise DataError(f"{source}: no row of it can be rendered", "needed: at least one row to calibrate on")
    _check_rows(source, encoded, validation)
    return [row.input_ids for row in encoded]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", "needed: a text file that can be read", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8, {error.reason}", "needed: text in UTF-8", "convert the file") from error
    if not text.strip():
        raise DataError(f"{path}: no text in it", "needed: text to calibrate on")
    return text


def _check_rows(source: str, rows: Sequence[EncodedExample], validation: Sequence[EncodedExample]) -> None:
    held_out = {tuple(row.input_ids.tolist()): row.origin for row in validation}
    lengths = {len(ids) for ids in held_out}  # validation rows may have been cut
    shared = [row.origin for row in rows if any(tuple(row.input_ids[:n].tolist()) in held_out for n in lengths)]
    if shared:
        raise _overlap(source, shared)


def _check_text(source: str, text: str, template: ChatTemplate, validation: Sequence[EncodedExample]) -> None:
    squeezed = " ".join(text.split())
    shared = []
    for row in validation:
        answer = " ".join(template.tokenizer.decode(row.answer_ids, skip_special_tokens=True).split())
        if len(answer) >= MIN_OVERLAP and answer in squeezed:
            shared.append(row.origin)
    if shared:
        raise _overlap(source, shared)


def _overlap(source: str, origins: Sequence[str]) -> DataError:
    named = ", ".join(origins[:NAMED]) + (f" and {len(origins) - NAMED} more" if len(origins) > NAMED else "")
    return DataError(
        f"{source}: holds {len(origins)} of the validation rows: {named}",
        "needed: calibration text without validation rows, else the held-out loss is flattered",
        "remove them, or leave --calibrate out to calibrate on the training rows",
    )
