"""Tool calls that published data sets write into text or into columns of their own, as the calls that they are.

Known: Hermes (`<tool_call>` in the answer, `<tools>` in the system turn; NousResearch/hermes-function-calling-v1),
Glaive (`<functioncall>`, one text a conversation; glaiveai/glaive-function-calling-v2), xLAM (query, answers, tools;
Salesforce/xlam-function-calling-60k) and ToolACE (`[name(key=value)]`; Team-ACE/ToolACE). OpenAI's own form, turns with
`tool_calls`, is read in turns.py. A chat template then writes each as its model knows it.
"""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nybble.data.cells import describe
from nybble.data.examples import Message, ToolCall
from nybble.data.file_kinds import Row
from nybble.data.json_rows import parse_json
from nybble.data.text_encoder import RowError
from nybble.errors import ConfigError

Tools = tuple[dict[str, Any], ...]
TOOL_COLUMNS = ("tools", "functions")
JSON_TYPES = {
    **{"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"},
    **{"tuple": "array", "set": "array"},
}
_HERMES_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
_HERMES_RESULT = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
_HERMES_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):[ \t]*")
_GLAIVE_CALL = re.compile(r'<functioncall>\s*\{\s*"name":\s*"([^"]+)"(?:,\s*"arguments":\s*(.*?))?\s*\}\s*$', re.DOTALL)
_GLAIVE_END = "<|endoftext|>"


class Conversation(NamedTuple):
    """What a row says: its turns, the tools that they were held with, and the format that it was read as."""

    messages: tuple[Message, ...]
    tools: Tools
    format: str | None = None


def as_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI has it, {"type": "function", "function": {name, description, parameters}}.

    The parameters of a bare one may be a JSON schema, or names with their types and defaults (xLAM).
    """
    if isinstance(tool.get("function"), dict):
        return tool
    parameters = tool.get("parameters")
    if isinstance(parameters, dict) and "properties" not in parameters and parameters.get("type") != "object":
        described = {name: value for name, value in parameters.items() if isinstance(value, dict)}
        parameters = {
            "type": "object",
            "properties": {name: _property(value) for name, value in described.items()},
            "required": [name for name, value in described.items() if not _is_optional(value)],
        }
    elif isinstance(parameters, dict) and parameters.get("type") == "dict":  # ToolACE's word for it
        parameters = parameters | {"type": "object"}
    known = {key: value for key, value in tool.items() if key not in ("type", "required") or value is not None}
    return {"type": "function", "function": known if parameters is None else known | {"parameters": parameters}}


def _property(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("type"), str):
        return value
    kind = value["type"].split(",")[0].strip()
    return value | {"type": JSON_TYPES.get(kind.split("[")[0].lower(), kind)}


def _is_optional(value: dict[str, Any]) -> bool:
    return "default" in value or "optional" in str(value.get("type", "")).lower()


def read_tools_file(path: Path) -> Tools:
    """The tools in a JSON file, a list of them.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    allowed = "allowed: a JSON file with a list of tools, each with a name, a description and parameters"
    try:
        tools = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tools: {path} cannot be read: {error}", allowed) from error
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"tools: {path} holds {describe(tools)}", allowed)
    return tuple(tools)


# ---- within turns --------------------------------------------------------------------------------


def recognised(conversation: Conversation, origin: str) -> Conversation:
    """The conversation with the calls that its text spells as calls; itself where it spells none.

    Raises:
        RowError: a call cannot be read.
    """
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    if any("<tool_call>" in answer for answer in answers):
        return _hermes(conversation, origin)
    system = "\n".join(message.content for message in conversation.messages if message.role == "system")
    tools = conversation.tools or _listed_tools(system)
    names = [name for tool in tools if isinstance(name := as_schema(tool)["function"].get("name"), str)]
    if names and any(_toolace_calls(answer, names) for answer in answers):
        return _toolace(conversation, tools, names)
    return conversation


def _hermes(conversation: Conversation, origin: str) -> Conversation:
    """The system turn that describes the tools goes: the template's own description is what the model knows."""
    messages, tools = list(conversation.messages), conversation.tools
    for message in conversation.messages:
        described = _HERMES_TOOLS.search(message.content) if message.role == "system" else None
        if described is not None:
            listed = _json_values(described[1])
            tools = tools or tuple(tool for tool in listed if isinstance(tool, dict))
            if tools:
                messages.remove(message)
    turns: list[Message] = []
    for number, message in enumerate(messages, 1):
        if message.role == "assistant":
            calls = [
                _json_call(match[1], f"{origin}: turn {number}") for match in _HERMES_CALL.finditer(message.content)
            ]
            said = _HERMES_CALL.sub("", message.content) if calls else message.content
            turns.append(replace(message, content=said, calls=(*message.calls, *calls)))
        elif message.role == "tool":
            results = [match[1].strip() for match in _HERMES_RESULT.finditer(message.content)]
            turns += [_result(message, result) for result in results or [message.content]]
        else:
            turns.append(message)
    return Conversation(tuple(turns), tools, "Hermes")


def _result(message: Message, text: str) -> Message:
    """A result that may say itself whose it is: {"name": .., "content": ..}."""
    values = _json_values(text)
    value = values[0] if len(values) == 1 and isinstance(values[0], dict) else {}
    if not {"name", "content"} <= value.keys() or not isinstance(value["name"], str):
        return replace(message, content=text, answers="", name="")
    content = (
        value["content"] if isinstance(value["content"], str) else json.dumps(value["content"], ensure_ascii=False)
    )
    return replace(message, content=content, answers="", name=value["name"])


def _json_call(text: str, where: str) -> ToolCall:
    origin, _, turn = where.partition(": ")
    try:
        call = parse_json(text.strip())
    except ValueError:
        call = _python_value(text)  # some are written with Python's quotes
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError(
            "odd-call", origin, f"{turn}: a <tool_call> is no JSON object with a name: {text.strip()[:60]!r}"
        )
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = (_json_values(arguments) or [None])[0]
    if not isinstance(arguments, dict):
        what = f"{turn}: the arguments of {call['name']} are {describe(arguments)}, not an object"
        raise RowError("odd-call", origin, what)
    return ToolCall(call["name"], arguments, "")


def _python_value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _json_values(text: str) -> list[Any]:
    """JSON values one behind the other, a list of them counted as its parts; empty where a part of it is none."""
    values, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        if text[at].isspace() or text[at] == ",":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
    return values


def _listed_tools(system: str) -> Tools:
    """The functions that a system turn lists as JSON (ToolACE)."""
    start = system.find('[{"name"')
    if start < 0:
        return ()
    try:
        listed, _ = json.JSONDecoder().raw_decode(system, start)
    except (ValueError, RecursionError):
        return ()
    return tuple(tool for tool in listed if isinstance(tool, dict) and isinstance(tool.get("name"), str))


def _toolace(conversation: Conversation, tools: Tools, names: Sequence[str]) -> Conversation:
    """The system turn that lists the tools and how to call them goes, as in `_hermes`."""
    turns: list[Message] = []
    for message in conversation.messages:
        if message.role == "system" and _listed_tools(message.content):
            continue
        if message.role == "assistant" and (calls := _toolace_calls(message.content, names)):
            turns.append(replace(message, content="", calls=calls))
        elif message.role == "tool":
            values = _json_values(message.content)
            named = all(isinstance(value, dict) and {"name", "results"} <= value.keys() for value in values)
            turns += (
                [
                    replace(message, content=json.dumps(value["results"], ensure_ascii=False), name=str(value["name"]))
                    for value in values
                ]
                if values and named
                else [message]
            )
        else:
            turns.append(message)
    return Conversation(tuple(turns), tools, "ToolACE")


def _toolace_calls(text: str, names: Sequence[str]) -> tuple[ToolCall, ...]:
    """The calls of "[name(key=value, ..), ..]"; none where the text is anything else. Names may hold spaces."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith(")]")):
        return ()
    calls, rest = [], text[1:-1].strip()
    name = re.compile("|".join(re.escape(each) for each in sorted(names, key=len, reverse=True)))
    while rest:
        match = name.match(rest)
        if match is None or not rest[match.end() :].lstrip().startswith("("):
            return ()
        rest = rest[match.end() :].lstrip()
        found = next(_arguments(rest), None)
        if found is None:
            return ()
        arguments, length = found
        calls.append(ToolCall(match[0], arguments, ""))
        rest = rest[length:].lstrip(", \n")
    return tuple(calls)


def _arguments(text: str) -> Any:
    """(arguments, length) of the shortest "(key=value, ..)" that `text` begins with and that Python reads."""
    for end in (match.end() for match in re.finditer(r"\)", text)):
        try:
            called = ast.parse(f"f{text[:end]}", mode="eval").body
            if isinstance(called, ast.Call) and not called.args:
                yield {key.arg: _literal(key.value) for key in called.keywords if key.arg}, end
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # JSON's words
        return (
            {"true": True, "false": False, "null": None}[node.id] if node.id in ("true", "false", "null") else node.id
        )
    return ast.literal_eval(node)


# ---- layouts of their own ------------------------------------------------------------------------


def xlam(row: Row, origin: str) -> Conversation:
    """A query, the calls that answer it, and the tools, the latter two as JSON text."""
    answers = _parsed(row["answers"], "answers", origin)
    calls = tuple(_json_call(json.dumps(answer), f"{origin}: 'answers'") for answer in answers)
    turns = [Message("user", str(row["query"])), Message("assistant", "", calls=calls)]
    return Conversation(tuple(turns), tuple(_parsed(row.get("tools") or [], "tools", origin)), "xLAM")


def _parsed(value: Any, column: str, origin: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError("odd-call", origin, f"{column!r} is no JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise RowError("odd-call", origin, f"{column!r} is {describe(value)}, not a list of objects")
    return value


def is_glaive(row: Row) -> bool:
    """Whether a row is a conversation as one text."""
    return isinstance(row.get("chat"), str) and _GLAIVE_TURN.match(row["chat"]) is not None


def glaive(row: Row, origin: str) -> Conversation:
    """A conversation as one text; its system text ends in the tools, JSON objects one behind the other."""
    said = str(row.get("system") or "").strip().removeprefix("SYSTEM:").strip()
    listed = said.find("{")
    tools = tuple(value for value in _json_values(said[listed:]) if isinstance(value, dict)) if listed >= 0 else ()
    turns = [] if tools or not said else [Message("system", said)]
    parts = _GLAIVE_TURN.split(row["chat"])[1:]
    for number, (speaker, text) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        text = text.replace(_GLAIVE_END, "").strip()
        if speaker == "USER":
            turns.append(Message("user", text))
        elif speaker == "FUNCTION RESPONSE":
            turns.append(Message("tool", text))
        else:
            turns.append(_glaive_answer(text, f"turn {number}", origin))
    return Conversation(tuple(turns), tools, "Glaive" if tools else None)


def _glaive_answer(text: str, turn: str, origin: str) -> Message:
    before, mark, _ = text.partition("<functioncall>")
    if not mark:
        return Message("assistant", text)
    call = _GLAIVE_CALL.search(text)
    arguments = (call[2] or "{}").strip().strip("'") if call else ""
    values = _json_values(arguments)
    if call is None or len(values) != 1 or not isinstance(values[0], dict):
        raise RowError("odd-call", origin, f"{turn}: the arguments of a <functioncall> are no JSON: {text[-60:]!r}")
    return Message("assistant", before.strip(), calls=(ToolCall(call[1], values[0], ""),))
