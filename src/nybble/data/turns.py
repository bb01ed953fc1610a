"""Make a Message of each turn of a row's conversation, however its owner wrote it down."""

from typing import Any

from nybble.data.cells import as_text, describe, parse_column, says_nothing, text_of
from nybble.data.examples import REASONING_KEYS, Message, Role
from nybble.data.file_kinds import Row
from nybble.data.text_encoder import RowError
from nybble.errors import DataError

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


def read_turns(turns: Any, column: str, origin: str) -> tuple[Message, ...]:
    """The turns in a row's column, as a list or as JSON text.

    Raises:
        DataError: they cannot be read; names the turn.
    """
    if isinstance(turns, str):  # CSV and Parquet often hold the list as JSON text
        turns = as_text(parse_column(turns, column, origin))
    if not isinstance(turns, list) or not turns:
        got = f"{origin}: {column!r} is {describe(turns)}"
        raise DataError(got, "needed: a list of turns, [{role, content}] or [{from, value}]")
    return tuple(_message(turn, f"{origin}: turn {number}") for number, turn in enumerate(turns, 1))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {describe(turn)}", "needed: an object with role and content, or from and value")
    refused = [key for key in REFUSED_KEYS if turn.get(key)]
    if refused:
        raise _beyond_text(where, f"has {', '.join(refused)}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        keys = ", ".join(map(repr, turn))
        got = f"{where}: {role_key} is {role!r}" if role_key in turn else f"{where} has keys {keys}"
        raise DataError(got, f"needed: role (or from), one of {', '.join(ROLES)}, and content (or value)")
    read = (role_key, content_key, *REASONING_KEYS, *MARKS, *REFUSED_KEYS)
    unread = tuple(key for key, value in turn.items() if key not in (*read, *HARMLESS_KEYS) and not says_nothing(value))
    content = text_of({content_key: _joined(turn.get(content_key), where)}, content_key, where)
    return Message(ROLES[role], content, _reasoning(turn, where), _mark(turn, where), unread)


def _beyond_text(where: str, what: str) -> RowError:
    return _odd("beyond-text", where, f"{what}; nybble trains on text alone")


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
        raise _beyond_text(where, f"has parts that are no text: {', '.join(others)}")
    return "".join(text_of(part, "text", where) for part in content)


def _reasoning(turn: Row, where: str) -> str:
    """The thinking that stands in a key of its own."""
    given = {key: text_of({key: _joined(turn[key], where)}, key, where) for key in REASONING_KEYS if turn.get(key)}
    if len(set(given.values())) > 1:
        raise DataError(f"{where}: {' and '.join(given)} differ", "needed: the thinking once", "keep one of them")
    return next(iter(given.values()), "")


def _mark(turn: Row, where: str) -> bool | None:
    """Whether the turn is marked as to be learnt (1, true) or not (0, false); None where it bears no mark."""
    given = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    odd = [f"{key} {value!r}" for key, value in given.items() if value not in (0, 1)]
    if odd:
        known = "0 or false, a turn that is not learnt; 1 or true, one that is"
        raise _odd("unread-weight", where, f"has {', '.join(odd)}; known are {known}")
    if len({bool(value) for value in given.values()}) > 1:
        raise _odd("unread-weight", where, f"has marks of which {' and '.join(given)} contradict each other")
    return next((bool(value) for value in given.values()), None)
