"""Rows that compare answers, as their owners write them: which columns say what, and what is wrong with a row.

A pair is a prompt with a chosen and a rejected answer:
    prompt, chosen, rejected                each text, a list of turns, or one turn (also: question, instruction, ..)
    chosen, rejected                        whole conversations; their common beginning is the prompt (HH's transcripts
                                            too, and UltraFeedback's, whose prompt stands beside them once more)
    input, preferred_output, non_preferred_output               as OpenAI's fine-tuning takes them
A judgement is a prompt with one answer and whether it is good:
    prompt, completion, label               (also: kto_tag, and all the pairs of columns that are examples to follow)
    messages, label                         the last turn is what is judged
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.cells import describe, says_nothing, text_of
from nybble.data.examples import EncodedExample, Example, Message
from nybble.data.field_names import FieldNames
from nybble.data.file_kinds import Row
from nybble.data.findings import Finding
from nybble.data.preference_rows import EncodedPair, JudgedAnswer
from nybble.data.prepare import RowKind
from nybble.data.readers import (
    COLUMNS_NAMED,
    PAIRS,
    SUBJECT_COLUMNS,
    SYSTEM_COLUMNS,
    Layout,
    RowForms,
    read_system,
)
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import RowError
from nybble.data.tool_formats import TOOL_COLUMNS
from nybble.data.turns import read_turns
from nybble.errors import DataError

ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)
PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversations", "messages")
LABELS = ("label", "kto_tag")
PAIR_FORMS = "prompt/chosen/rejected; chosen/rejected as conversations; input/preferred_output/non_preferred_output"
JUDGED_FORMS = f"prompt/completion/label; messages/label; {PAIR_FORMS}"
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")  # of HH, Bai et al. 2022 (arXiv 2204.05862)
Roles = Mapping[str, str]  # the user's own name of a role -> the known one
GOOD, BAD = frozenset(("true", "1")), frozenset(("false", "0"))


@dataclass(frozen=True)
class PairExample(Example):
    """The conversation that ends in the chosen answer, and beside it the one that ends in the rejected.

    Args:
        margin: how far apart their rewards are to be; reward models alone are told.
    """

    rejected: Example | None = None
    margin: float = 0.0

    def sides(self) -> tuple[Example, Example]:
        """Both conversations, as examples to follow."""
        assert self.rejected is not None, self.origin
        chosen = Example(self.origin, self.messages, self.prompt, self.completion, tools=self.tools)
        return chosen, replace(self.rejected, tools=self.tools)

    def turns(self) -> tuple[Message, ...]:
        return tuple(turn for side in self.sides() for turn in side.turns())

    def full_text(self) -> str:
        return "\n".join(side.full_text() for side in self.sides())

    def last_answer(self) -> str | None:
        return self.sides()[0].last_answer()

    def _said(self) -> list[tuple[str, str]]:
        return [said for side in self.sides() for said in (*side._said(), ("", ""))]


@dataclass(frozen=True)
class JudgedExample(Example):
    """A conversation that ends in an answer, which is good or bad."""

    desirable: bool = True

    def _said(self) -> list[tuple[str, str]]:
        return [("label", str(self.desirable)), *super()._said()]


# ---- reading -------------------------------------------------------------------------------------


def find_pair_layout(row: Row, fields: FieldNames) -> Layout | None:
    """The layout of a row of pairs; None where it is none.

    Raises:
        ConfigError: a column is named that pairs do not have.
    """
    fields.refuse(("completion", "messages", "text", "label"), f"pairs of answers: {PAIR_FORMS}")
    named = fields.chosen or fields.rejected
    pairs = [(fields.chosen or "chosen", fields.rejected or "rejected")] if named else ANSWERS
    sides = next((columns for columns in pairs if all(column in row for column in columns)), None)
    if sides is None:
        return None
    prompt = fields.prompt or next((column for column in PROMPTS if column in row), None)
    subjects = SUBJECT_COLUMNS if prompt == "instruction" else ()

    def build(row: Row, origin: str) -> PairExample:
        return _read_pair(row, origin, prompt, sides, subjects, dict(fields.roles))

    columns = (*((prompt,) if prompt else ()), *sides)
    return Layout("pair", "/".join(columns), columns, (*SYSTEM_COLUMNS, *subjects, *TOOL_COLUMNS), build)


def find_judged_layout(row: Row, fields: FieldNames) -> Layout | None:
    """The layout of a row of judged answers, or of pairs, each of which is one good answer and one bad.

    Raises:
        ConfigError: a column is named that neither has, or columns of both are.
    """
    fields.refuse(("text",), f"judged answers: {JUDGED_FORMS}")
    if fields.chosen or fields.rejected:
        return find_pair_layout(row, fields)
    label = fields.label or next((column for column in LABELS if column in row), None)
    if label is None:
        return None if fields.completion or fields.messages else find_pair_layout(row, fields)
    if label not in row:
        return None
    prompts = (fields.prompt or fields.completion) and (fields.prompt or "prompt", fields.completion or "completion")
    named = [prompts] if prompts else [(fields.messages,)] if fields.messages else [*PAIRS, ("messages",)]
    read = next((columns for columns in (*named, ("conversations",)) if all(each in row for each in columns)), None)
    if read is None:
        return None

    def build(row: Row, origin: str) -> JudgedExample:
        return _read_judged(row, origin, read, label, dict(fields.roles))

    return Layout(
        "pair", "/".join((*read, label)), (*read, label), (*SYSTEM_COLUMNS, *TOOL_COLUMNS), build, raw=(label,)
    )


def _read_pair(
    row: Row, origin: str, prompt: str | None, sides: Sequence[str], subjects: Sequence[str], roles: Roles
) -> PairExample:
    system = read_system(row, origin)
    chosen, rejected = (_side(row[column], column, origin, roles, whole=prompt is None) for column in sides)
    asked = () if prompt is None else _asked(row, prompt, subjects, origin, roles)
    if prompt is None or chosen[0].role != "assistant":
        asked, chosen, rejected = _apart(origin, asked, chosen, rejected)
    elif rejected[0].role != "assistant":
        raise RowError("different-prompts", origin, "only its rejected side says the prompt once more")
    elif isinstance(row[prompt], str) and not system and all(isinstance(row[column], str) for column in sides):
        (question,), (good,), (bad,) = asked, chosen, rejected  # which --template none keeps bare
        other = Example(origin, prompt=question.content, completion=bad.content)
        return PairExample(origin, prompt=question.content, completion=good.content, rejected=other)
    context = tuple(replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in (*system, *asked))
    return PairExample(origin, messages=(*context, *chosen), rejected=Example(origin, messages=(*context, *rejected)))


def _asked(row: Row, column: str, subjects: Sequence[str], origin: str, roles: Roles) -> tuple[Message, ...]:
    """The turns of the prompt's column."""
    value = row[column]
    if isinstance(value, dict) and "messages" in value:  # OpenAI's `input`
        value = value["messages"]
    if isinstance(value, list):
        return read_turns(value, column, origin, roles)
    about = [subject for subject in subjects if not says_nothing(row.get(subject))]
    return (Message("user", "\n\n".join(text_of(row, each, origin) for each in (column, *about))),)


def _side(value: Any, column: str, origin: str, roles: Roles, whole: bool) -> tuple[Message, ...]:
    """The turns of one side, from text, one turn or several; text that is a whole conversation is HH's transcript."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return read_turns(value, column, origin, roles)
    text = text_of({column: value}, column, origin)
    if not whole:
        return (Message("assistant", text),)
    if text.lstrip().startswith("["):  # JSON, as CSV holds it
        return read_turns(text, column, origin, roles)
    _, *parts = TRANSCRIPT.split(text)
    if not parts or not text.startswith("\n\nHuman:"):
        detail = f"no column holds the prompt ({', '.join(PROMPTS)}), and {column!r} is no conversation"
        raise RowError("missing-column", origin, detail)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return read_turns(turns, column, origin)


def _apart(
    origin: str, asked: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], ...]:
    """Whole conversations as their common beginning and two answers.

    Args:
        asked: the prompt where it stands beside them too; it must be what they begin with.
    """
    if chosen == rejected:
        raise RowError("equal-answers", origin, "both sides are the same conversation")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    prompt, good, bad = chosen[:common], chosen[common:], rejected[common:]
    for name, answer in (("chosen", good), ("rejected", bad)):
        if not answer:
            raise RowError("empty-answer", origin, f"{name} ends where the other side goes on")
        if answer[0].role != "assistant":
            raise RowError("different-prompts", origin, f"turn {common + 1} of {name} is the {answer[0].role}'s")
    said, beside = [(turn.role, turn.content) for turn in prompt], [(turn.role, turn.content) for turn in asked]
    if beside and beside[: len(said)] != said and said[-len(beside) :] != beside:
        raise RowError("different-prompts", origin, "its conversations do not begin with its prompt")
    return prompt, good, bad


def _read_judged(row: Row, origin: str, columns: Sequence[str], label: str, roles: Roles) -> JudgedExample:
    desirable, system = _label(row[label], label, origin), read_system(row, origin)
    if len(columns) == 1:
        turns = read_turns(row[columns[0]], columns[0], origin, roles)
        context, answer = turns[:-1], turns[-1:]
    else:
        prompt, completion = columns
        subjects = SUBJECT_COLUMNS if prompt == "instruction" else ()
        context = _asked(row, prompt, subjects, origin, roles)
        answer = _side(row[completion], completion, origin, roles, whole=False)
        if isinstance(row[prompt], str) and isinstance(row[completion], str) and not system:
            return JudgedExample(origin, prompt=context[0].content, completion=answer[0].content, desirable=desirable)
    context = tuple(replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in (*system, *context))
    return JudgedExample(origin, messages=(*context, *answer), desirable=desirable)


def _label(value: Any, column: str, origin: str) -> bool:
    said = str(value).strip().lower() if isinstance(value, (bool, int, str)) else ""
    if said not in GOOD | BAD:
        got = repr(value) if isinstance(value, (int, float, str)) else describe(value)
        raise RowError("unknown-label", origin, f"{column!r} is {got}; known are true or 1, and false or 0")
    return said in GOOD


# ---- encoding ------------------------------------------------------------------------------------


def encode_pair(template: ChatTemplate, example: Example, learns_prompt: bool = False) -> list[EncodedExample]:
    """The row of a pair, untruncated; of each side what the template marks as the assistant's is its answer.

    Raises:
        RowError: it cannot be compared; its `finding` says why.
    """
    assert isinstance(example, PairExample), example
    sides = []
    for name, side in zip(("chosen", "rejected"), example.sides(), strict=True):
        try:
            sides.append(_encode_one(template, side))
        except RowError as error:
            raise RowError(error.finding, example.origin, f"{name}: {error.detail}") from error
    chosen, rejected = sides
    if chosen.prompt_ids != rejected.prompt_ids:
        raise RowError("different-prompts", example.origin, "its two answers do not follow the same tokens")
    if chosen.input_ids.tolist() == rejected.input_ids.tolist():
        raise RowError("equal-answers", example.origin, "both answers are the same tokens")
    return [EncodedPair.of(chosen, rejected, learns_prompt)]


def encode_whole_pair(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """As `encode_pair`; the chosen document's prompt is learnt too, as ORPO does."""
    return encode_pair(template, example, learns_prompt=True)


def encode_judged(template: ChatTemplate, example: Example) -> list[EncodedExample]:
    """The row of a judged answer, untruncated; two of a pair: the chosen one is good, the rejected bad.

    Raises:
        RowError: it cannot be trained on; its `finding` says why.
    """
    if isinstance(example, PairExample):
        (pair,) = encode_pair(template, example)
        assert isinstance(pair, EncodedPair)
        return [JudgedAnswer.of(answer, good) for answer, good in zip(pair.documents, (True, False), strict=True)]
    assert isinstance(example, JudgedExample), example
    return [JudgedAnswer.of(_encode_one(template, example), example.desirable)]


def _encode_one(template: ChatTemplate, example: Example) -> EncodedExample:
    sequences = template.encode_example(example)
    if len(sequences) != 1:
        raise RowError("odd-turn", example.origin, "the chat template words its answer as several sequences")
    if sequences[0].weights is not None:
        raise RowError("odd-turn", example.origin, "parts of its answer have weights, of which comparing knows nothing")
    if not sequences[0].prompt_ids:
        raise RowError("empty-prompt", example.origin, "its answer follows no token")
    return sequences[0]


def find_one_class(rows: Sequence[EncodedExample], held_out: Sequence[EncodedExample]) -> list[Finding]:
    """An error where all judged answers are good, or all are bad."""
    labels = {row.desirable for row in rows if isinstance(row, JudgedAnswer)}
    if len(labels) != 1:
        return []
    return [Finding("one-class", len(rows), (), f"all are {'good' if labels.pop() else 'bad'}")]


# ---- kinds ---------------------------------------------------------------------------------------


def no_pairs(origin: str, row: Row) -> DataError:
    """What is said of rows that are no pairs."""
    got = f"{origin}: rows without a chosen and a rejected answer, columns {_columns(row)}"
    fix = "to train on examples to follow: --objective sft"
    if any(column in row for column in LABELS):
        fix = "to learn from one answer and its label: --objective kto"
    return DataError(got, f"this objective compares two answers; known forms: {PAIR_FORMS}", fix)


def _no_judgements(origin: str, row: Row) -> DataError:
    got = f"{origin}: rows without a label, columns {_columns(row)}"
    known = f"--objective kto learns from answers that are good or bad; known forms: {JUDGED_FORMS}"
    return DataError(got, known, "to train on examples to follow: --objective sft")


def _columns(row: Row) -> str:
    return ", ".join(map(repr, list(row)[:COLUMNS_NAMED])) or "(none)"


PAIR_ROWS = RowKind(RowForms(find_pair_layout, no_pairs), encode_pair, documents=2)
WHOLE_PAIR_ROWS = RowKind(RowForms(find_pair_layout, no_pairs), encode_whole_pair, documents=2)
JUDGED_ROWS = RowKind(RowForms(find_judged_layout, _no_judgements), encode_judged, several="", find=find_one_class)
