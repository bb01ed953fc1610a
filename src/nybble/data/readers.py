"""Read rows from files, the hub or a built-in source, and make an Example of each.

JSON Lines, JSON and CSV are read with the standard library, so that every complaint can name file:line;
Parquet and hub data sets through `datasets`. The layout (which columns mean what) is detected from the first
row of a file and then demanded of every row.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from nybble.data.examples import REASONING_KEYS, Example, Message, Role
from nybble.errors import ConfigError, DataError

Row = dict[str, Any]
LocatedRow = tuple[str, Any]  # origin, row as parsed

# (prompt, completion) columns, the first pair that a row has wins.
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
SUBJECT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
KNOWN_LAYOUTS = (
    "messages [{role, content}]; conversations [{from, value}]; "
    + "; ".join(f"{prompt}/{completion}" for prompt, completion in PAIRS)
    + "; text"
)
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
# Keys of a message by what becomes of them; any other that says something is a finding of the audit.
REFUSED_KEYS = ("tool_calls", "function_call", "tool_call_id")
MARKS = ("weight", "train", "training", "loss")  # OpenAI and Mistral; Axolotl; AgentInstruct: 0 or 1, false or true
# Where a turn comes from and what it cost: names, numbers, times and counts, none of which a model is to read or write.
HARMLESS_KEYS = frozenset(
    (
        *("id", "uuid", "message_id", "parent_id", "turn_id", "turn_identifier", "index", "idx", "turn", "num"),
        *("name", "author", "model", "source", "lang", "language", "country", "state"),
        *("timestamp", "time", "date", "create_time", "created_at", "update_time", "updated_at"),
        *("tokens", "num_tokens", "token_count", "token_counter", "temperature", "top_p"),
        *("score", "rating", "toxic", "redacted", "hashed_ip", "openai_id", "system_fingerprint"),
    )
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
OWN_COLUMNS = "name your columns with --prompt-field and --completion-field, --messages-field or --text-field"


@dataclass(frozen=True)
class FieldNames:
    """The user's own column names; None means "detect".

    Raises:
        ConfigError: more than one form is named. A `prompt` without a `completion` (or the reverse) is paired
            with the column of that very name.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        forms = (self.prompt or self.completion, self.messages, self.text)
        if sum(form is not None for form in forms) > 1:
            raise ConfigError(
                f"fields of more than one form: {', '.join(repr(form) for form in forms if form)}",
                "allowed: --prompt-field with --completion-field, or --messages-field, or --text-field",
            )


class Layout(NamedTuple):
    """Which columns hold what; `name` is for people. A system prompt may stand in a column of its own."""

    name: str
    columns: tuple[str, ...]
    build: Callable[[Row, str], Example]
    is_text: bool = False


class ReadResult(NamedTuple):
    """The rows, and in words which columns were read and which were not."""

    examples: list[Example]
    layout: str


def read_examples(source: str, fields: FieldNames | None = None) -> ReadResult:
    """Read every row of a source.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, a hub id "owner/name" or "owner/name:config" (its
            split "train"), or "builtin:pydoc".
        fields: the user's own column names.

    Raises:
        DataError: the source is missing, empty, unreadable or in no known layout, or a row does not fit; the
            message names file:line.
    """
    if source.startswith("builtin:"):
        return _read_builtin(source)
    rows = _read_rows(source)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: no rows in it", "needed: at least one row")
    layout = detect_layout(_object(first), first[0], fields or FieldNames())
    examples = [_build(layout, first)]
    examples += [_build(layout, row) for row in rows]
    return ReadResult(examples, _describe_layout(layout, first[1]))


def _describe_layout(layout: Layout, row: Row) -> str:
    """The layout's name, and the columns that nothing reads."""
    tools = () if layout.is_text else ("tools",)
    read = (*layout.columns, *tools, *SYSTEM_COLUMNS, *(SUBJECT_COLUMNS if "instruction" in layout.columns else ()))
    unread = [column if column.isprintable() else ascii(column) for column in row if column not in read]
    return layout.name + (f", not read: {', '.join(unread)}" if unread else "")


def detect_layout(row: Row, origin: str, fields: FieldNames) -> Layout:
    """The layout of a file, from its first row."""
    own = _own_layout(fields)
    if own is not None:
        return own
    for column in ("messages", "conversations"):
        if column in row:
            return _messages_layout(column)
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            return _pair_layout(prompt, completion)
    if "text" in row:
        return _text_layout("text")
    got = f"{origin}: unknown format, columns {', '.join(map(repr, row)) or '(none)'}"
    raise DataError(got, f"known formats: {KNOWN_LAYOUTS}", OWN_COLUMNS)


def _own_layout(fields: FieldNames) -> Layout | None:
    if fields.messages is not None:
        return _messages_layout(fields.messages)
    if fields.prompt is not None or fields.completion is not None:
        return _pair_layout(fields.prompt or "prompt", fields.completion or "completion")
    if fields.text is not None:
        return _text_layout(fields.text)
    return None


def _text_layout(column: str) -> Layout:
    def build(row: Row, origin: str) -> Example:
        return Example(origin, text=_string(row, column, origin))

    return Layout(column, (column,), build, is_text=True)


def _pair_layout(prompt: str, completion: str) -> Layout:
    """Rows with an `instruction` may carry what it is about in a column of its own (Alpaca's `input`, Dolly's
    `context`); it follows the instruction after an empty line."""

    def build(row: Row, origin: str) -> Example:
        asked, answer = _string(row, prompt, origin), _string(row, completion, origin)
        subjects = [column for column in SUBJECT_COLUMNS if prompt == "instruction" and row.get(column)]
        asked = "\n\n".join([asked, *(_string(row, column, origin) for column in subjects)])
        system = _system(row, origin)
        if system:
            return Example(origin, messages=(*system, Message("user", asked), Message("assistant", answer)))
        return Example(origin, prompt=asked, completion=answer)

    return Layout(f"{prompt}/{completion}", (prompt, completion), build)


def _messages_layout(column: str) -> Layout:
    def build(row: Row, origin: str) -> Example:
        turns = row[column]
        if isinstance(turns, str):  # CSV and Parquet often hold the list as JSON text
            turns = _parse(turns, f"{origin}: column {column!r}")
        if not isinstance(turns, list) or not turns:
            got = f"{origin}: {column!r} is {_describe(turns)}"
            raise DataError(got, "needed: a list of turns, [{role, content}] or [{from, value}]")
        messages = tuple(_message(turn, f"{origin}: turn {number}") for number, turn in enumerate(turns, 1))
        return Example(origin, messages=(*_system(row, origin), *messages))

    return Layout(column, (column,), build)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {_describe(turn)}", "needed: an object with role and content, or from and value")
    refused = [key for key in REFUSED_KEYS if turn.get(key)]
    if refused:
        raise DataError(f"{where} has {', '.join(refused)}", "supported: role, content and thinking, as text")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        keys = ", ".join(map(repr, turn))
        got = f"{where}: {role_key} is {role!r}" if role_key in turn else f"{where} has keys {keys}"
        raise DataError(got, f"needed: role (or from), one of {', '.join(ROLES)}, and content (or value)")
    read = (role_key, content_key, *REASONING_KEYS, *MARKS, *REFUSED_KEYS)
    unread = tuple(key for key, value in turn.items() if key not in (*read, *HARMLESS_KEYS) and not _is_nothing(value))
    content = _string({content_key: _joined(turn.get(content_key), where)}, content_key, where)
    return Message(ROLES[role], content, _reasoning(turn, where), _mark(turn, where), unread)


def _is_nothing(value: Any) -> bool:
    """Whether a key with this value says as much as no key. False and 0 may be marks."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _joined(content: Any, where: str) -> Any:
    """Content in parts as one text, where all of them are text."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    others = sorted({"a part without a type" if kind is None else repr(kind) for kind in kinds if kind != "text"})
    if others:
        raise DataError(
            f"{where}: its content has parts that are no text: {', '.join(others)}",
            'needed: text, or a list of {"type": "text", "text": ".."}',
            "nybble trains on text alone: remove the rows with other parts",
        )
    return "".join(_string(part, "text", where) for part in content)


def _reasoning(turn: Row, where: str) -> str:
    """The thinking that stands in a key of its own."""
    given = {key: _string({key: _joined(turn[key], where)}, key, where) for key in REASONING_KEYS if turn.get(key)}
    if len(set(given.values())) > 1:
        raise DataError(f"{where}: {' and '.join(given)} differ", "needed: the thinking once", "keep one of them")
    return next(iter(given.values()), "")


def _mark(turn: Row, where: str) -> bool | None:
    """Whether the turn is marked as to be learnt (1, true) or not (0, false); None where it bears no mark."""
    given = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    odd = [f"{key} {value!r}" for key, value in given.items() if value not in (0, 1)]
    if odd:
        raise DataError(
            f"{where} has {', '.join(odd)}",
            f"supported for {', '.join(MARKS)}: 0 or false, a turn that is not learnt; 1 or true, one that is",
            "round the weights to 0 or 1, or remove them",
        )
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"{where}: {' and '.join(given)} contradict each other", "needed: one mark", "keep one of them")
    return next((bool(value) for value in given.values()), None)


def _system(row: Row, origin: str) -> tuple[Message, ...]:
    """A system prompt in a column of its own, as the first turn."""
    columns = [column for column in SYSTEM_COLUMNS if row.get(column)]
    return tuple(Message("system", _string(row, column, origin)) for column in columns[:1])


def _string(row: Row, column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is {_describe(value)}", "needed: text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {column!r} has half a surrogate pair at character {error.start}") from error
    return value


def _build(layout: Layout, located: LocatedRow) -> Example:
    origin, row = located[0], _object(located)
    missing = [column for column in layout.columns if column not in row]
    if missing:
        got = f"{origin}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row)) or 'none'}"
        raise DataError(got, f"needed in every row: {', '.join(layout.columns)}", OWN_COLUMNS)
    example = layout.build(row, origin)
    return example if example.text is not None else replace(example, tools=_tools(row, origin))


def _tools(row: Row, origin: str) -> tuple[Row, ...]:
    """The JSON schemas in a column of that name, as a list or as JSON text."""
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = _parse(tools, f"{origin}: column 'tools'") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{origin}: 'tools' is {_describe(tools)}", "needed: a list of JSON schemas, one a tool")
    return tuple(tools)


def _object(located: LocatedRow) -> Row:
    origin, row = located
    if not isinstance(row, dict):
        allowed = 'needed: an object, like {"prompt": "..", "completion": ".."}'
        raise DataError(f"{origin}: the row is {_describe(row)}", allowed)
    return row


def _describe(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    kind = "null" if value is None else kinds.get(type(value), type(value).__name__)
    return f"an empty {kind.split()[-1]}" if value in ([], {}) else kind


# ---- where rows come from


def _read_rows(source: str) -> Iterator[LocatedRow]:
    path = Path(source).expanduser()
    reader = FILE_READERS.get(path.suffix.lower())
    if path.is_file() and reader:
        return reader(path)
    if path.exists():
        kind = "a folder" if path.is_dir() else f"a file ending in {path.suffix!r}"
        raise DataError(f"{source}: {kind}", f"allowed: one file ending in {', '.join(FILE_READERS)}")
    if reader is None and HUB_ID.fullmatch(source):
        return _read_hub(source)
    raise DataError(
        f"{source}: no such file",
        f"allowed: a file ending in {', '.join(FILE_READERS)}, a hub id owner/name, or builtin:pydoc",
        f"looked in {path.parent.resolve()}",
    )


def _read_builtin(source: str) -> ReadResult:
    from nybble.data.pydoc_source import read_pydoc

    if source != "builtin:pydoc":
        raise DataError(f"{source}: no such built-in source", "allowed: builtin:pydoc")
    return ReadResult(read_pydoc(), "function/docstring")


def _read_json_lines(path: Path) -> Iterator[LocatedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{path.name}:{number}"
            text = _decode(line, origin)
            if text.strip():
                yield origin, _parse(text, origin)


def _read_json(path: Path) -> Iterator[LocatedRow]:
    """A list of rows, an object that holds one list, or JSON Lines under the wrong name."""
    text = _decode(path.read_bytes(), path.name)
    if not text.strip():
        return
    if _is_json_lines(text):
        yield from _read_json_lines(path)
        return
    whole = _parse(text, path.name)
    lists = [(key, value) for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    if isinstance(whole, list):
        rows, position = whole, text.index("[")
    elif len(lists) == 1:
        rows, position = lists[0][1], _value_position(text, lists[0][0])
    else:
        got = f"{path.name}: {_describe(whole)}" + (f" holding {len(lists)} lists" if isinstance(whole, dict) else "")
        raise DataError(got, "needed: a list of rows, or an object that holds one list of rows")
    for line, row in zip(_element_lines(text, position), rows, strict=True):
        yield f"{path.name}:{line}", row


def _is_json_lines(text: str) -> bool:
    lines = text.lstrip().split("\n", 1)
    try:
        return isinstance(json.loads(lines[0]), dict) and bool("".join(lines[1:]).strip())
    except (ValueError, RecursionError):
        return False


def _value_position(text: str, wanted: str) -> int:
    """Where the value of a key of the outermost object begins, in valid JSON."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("{") + 1)
    while True:
        key, position = decoder.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)  # behind ':'
        if key == wanted:
            return position
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)  # behind ','


def _element_lines(text: str, start: int) -> Iterator[int]:
    """The line on which each element of the list at text[start] begins, in valid JSON."""
    decoder = json.JSONDecoder()
    line, counted, position = 1, 0, _skip(text, start + 1)
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        yield line
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, position)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = WHITE_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    lines = io.StringIO(_decode(path.read_bytes(), path.name), newline="")
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    csv.field_size_limit(2**31 - 1)
    start = 2
    try:
        columns = reader.fieldnames or []
        repeated = sorted(column for column, count in Counter(columns).items() if count > 1)
        if repeated:
            raise DataError(f"{path.name}:1: column {repeated[0]!r} stands in the heading twice")
        for row in reader:
            origin, start = f"{path.name}:{start}", reader.line_num + 1
            if None in row or None in row.values():
                got = len(row) + len(row.get(None) or ()) - (None in row) - sum(value is None for value in row.values())
                raise DataError(f"{origin}: {got} columns", f"needed: {len(columns)}, as in the heading")
            yield origin, row
    except csv.Error as error:
        raise DataError(f"{path.name}:{reader.reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs below that, it raises too
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((f"{path.name}:{number}", row) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path.name}: not readable as Parquet: {error}") from error


def _read_hub(source: str) -> Iterator[LocatedRow]:
    """The split "train" of a hub data set, streamed."""
    import datasets

    name, _, config = source.partition(":")
    try:
        rows: Iterable[Row] = datasets.load_dataset(name, config or None, split="train", streaming=True)
        yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))
    except ConnectionError as error:
        raise DataError(
            f"{source}: the hub cannot be reached ({error})",
            "a hub id needs a network; without one: a file ending in " + ", ".join(FILE_READERS),
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: the hub's data set cannot be read: {error}") from error


FILE_READERS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _decode(data: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{where}: UTF-16 text", "needed: UTF-8", "save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = where if ":" in where else f"{where}:{line}"
        raise DataError(f"{place}: byte {data[error.start]:#04x} is not UTF-8", "needed: UTF-8") from error


def _parse(text: str, where: str) -> Any:
    """JSON in which no object has the same key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error
    except json.JSONDecodeError as error:
        place = where if ":" in where else f"{where}:{error.lineno}"
        got = f"{place}: not JSON: {error.msg} at column {error.colno}"
        raise DataError(got, "needed: one JSON object a row") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return row
