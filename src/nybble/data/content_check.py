"""What a conversation must have to be learnt from, and whether a template writes down all that it says."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from nybble.data.examples import Message
from nybble.data.text_encoder import RowError


def check_turns(origin: str, messages: Sequence[Message]) -> None:
    """Refuse conversations that there is nothing to learn from.

    Raises:
        RowError: says why.
    """
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowError("no-assistant-turn", origin, "no assistant turn, so nothing to train on")
    if "user" not in roles[: len(roles) - roles[::-1].index("assistant")]:
        raise RowError("no-user-turn", origin, "only an assistant turn: no user turn before it to answer")
    learnt = [message for message in messages if message.supervised]
    if not learnt:
        raise RowError("nothing-to-learn", origin, "each of its assistant turns is marked as not to be learnt")
    if not any(message.content[message.given :].strip() or message.calls for message in learnt):
        raise RowError("empty-answer", origin, "the assistant's turn is empty")


def check_content(origin: str, messages: Sequence[Message], text: str, trained: set[int]) -> None:
    """Refuse a text that leaves out a part of the messages.

    Each must stand in it, white space aside, at a place of its own. Answers that are not trained on here may have been
    shortened by the template.

    Args:
        trained: numbers of the messages that are.

    Raises:
        RowError: names the part.
    """
    needed = [
        (spellings, what, index)
        for index, message in enumerate(messages)
        if message.role != "assistant" or index in trained
        for what, spellings in _parts(message)
    ]
    rest = _squeeze(text)
    for spellings, what, index in sorted(needed, key=lambda each: -len(each[0][0])):  # a short one may be in a long one
        found = next((words for words in spellings if words in rest), None)
        if found is None:
            detail = f"the template leaves out (part of) {what} {index + 1}, by {messages[index].role}"
            raise RowError("template-loses-content", origin, detail)
        rest = rest.replace(found, "\0", 1) if found else rest


def check_tools(origin: str, tools: Sequence[dict[str, Any]], text: str, without: str) -> None:
    """Refuse a text in which the tools of a conversation do not stand.

    Args:
        without: the text of the same conversation without tools.

    Raises:
        RowError: the template has no place for them, or leaves one out.
    """
    if tools and text == without:
        raise RowError("template-loses-content", origin, "the chat template has no place for the row's tools")
    names = [tool["function"].get("name") for tool in tools if isinstance(tool.get("function"), dict)]
    lost = next((name for name in names if isinstance(name, str) and name not in text), None)
    if lost is not None:
        raise RowError("template-loses-content", origin, f"the chat template leaves out the tool {lost}")


def _parts(message: Message) -> Iterator[tuple[str, list[str]]]:
    """(what it is, how it may be spelled without white space) of each part of a message."""
    for part in message.parts or (message.content,):
        if isinstance(part, str):
            yield "message", _spellings(part) if message.role == "tool" else [_squeeze(part)]
    yield "the thinking of message", [_squeeze(message.reasoning)]
    for call in message.calls:
        yield "a tool call in message", [_squeeze(call.name)]
        for name, value in call.arguments.items():
            yield f"the argument {name} of {call.name} in message", _spellings(name)
            for leaf in _leaves(value):
                yield f"the argument {name} of {call.name} in message", _spellings(leaf)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _spellings(value: Any) -> list[str]:
    """A text, a number, true, false or null as templates write them: bare, as JSON, in Python's words."""
    texts = [value] if isinstance(value, str) else [str(value), json.dumps(value)]
    if isinstance(value, str):
        texts += [json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]]
        texts += [_as_json(text) for text in texts[:1]]
    return [_squeeze(text) for text in dict.fromkeys(texts)]


def _as_json(text: str) -> str:
    """JSON text as a template writes it that reads it first."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _squeeze(text: str) -> str:
    return "".join(text.split())
