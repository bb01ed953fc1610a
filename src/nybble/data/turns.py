"""Make a Message of each turn of a row's conversation, however its owner wrote it down."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nybble.data.cells import as_text, describe, parse_column, says_nothing, text_of
from nybble.data.examples import REASONING_KEYS, Message, Picture, Role, ToolCall
from nybble.data.file_kinds import Row
from nybble.data.json_rows import parse_json
from nybble.data.text_encoder import RowError
from nybble.data.turn_pictures import is_picture, read_parts, unread_of
from nybble.errors import DataError

NAMES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot"),
    "tool": ("tool", "function", "ipython", "observation", "tool_response", "function_response"),
}
ROLES: dict[str, Role] = {name: role for role, names in NAMES.items() for name in names}
CALL_ROLES = ("function_call", "tool_call")  # an assistant's turn that is a call, as JSON (LLaMA-Factory, ms-swift)
CALL_KEYS = ("tool_calls", "function_call")
# Keys of a message by what becomes of them; any other that says something is a finding of the audit.
MARKS = ("weight", "train", "training", "loss")  # OpenAI and Mistral; Axolotl; AgentInstruct: a number, false or true
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


def read_turns(
    turns: Any, column: str, origin: str, roles: Mapping[str, str] | None = None, *, pictures: bool = False
) -> tuple[Message, ...]:
    """The turns in a row's column, as a list or as JSON text; results of tools are not linked to their calls yet.

    Args:
        roles: the user's own name of a role -> one of `ROLES`.
        pictures: may be among the parts of a turn.

    Raises:
        DataError: they cannot be read; names the turn.
    """
    if isinstance(turns, str):  # CSV and Parquet often hold the list as JSON text
        turns = as_text(parse_column(turns, column, origin))
    if not isinstance(turns, list) or not turns:
        got = f"{origin}: {column!r} is {describe(turns)}"
        raise DataError(got, "needed: a list of turns, [{role, content}] or [{from, value}]")
    located = ((turn, f"{origin}: turn {number}") for number, turn in enumerate(turns, 1))
    return tuple(_message(turn, where, roles or {}, pictures) for turn, where in located)


def _message(turn: Any, where: str, roles: Mapping[str, str], pictures: bool) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {describe(turn)}", "needed: an object with role and content, or from and value")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    named = turn.get(role_key)
    own = roles.get(named, named) if isinstance(named, str) else named
    if own in CALL_ROLES:
        return _call_turn(turn, role_key, content_key, where)
    if not isinstance(own, str) or own not in ROLES:
        keys = ", ".join(map(repr, turn))
        got = f"{where}: {role_key} is {named!r}" if role_key in turn else f"{where} has keys {keys}"
        known = ", ".join((*ROLES, *CALL_ROLES))
        allowed = f"needed: role (or from), one of {known}, and content (or value); --role OLD=NEW renames one"
        raise DataError(got, allowed)
    role = ROLES[own]
    calls = _calls(turn, where)
    if calls and role != "assistant":
        raise _odd("odd-call", where, f"has tool calls, and its {role_key} is {named!r}: the assistant calls tools")
    content = turn.get(content_key)
    if calls and content is None:
        content = ""
    if role == "tool" and not isinstance(content, str) and not _is_parts(content):
        content = json.dumps(content, ensure_ascii=False)  # a result may be any JSON
    parts: tuple[str | Picture, ...] = ()
    unread = _unread(turn, role, (role_key, content_key))
    if pictures and isinstance(content, list) and any(map(is_picture, content)):
        texts = [part for part in content if not is_picture(part)]
        unread += tuple(key for part in content if is_picture(part) for key in unread_of(part))
        content, parts = _joined(texts, where), read_parts(content, where)
        if role == "assistant":
            raise _odd("picture-in-answer", where, "is the assistant's, and has a picture in it: models write text")
    return Message(
        role,
        text_of({content_key: _joined(content, where)}, content_key, where),
        _reasoning(turn, where),
        _weight(turn, where),
        unread,
        calls,
        str(turn.get("tool_call_id") or "") if role == "tool" else "",
        str(turn.get("name") or "") if role == "tool" else "",
        parts=parts,
    )


def _unread(turn: Row, role: Role, read: tuple[str, str]) -> tuple[str, ...]:
    """Keys that say something which nothing reads."""
    known = {*read, *REASONING_KEYS, *MARKS, *CALL_KEYS, *HARMLESS_KEYS}
    if role == "tool":
        known.add("tool_call_id")
    return tuple(key for key, value in turn.items() if key not in known and not says_nothing(value))


def _call_turn(turn: Row, role_key: str, content_key: str, where: str) -> Message:
    """A turn that is a call, its content JSON: one `{name, arguments}`, or a list of them."""
    called = turn.get(content_key)
    if isinstance(called, str):
        called = _json(called, where, f"{role_key} {turn[role_key]!r} and a {content_key} that is")
    calls = tuple(_call(call, where) for call in (called if isinstance(called, list) else [called]))
    unread = _unread(turn, "assistant", (role_key, content_key))
    return Message("assistant", "", _reasoning(turn, where), _weight(turn, where), unread, calls)


def _calls(turn: Row, where: str) -> tuple[ToolCall, ...]:
    """Those in a turn's `tool_calls`, or the one in OpenAI's older `function_call`."""
    called = turn.get("tool_calls") or []
    if isinstance(called, str):
        called = _json(called, where, "tool_calls that are") or []
    if not isinstance(called, list):
        raise _odd("odd-call", where, f"has tool_calls that are {describe(called)}, not a list")
    older = turn.get("function_call")
    return tuple(_call(call, where) for call in (*called, *([older] if older else [])))


def _call(call: Any, where: str) -> ToolCall:
    """`{id, type, function: {name, arguments}}`, or `{name, arguments}` alone."""
    function = (call.get("function") or call) if isinstance(call, dict) else call
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise _odd("odd-call", where, f"has a tool call that is {describe(call)} without a name")
    arguments: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _json(arguments, where, f"a call of {name} whose arguments are") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise _odd("odd-call", where, f"has a call of {name} whose arguments are {describe(arguments)}, not an object")
    return ToolCall(name, arguments, str(call.get("id") or ""))


def _json(text: str, where: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _odd("odd-call", where, f"has {what} no JSON: {error}") from error


def link_results(messages: Sequence[Message], origin: str) -> tuple[Message, ...]:
    """The turns, each call with an id, and each result with the id and the name of the call that it answers.

    Results that name no call answer the calls before them in their order.

    Raises:
        RowError: a result answers no call.
    """
    linked: list[Message] = []
    open_calls: list[ToolCall] = []  # without a result yet
    count = 0
    for number, message in enumerate(messages, 1):
        if message.calls:
            calls = []
            for call in message.calls:
                count += 1
                calls.append(call if call.id else replace(call, id=f"call{count:05d}"))
            message = replace(message, calls=tuple(calls))
            open_calls = calls
        elif message.role == "tool":
            call = _answered(message, open_calls, f"{origin}: turn {number}")
            open_calls = [other for other in open_calls if other is not call]
            message = replace(message, answers=call.id, name=call.name)
        linked.append(message)
    return tuple(linked)


def _answered(result: Message, open_calls: Sequence[ToolCall], where: str) -> ToolCall:
    wanted = [call for call in open_calls if not result.answers or call.id == result.answers]
    if not wanted:
        which = f" {result.answers!r}" if result.answers else ""
        raise _odd("stray-result", where, f"is the result of a call{which} that no turn before it makes")
    named = [call for call in wanted if call.name == result.name]
    return (named or wanted)[0]


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _odd(finding: str, where: str, what: str) -> RowError:
    origin, _, turn = where.partition(": ")
    return RowError(finding, origin, f"{turn} {what}")


def _joined(content: Any, where: str) -> Any:
    """Content in parts as one text, where all of them are text."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    others = sorted({"a part without a type" if kind is None else repr(kind) for kind in kinds if kind != "text"})
    if others:
        what = f"has parts that are no text: {', '.join(others)}"
        raise _odd("beyond-text", where, what)
    return "".join(text_of(part, "text", where) for part in content)


def _reasoning(turn: Row, where: str) -> str:
    """The thinking that stands in a key of its own."""
    given = {key: text_of({key: _joined(turn[key], where)}, key, where) for key in REASONING_KEYS if turn.get(key)}
    if len(set(given.values())) > 1:
        raise DataError(f"{where}: {' and '.join(given)} differ", "needed: the thinking once", "keep one of them")
    return next(iter(given.values()), "")


def _weight(turn: Row, where: str) -> float | None:
    """How much the turn is marked to count: 0 or false not at all, 1 or true in full; None where it bears no mark."""
    given = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    odd = [f"{key} {value!r}" for key, value in given.items() if not _is_weight(value)]
    if odd:
        known = "a number of 0 or more, by which the turn's loss is multiplied; false, which is 0; true, which is 1"
        raise _odd("unread-weight", where, f"has {', '.join(odd)}; known are {known}")
    if len({float(value) for value in given.values()}) > 1:
        raise _odd("unread-weight", where, f"has marks of which {' and '.join(given)} contradict each other")
    return next((float(value) for value in given.values()), None)


def _is_weight(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value) and value >= 0
