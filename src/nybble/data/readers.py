"""Make an Example of each row of a source. Where rows come from is in row_files.py.

The layout (which columns mean what) is that of a file's first row of a known form, and then demanded of every row. Rows
that do not fit are kept apart with what is wrong with them, and reading goes on: the audit tells all of them at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nybble.data.cells import as_text, change_of, describe, parse_column, says_nothing, text_of
from nybble.data.examples import Example, Message, Role
from nybble.data.field_names import FieldNames
from nybble.data.file_kinds import LocatedRow, Row
from nybble.data.row_files import RowFile, open_sources
from nybble.data.sources import BUILTIN, DataSource, parse_sources
from nybble.data.text_encoder import RowError
from nybble.data.tool_formats import TOOL_COLUMNS, Conversation, as_schema, glaive, is_glaive, recognised, xlam
from nybble.data.turn_pictures import COLUMNS as PICTURE_COLUMNS
from nybble.data.turn_pictures import with_pictures
from nybble.data.turns import link_results, read_turns
from nybble.errors import DataError
from nybble.events import MANY, Listener, Progress, silent
from nybble.files.spool import Spool

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
    + "; query/answers/tools (xLAM); system/chat (Glaive); text"
)
# Columns that leave out part of what is to be learnt where nothing reads them: which rows count and how much, tools,
# pictures, thinking; beside a prompt, what it is about.
TEACHING_COLUMNS = frozenset(
    (
        *("weight", "weights", "loss", "train", "loss_weight", "sample_weight"),
        *(*TOOL_COLUMNS, "chat_template_kwargs", "response_format"),
        *(*PICTURE_COLUMNS, "audio", "audios", "video", "videos"),
        *("reasoning", "reasoning_content", "thinking", "chain_of_thought", "rationale"),
    )
)
BESIDE_A_PROMPT = frozenset((*SUBJECT_COLUMNS, "passage", "document", "documents", "history"))
KNOWN_COLUMNS = frozenset(
    (
        *(column for pair in PAIRS for column in pair),
        *(*SYSTEM_COLUMNS, *TEACHING_COLUMNS, *BESIDE_A_PROMPT),
        *("messages", "conversations", "text", "input_ids", "label", "kto_tag", "chosen", "rejected"),
        *("chosen_response", "rejected_response", "preferred_output", "non_preferred_output"),
        *("answers", "chat"),
    )
)
COLUMNS_NAMED = 20
OWN_COLUMNS = "name your columns with --prompt-field and --completion-field, --messages-field or --text-field"


class Layout(NamedTuple):
    """Which columns hold what; `name` is for people, `optional` columns are read where a row has them, numbers in `raw`
    ones are none that text is meant by, and turns may have `pictures`.
    """

    kind: Literal["turns", "pair", "text", "labelled"]
    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Row, str], Example]
    calls: str | None = None  # the format of tool calls that its rows are in
    raw: tuple[str, ...] = ()
    pictures: bool = False


@dataclass(frozen=True)
class RowForms:
    """Which rows are read.

    Args:
        find_layout: of a row, by its columns; None where it is of no known one.
        unknown: what is said of a file (file:line and its first row) that has no row of a known form.
    """

    find_layout: Callable[[Row, FieldNames], Layout | None]
    unknown: Callable[[str, Row], DataError]

    def knows(self, row: Row, fields: FieldNames) -> bool:
        """Whether an object, or a table's heading, is of a known form."""
        layout = self.find_layout(row, fields)
        return layout is not None and all(column in row for column in layout.columns)


@dataclass
class ReadResult:
    """The rows of a source.

    Args:
        examples: those that could be read.
        layout: in words which columns were read.
        odd: the others; each error's `finding` is the kind.
        as_text: (origin, what became what) of rows with numbers or true or false where text is needed.
        unread: column -> rows in which nothing reads it, though it says something.
        left_out: (origin, column) of rows where such a column is part of what is to be learnt.
        notices: what a user should know of how the files are read.
        sources: (source, how many of `examples` are its own), in their order.
        formats: name of a format of tool calls -> rows in which calls were found in it.
    """

    examples: Spool[Example] = field(default_factory=Spool)
    layout: str = ""
    odd: Spool[RowError] = field(default_factory=Spool)
    as_text: Spool[tuple[str, str]] = field(default_factory=Spool)
    unread: Counter[str] = field(default_factory=Counter)
    left_out: Spool[tuple[str, str]] = field(default_factory=Spool)
    notices: list[str] = field(default_factory=list)
    sources: list[tuple[DataSource, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def num_rows(self) -> int:
        return len(self.examples) + len(self.odd)

    def check_whole(self) -> None:
        """Let pass what could be read to its last row, for those who have no audit to tell of the others.

        Raises:
            DataError: rows could not be read; the first is named.
        """
        if self.odd:
            more = f" (and {len(self.odd) - 1} more rows that cannot be read)" if len(self.odd) > 1 else ""
            raise DataError(f"{self.odd[0]}{more}", "needed: rows that can be read", "mend or remove them")


def read_examples(
    source: str | Sequence[str],
    fields: FieldNames | None = None,
    scratch: Path | None = None,
    forms: RowForms | None = None,
    report: Listener = silent,
) -> ReadResult:
    """Read every row of a source, or of several.

    Args:
        source: files, folders of them and patterns such as "parts/*.jsonl" (JSON Lines, JSON, CSV, TSV, Parquet, text;
            packed by gzip, bzip2, xz or Zstandard too), hub ids "owner/name" or "owner/name:config", or
            "builtin:pydoc"; behind hub ids and folders "#SPLIT", behind each of several ":WEIGHT".
        fields: the user's own column names.
        scratch: folder on the disk that takes what is too much for memory; that of temporary files where None.
        forms: which rows are read; examples to follow where None.
        report: told how far reading has come, where rows are many.

    Raises:
        DataError: a source is missing, empty, unreadable or in no known layout, or no row of it can be read; the
            message names file:line.
    """
    fields, forms = fields or FieldNames(), forms or EXAMPLES
    sources = parse_sources([source] if isinstance(source, str) else source)
    result = ReadResult(Spool(scratch))
    layouts = []
    for own in (own for own in sources if own.given.startswith(BUILTIN)):
        before = len(result.examples)
        layouts.append(_read_builtin(own.given, forms, result))
        result.sources.append((own, len(result.examples) - before))
    others = [own for own in sources if not own.given.startswith(BUILTIN)]
    opened = open_sources(others, lambda row: forms.knows(_known_names(row, fields), fields))
    for own, files in zip(others, opened, strict=True):
        before = len(result.examples)
        for file in files:
            layouts.append(_read_file(file, fields, forms, result, report))
            result.notices += file.notices
        result.sources.append((own, len(result.examples) - before))
    result.layout = ", ".join(dict.fromkeys(layouts))
    result.notices += [
        f"{rows} rows hold tool calls in {name}'s format; the chat template writes them, and the tools, as the model "
        "knows them. To leave their text as it is: --tool-calls text."
        for name, rows in result.formats.items()
    ]
    return result


def _read_builtin(source: str, forms: RowForms, result: ReadResult) -> str:
    from nybble.data.standard_library import read_pydoc

    if source != "builtin:pydoc":
        raise DataError(f"{source}: no such built-in source", "allowed: builtin:pydoc")
    if forms is not EXAMPLES:
        raise forms.unknown(source, {"function": "", "docstring": ""})
    result.examples.extend(read_pydoc())
    return "function/docstring"


def _read_file(file: RowFile, fields: FieldNames, forms: RowForms, result: ReadResult, report: Listener) -> str:
    """Add the rows of one file to `result`; returns the name of their layout."""
    layout: Layout | None = None
    before = len(result.examples)
    waiting: list[tuple[str, Row]] = []  # rows before the first of a known form
    odd: Spool[RowError] = Spool()
    for number, located in enumerate(file.rows, 1):
        if number % MANY == 0 and file.text is not None and (place := file.text.progress) is not None:
            report(Progress("reading rows", *place))
        try:
            origin, row = _object(located)
        except RowError as error:
            odd.append(error)
            continue
        row = _known_names(row, fields)
        layout = layout or forms.find_layout(row, fields)
        waiting.append((origin, row))
        if layout is not None:
            odd.extend(_add(waiting, layout, fields, result, file.folder))
            waiting = []
    if waiting:
        raise forms.unknown(*waiting[0])
    if layout is None and not odd:
        raise DataError(f"{file.name}: no rows in it", "needed: at least one row")
    if len(result.examples) == before:
        ReadResult(odd=odd).check_whole()
    result.odd.extend(odd)
    assert layout is not None, file.name
    return layout.name


def _add(
    rows: Iterable[tuple[str, Row]], layout: Layout, fields: FieldNames, result: ReadResult, folder: Path | None
) -> list[RowError]:
    """Make examples of rows; returns what is wrong with those of which none can be made."""
    odd = []
    for origin, row in rows:
        try:
            _check_columns(layout, row, origin)
            row, changes = _with_numbers_as_text(row, layout)
            example, found = _with_tools(layout.build(row, origin), layout, row, fields)
            example = with_pictures(example, row, folder) if layout.pictures else example
        except RowError as error:
            odd.append(RowError(error.finding, origin, error.detail))
            continue
        except DataError as error:
            cause = "; ".join(filter(None, (error.got.removeprefix(f"{origin}: "), error.allowed)))
            odd.append(RowError("odd-turn", origin, cause))
            continue
        result.examples.append(example)
        result.formats.update([found] if found else [])
        result.as_text.extend((origin, change) for change in changes[:1])
        _note_unread(row, origin, layout, result)
    return odd


def _with_tools(example: Example, layout: Layout, row: Row, fields: FieldNames) -> tuple[Example, str | None]:
    """The example with the row's tools, or the user's, and its calls as calls; and the format that they were in."""
    if example.text is not None:
        return example, None
    said = Conversation(example.messages or (), example.tools or _tools(row, example.origin))
    if layout.kind == "turns" and not fields.calls_as_text:
        said = recognised(said, example.origin)
    example = replace(example, tools=tuple(map(as_schema, said.tools or fields.tools)))
    if example.messages is not None:
        linked = not fields.calls_as_text or any(turn.calls for turn in said.messages)
        example = replace(example, messages=link_results(said.messages, example.origin) if linked else said.messages)
    return example, said.format or layout.calls


def _note_unread(row: Row, origin: str, layout: Layout, result: ReadResult) -> None:
    for column, value in row.items():
        if column in layout.columns or column in layout.optional or says_nothing(value):
            continue
        result.unread[column] += 1
        if _is_part_of_the_lesson(column, value, layout):
            result.left_out.append((origin, column))


def _is_part_of_the_lesson(column: str, value: Any, layout: Layout) -> bool:
    if column == "label":  # what texts are to be told apart by, or whether an answer is one to follow
        return layout.kind == "text" or value is False
    if column in BESIDE_A_PROMPT:
        return layout.kind == "pair"
    return column in TEACHING_COLUMNS and value != 1  # a weight of 1, or true, changes nothing


def _known_names(row: Row, fields: FieldNames) -> Row:
    """The row with columns such as "Prompt" or " prompt" under the names by which they are known."""
    named: Row = {}
    for column, value in row.items():
        name = column.strip().lower()
        renamed = name in KNOWN_COLUMNS and name not in row and name not in named and column not in fields.columns
        named[name if renamed else column] = value
    return named


def _with_numbers_as_text(row: Row, layout: Layout) -> tuple[Row, list[str]]:
    """The row with numbers, true and false in the columns that are read as JSON writes them, and what was changed."""
    read = [column for column in (*layout.columns, *layout.optional) if column in row]
    texts = {column: as_text(row[column]) for column in read if column not in (*TOOL_COLUMNS, *layout.raw)}
    changes = [f"{column!r}: {change_of(row[column], text)}" for column, text in texts.items() if text != row[column]]
    return ({**row, **texts} if changes else row), changes


def _find_layout(row: Row, fields: FieldNames) -> Layout | None:
    """The layout that a row is of, by its columns; None where it is of no known one.

    Raises:
        ConfigError: a column is named that examples to follow do not have.
    """
    fields.refuse(("chosen", "rejected", "label"), "examples to follow (--objective sft)")
    own = _own_layout(fields)
    if own is not None:
        return own
    for column in ("messages", "conversations"):
        if column in row and _may_be_turns(row[column]):
            return _messages_layout(column, fields)
    if not fields.calls_as_text and {"query", "answers"} <= row.keys():
        return _calls_layout("query/answers", ("query", "answers"), xlam, "xLAM")
    if not fields.calls_as_text and is_glaive(row):
        return _calls_layout("chat", ("chat",), glaive, "Glaive")
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            return _pair_layout(prompt, completion, fields)
    return _text_layout("text") if "text" in row else None


def _may_be_turns(value: Any) -> bool:
    """False for rows that stand under the name of turns: {"conversations": [{"conversations": [..]}, ..]}."""
    first = value[0] if isinstance(value, list) and value else None
    return not isinstance(first, dict) or not {"messages", "conversations"} & first.keys()


def _unknown_format(origin: str, row: Row) -> DataError:
    """What a file is that has no row of a known form, and what can be done with it."""
    if "chosen" in row and "rejected" in row:
        column = "--messages-field chosen" if isinstance(row["chosen"], list) else "--completion-field chosen"
        return DataError(
            f"{origin}: rows of preferences (chosen, rejected)",
            "--objective sft learns from examples to follow, not from comparisons",
            f"to learn from both answers: --objective dpo; to follow those that were chosen: {column}",
        )
    if "input_ids" in row:
        return DataError(
            f"{origin}: rows that are token ids already (input_ids)",
            f"known formats: {KNOWN_LAYOUTS}",
            "give the text that they were made from: the model's own tokenizer and chat template make the tokens",
        )
    more = f" and {len(row) - COLUMNS_NAMED} more" if len(row) > COLUMNS_NAMED else ""
    got = f"{origin}: unknown format, columns {', '.join(map(repr, list(row)[:COLUMNS_NAMED])) or '(none)'}{more}"
    return DataError(got, f"known formats: {KNOWN_LAYOUTS}", OWN_COLUMNS)


EXAMPLES = RowForms(_find_layout, _unknown_format)  # to follow


def _own_layout(fields: FieldNames) -> Layout | None:
    if fields.messages is not None:
        return _messages_layout(fields.messages, fields)
    if fields.prompt is not None or fields.completion is not None:
        return _pair_layout(fields.prompt or "prompt", fields.completion or "completion", fields)
    if fields.text is not None:
        return _text_layout(fields.text)
    return None


def _text_layout(column: str) -> Layout:
    def build(row: Row, origin: str) -> Example:
        return Example(origin, text=text_of(row, column, origin))

    return Layout("text", column, (column,), (), build)


def _pair_layout(prompt: str, completion: str, fields: FieldNames) -> Layout:
    """Rows with an `instruction` may carry what it is about in a column of its own (Alpaca's `input`, Dolly's
    `context`); it follows the instruction after an empty line."""

    subjects = SUBJECT_COLUMNS if prompt == "instruction" else ()

    def build(row: Row, origin: str) -> Example:
        if isinstance(row[prompt], list) or isinstance(row[completion], list):
            turns = _joined_turns(row, (prompt, completion), fields, origin)
            return Example(origin, messages=(*read_system(row, origin), *turns))
        asked, answer = text_of(row, prompt, origin), text_of(row, completion, origin)
        about = [column for column in subjects if not says_nothing(row.get(column))]
        asked = "\n\n".join([asked, *(text_of(row, column, origin) for column in about)])
        system = read_system(row, origin)
        if system:
            return Example(origin, messages=(*system, Message("user", asked), Message("assistant", answer)))
        return Example(origin, prompt=asked, completion=answer)

    optional = (*SYSTEM_COLUMNS, *subjects, *TOOL_COLUMNS, *PICTURE_COLUMNS)
    return Layout("pair", f"{prompt}/{completion}", (prompt, completion), optional, build, pictures=True)


def _joined_turns(row: Row, columns: tuple[str, str], fields: FieldNames, origin: str) -> tuple[Message, ...]:
    """A prompt and a completion of which at least one is a list of turns; only the completion is to be learnt. Where
    the prompt ends in an answer that has begun, the completion goes on with it."""

    def turns(column: str, role: Role) -> tuple[Message, ...]:
        if isinstance(row[column], list):
            return read_turns(row[column], column, origin, dict(fields.roles), pictures=True)
        return (Message(role, text_of(row, column, origin)),)

    prompt, completion = turns(columns[0], "user"), turns(columns[1], "assistant")
    context = [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in prompt]
    begun, first = context[-1], completion[0]
    if begun.role == first.role == "assistant" and not begun.calls:
        joined = replace(first, content=begun.content + first.content, given=len(begun.content))
        return (*context[:-1], joined, *completion[1:])
    return (*context, *completion)


def _messages_layout(column: str, fields: FieldNames) -> Layout:
    def build(row: Row, origin: str) -> Example:
        turns = read_turns(row[column], column, origin, dict(fields.roles), pictures=True)
        return Example(origin, messages=(*read_system(row, origin), *turns))

    optional = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, *PICTURE_COLUMNS)
    return Layout("turns", column, (column,), optional, build, pictures=True)


def _calls_layout(
    name: str, columns: tuple[str, ...], read: Callable[[Row, str], Conversation], known_as: str
) -> Layout:
    """Rows whose columns hold a conversation with tools in a format of their own."""

    def build(row: Row, origin: str) -> Example:
        said = read(row, origin)
        return Example(origin, messages=said.messages, tools=said.tools)

    return Layout("pair", f"{name} ({known_as})", columns, ("system", *TOOL_COLUMNS), build, known_as)


def read_system(row: Row, origin: str) -> tuple[Message, ...]:
    """A system prompt in a column of its own, as the first turn."""
    columns = [column for column in SYSTEM_COLUMNS if not says_nothing(row.get(column))]
    if len({text_of(row, column, origin) for column in columns}) > 1:
        raise DataError(f"{origin}: {' and '.join(columns)} differ", "needed: one system prompt")
    return tuple(Message("system", text_of(row, column, origin)) for column in columns[:1])


def _check_columns(layout: Layout, row: Row, origin: str) -> None:
    missing = [column for column in layout.columns if column not in row]
    if missing:
        has = ", ".join(map(repr, list(row)[:COLUMNS_NAMED])) or "none"
        raise RowError("missing-column", origin, f"no column {', '.join(map(repr, missing))}; it has {has}")


def _tools(row: Row, origin: str) -> tuple[Row, ...]:
    """The JSON schemas in a column of that kind, as a list or as JSON text; a tool may be JSON text itself."""
    column = next((name for name in TOOL_COLUMNS if not says_nothing(row.get(name))), TOOL_COLUMNS[0])
    tools = row.get(column) or []
    if isinstance(tools, str):
        tools = parse_column(tools, column, origin) or []
    if isinstance(tools, list):
        tools = [parse_column(tool, column, origin) if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{origin}: {column!r} is {describe(tools)}", "needed: a list of JSON schemas, one a tool")
    return tuple(tools)


def _object(located: LocatedRow | RowError) -> tuple[str, Row]:
    if isinstance(located, RowError):
        raise located
    origin, row = located
    if not isinstance(row, dict):
        raise RowError("unreadable-row", origin, f"the row is {describe(row)}, not an object")
    return origin, row
