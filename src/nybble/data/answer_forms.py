"""How a template writes thoughts and tool calls, found by rendering small ones, and read back from answers.

A model that was trained through its template writes as the template does: what stands around a thought, around all
calls, around each of them, and between its name and its arguments, is what probes are rendered with. Known are calls
that are a JSON object (Hermes, Qwen 2.5 and 3, Llama 3, Mistral's lists), a name and a JSON object of arguments
(DeepSeek, later Mistral), a name with its arguments one by one (GLM, Qwen 3.5), and a name with arguments in brackets
that are no JSON (Gemma 4, LFM2; `loose_arguments.py`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from nybble.data.examples import Message, ToolCall
from nybble.data.loose_arguments import CLOSING, LooseForm, read_arguments
from nybble.data.supervision import MARK, Render
from nybble.data.template_probes import ASKED, CALL, KEY, TOOL
from nybble.data.thinking import MARKS

OTHER_TOOL, OTHER_KEY, OTHER_MARK, SAID = "zqother", "zqsecond", "Zqjx", "Zqsaid"
OTHER_CALL = ToolCall(OTHER_TOOL, {KEY: MARK}, "callother")
LONG_CALL = ToolCall(TOOL, {KEY: MARK, OTHER_KEY: OTHER_MARK}, CALL.id)
NUMBER_CALL = ToolCall(TOOL, {KEY: 7318}, CALL.id)
ARGUMENTS = ("arguments", "parameters")
Schemas = Mapping[str, Mapping[str, Any]]  # name of a tool -> its parameters' JSON schemas by name


class ThoughtForm(NamedTuple):
    """What stands around a thought.

    Args:
        begun: the prompt ends in the opening already.
    """

    opening: str
    closing: str
    begun: bool


@dataclass(frozen=True)
class CallGrammar:
    """What stands around calls, and within one.

    Args:
        section: before all of them, and its end.
        each: before each of them, and behind it.
        between: behind the end of one and before the next; None where there is only one.
        name_end: behind the name; None where a call is one JSON object.
        values: before a key, between it and its value, behind that; None where the arguments are not one by one.
        loose: how arguments in brackets are written; None where they are no such, or are a JSON object.
    """

    section: tuple[str, str]
    each: tuple[str, str]
    between: str | None
    name_end: str | None = None
    values: tuple[str, str, str] | None = None
    loose: LooseForm | None = None

    @property
    def mark(self) -> str:
        """What an answer with calls has before them, up to white space; "" where a call is the JSON alone, and with it
        the whole answer."""
        begins = (self.section[0] + self.each[0]).split()
        return begins[0] if begins else ""


class AnswerForm(NamedTuple):
    """How a template writes what answers may hold.

    Args:
        thought, calls: None where it shows none.
        words: what stands before words, where something does.
    """

    thought: ThoughtForm | None
    calls: CallGrammar | None
    words: str

    @property
    def literals(self) -> str:
        """All that answers are read by, one behind the other."""
        thought = () if self.thought is None else (self.thought.opening, self.thought.closing)
        calls = self.calls
        around = () if calls is None else (*calls.section, *calls.each, calls.between or "", calls.name_end or "")
        values = () if calls is None or calls.values is None else calls.values
        return "\n".join((*thought, *around, *values, self.words))


NO_FORM = AnswerForm(None, None, "")  # words alone


def find_answer_form(render: Render) -> AnswerForm:
    """What probes show."""
    thought = _find_thought(render)
    words = _answer_to(render, Message("assistant", SAID), thought).partition(SAID)[0].strip()
    return AnswerForm(thought, _find_calls(render, thought), words)


def _answer_to(render: Render, answer: Message, thought: ThoughtForm | None) -> str:
    """What the model writes, without an empty thought, and what the template puts behind it; "" where it is refused."""
    try:
        prompt, whole = render((ASKED,), True).text, render((ASKED, answer), False).text
    except TemplateError:
        return ""
    text = whole[_border(prompt, whole) :]
    if thought is not None and not answer.reasoning:
        before, closing, behind = text.partition(thought.closing)
        if closing and _squeeze(before) in ("", _squeeze(thought.opening)):
            return behind
    return text


def _border(prompt: str, whole: str) -> int:
    """Where an answer begins: behind the prompt; where that is another one, behind the marks that both begin with."""
    border = len(_common_start(prompt, whole))
    if border < len(prompt):
        border = max(whole.rfind(end, 0, border) + 1 for end in (">", "]", "\n"))
    return border


# ---- thoughts ------------------------------------------------------------------------------------


def _find_thought(render: Render) -> ThoughtForm | None:
    try:
        prompt = render((ASKED,), True).text
        whole = render((ASKED, Message("assistant", SAID, reasoning=MARK)), False).text
    except TemplateError:
        return None
    before, found, rest = whole.partition(MARK)
    closing, said, _ = rest.partition(SAID)
    if not (found and said and closing.strip()):  # the template takes thoughts away; its prompt may begin one yet
        ends = (ThoughtForm(opening, end, True) for opening, end in MARKS if prompt.rstrip().endswith(opening))
        return next(ends, None)
    closing, border = closing.strip(), _border(prompt, whole)
    opening = before[border:].strip()
    if opening:
        return ThoughtForm(opening, closing, False)
    return ThoughtForm(before.split()[-1], closing, closing not in prompt[border:])


# ---- calls ---------------------------------------------------------------------------------------


class _Core(NamedTuple):
    """Where a call stands that begins with its name, or with the object that has it."""

    start: int
    end: int
    name_end: str | None = None
    values: tuple[str, str, str] | None = None
    loose: LooseForm | None = None


def _find_calls(render: Render, thought: ThoughtForm | None) -> CallGrammar | None:
    def written(*calls: ToolCall) -> str:
        return _answer_to(render, Message("assistant", "", calls=calls), thought)

    one, two, long, number = (written(*calls) for calls in ((CALL,), (CALL, OTHER_CALL), (LONG_CALL,), (NUMBER_CALL,)))
    core = _core(one, TOOL) or _listed(one, long, number) or _loose(one, number)
    if core is None:
        return None
    before, behind = one[: core.start], one[core.end :]
    second = _core(two, OTHER_TOOL)
    if (core.values or core.loose) is not None and OTHER_TOOL in two:
        second = _Core(two.index(OTHER_TOOL), 0)
    if second is None or not two.startswith(one[: core.end]):
        grammar = CallGrammar(("", ""), (before, behind), None, *core[2:])
    else:
        middle = two[core.end : second.start]
        opening = _common_end(before, middle)
        rest = middle[: len(middle) - len(opening)]
        closing = _common_start(rest, behind)
        section = before[: len(before) - len(opening)], behind[len(closing) :]
        grammar = CallGrammar(section, (opening, closing), rest[len(closing) :], *core[2:])
    if (not grammar.mark and core.name_end is not None) or TOOL in (core.name_end or ""):
        return None
    for text, call in ((one, CALL), (long, LONG_CALL)):  # what its own probes are not read from is not understood
        found = read_calls(grammar, text[text.find(grammar.mark) :], {})
        if found is None or [(call.name, call.arguments)] != [(each.name, each.arguments) for each in found[0]]:
            return None
    return grammar


def _core(text: str, name: str) -> _Core | None:
    """A call that is a JSON object, or whose arguments are one."""
    at = text.find(name)
    if at < 0:
        return None
    for start, value, end in _objects(text):
        call = _as_call(value)
        if start < at < end and call is not None and call == (name, {KEY: MARK}):
            return _Core(start, end)
        if start > at and value == {KEY: MARK} and (name_end := text[at + len(name) : start]):
            return _Core(at, end, name_end)
    return None


def _listed(one: str, long: str, number: str) -> _Core | None:
    """A call whose arguments stand one by one; numbers as bare as texts."""
    at, key, value = (one.find(each) for each in (TOOL, KEY, MARK))
    second, last = long.find(OTHER_KEY), long.find(OTHER_MARK)
    if not (0 <= at < key < value and long.startswith(one[: value + len(MARK)]) and value < second < last):
        return None
    name_end, between = one[at + len(TOOL) : key], one[key + len(KEY) : value]
    if long[second + len(OTHER_KEY) : last] != between or f"{KEY}{between}7318" not in number:
        return None
    following, behind = long[value + len(MARK) : second], long[last + len(OTHER_MARK) :]
    closing = _common_start(following, behind)
    opening = following[len(closing) :]
    if not (closing.strip() and between.strip() and opening.strip() and name_end.endswith(opening)):
        return None
    end = value + len(MARK) + len(closing)
    return _Core(at, end, name_end.removesuffix(opening), (opening, between, closing))


def _loose(one: str, number: str) -> _Core | None:
    """A call whose arguments stand in brackets, their names bare and text in quotes that numbers lack."""
    at, key, value, bare = one.find(TOOL), one.find(KEY), one.find(MARK), number.find("7318")
    if not (0 <= at < key < value and key < bare and number.startswith(one[: key + len(KEY)])):
        return None
    opening, rest = one[at + len(TOOL) : key].strip(), number[bare + len("7318") :]
    between = number[key + len(KEY) : bare]
    quoted = one[key + len(KEY) : value].removeprefix(between), one[value + len(MARK) :].removesuffix(rest)
    if opening not in CLOSING or not between or not all(quoted) or not rest.startswith(CLOSING[opening]):
        return None
    end = len(one) - len(rest) + 1
    return _Core(at, end, opening, None, LooseForm(opening, between, quoted))


def _objects(text: str) -> list[tuple[int, dict[str, Any], int]]:
    """JSON objects in a text, where each begins and ends, be it within another."""
    found, decoder = [], json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append((start, value, end))
    return found


def _as_call(value: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a JSON object that is a call."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = next((value[key] for key in ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def _common_start(first: str, second: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if length is None else length]


def _common_end(first: str, second: str) -> str:
    return _common_start(first[::-1], second[::-1])[::-1]


# ---- reading -------------------------------------------------------------------------------------


def read_calls(grammar: CallGrammar, text: str, schemas: Schemas) -> tuple[list[ToolCall], str] | None:
    """The calls that a text from their mark on holds, and what follows them; None where it cannot be read.

    White space may differ from the template's. The end of a text may lack what ends calls: the model stopped by it.

    Args:
        schemas: types of arguments that are written one by one; what has none is text.
    """
    reader = _Reader(text)
    if not reader.take(grammar.section[0]):
        return None
    calls: list[ToolCall] = []
    while (call := reader.call(grammar, schemas)) is not None:
        calls.append(call)
        behind = reader.at
        if grammar.between is None or not reader.take(grammar.between) or not reader.sees_call(grammar):
            reader.at = behind
            break
    else:
        return None
    if not calls or not reader.take(grammar.section[1], ends=True):
        return None
    return calls, text[reader.at :].strip()


class _Reader:
    """A place in a text."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def take(self, literal: str, ends: bool = False) -> bool:
        """Step over a literal, whatever its white space; with `ends` the text may end within it."""
        match = _flexible(literal).match(self.text, self.at)
        if match is not None:
            self.at = match.end()
            return True
        if ends and _squeeze(literal).startswith(_squeeze(self.text[self.at :])):
            self.at = len(self.text)
            return True
        return False

    def until(self, literal: str) -> str | None:
        """Step over a literal further on; what stands before it."""
        match = _exact(literal).search(self.text, self.at)
        if match is None:
            return None
        before, self.at = self.text[self.at : match.start()], match.end()
        return before

    def sees_call(self, grammar: CallGrammar) -> bool:
        """Whether a call may begin here."""
        begins = grammar.each[0] if grammar.each[0].strip() else "{" if grammar.name_end is None else ""
        return _flexible(begins).match(self.text, self.at) is not None and self.text[self.at :].strip() != ""

    def call(self, grammar: CallGrammar, schemas: Schemas) -> ToolCall | None:
        """Step over a call; None where there is none that can be read."""
        if not self.take(grammar.each[0]):
            return None
        if grammar.name_end is None:
            found = _as_call(self._object())
        else:
            name = self.until(grammar.name_end)
            if name is None or not name.strip():
                return None
            name = name.strip()
            listed = self._arguments(grammar, schemas.get(name, {}))
            found = None if listed is None else (name, listed)
        if found is None or not self.take(grammar.each[1], ends=True):
            return None
        return ToolCall(*found, "")

    def _arguments(self, grammar: CallGrammar, schemas: Mapping[str, Any]) -> dict[str, Any] | None:
        if grammar.values is not None:
            return self._values(grammar.values, schemas)
        if grammar.loose is None:
            return self._object()
        read = read_arguments(grammar.loose, self.text, self.at)
        if read is None:
            return None
        found, self.at = read
        return found

    def _object(self) -> dict[str, Any] | None:
        self.take("")
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def _values(self, marks: tuple[str, str, str], schemas: Mapping[str, Any]) -> dict[str, Any] | None:
        opening, between, closing = marks
        found: dict[str, Any] = {}
        while self.take(opening):
            key, value = self.until(between), self.until(closing)
            if key is None or value is None:
                return None
            found[key.strip()] = _typed(value, schemas.get(key.strip()))
        return found


def _typed(value: str, schema: Any) -> Any:
    """A value as its schema has it; as text where that has none, or where it is no JSON."""
    types = schema.get("type") if isinstance(schema, dict) else "string"
    if types == "string" or (isinstance(types, list) and "string" in types):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _flexible(literal: str) -> re.Pattern[str]:
    words = literal.split()
    return re.compile(r"\s*".join(["", *map(re.escape, words), ""]) if words else r"\s*")


def _exact(literal: str) -> re.Pattern[str]:
    """With the literal's own white space at its ends, which may be missing; what stands around it keeps its own."""
    inner = literal.strip()
    before, after = literal[: len(literal) - len(literal.lstrip())], literal[len(literal.rstrip()) :]
    optional = ("".join(f"{re.escape(each)}?" for each in space) for space in (before, after if inner else ""))
    head, tail = optional
    return re.compile(head + r"\s*".join(map(re.escape, inner.split())) + tail)


def _squeeze(text: str) -> str:
    return "".join(text.split())
