"""What a chat template does with the parts of a conversation, found out by rendering small ones. No Jinja is read.

A template shows tool calls or it does not, wants their arguments as an object or as text, knows a key for thinking,
ends an answer in a special token or by the opening of the next turn.
"""

from collections.abc import Callable, Sequence
from itertools import product

from jinja2 import TemplateError

from nybble.data.examples import CallForm, Message, ToolCall
from nybble.data.supervision import MARK, Render, closing_of

TOOL, KEY, NEXT = "zqtool", "zqkey", "Zqnext"  # as MARK: no template's own words contain them
CALL = ToolCall(TOOL, {KEY: MARK}, "call")
ASKED, ANSWERED = Message("user", "a"), Message("assistant", MARK)
CALLING = Message("assistant", "", calls=(CALL,))
RESULT = Message("tool", NEXT, answers=CALL.id, name=TOOL)
# Plainest first. Nine-letter ids are Mistral's, text is DeepSeek's, null beside calls is in OpenAI's own examples.
FORMS = tuple(CallForm(text, null, short) for short, null, text in product((False, True), repeat=3))


def find_call_form(render: Callable[[Sequence[Message], CallForm], str]) -> CallForm | None:
    """The form in which a template shows calls as JSON or in marks of its own; None where it shows none.

    Args:
        render: gives the text of a conversation with its calls in a form; raises TemplateError where it is refused.
    """
    shown = []
    for form in FORMS:
        try:
            text = render((ASKED, CALLING), form)
        except TemplateError:
            continue
        if TOOL in text and MARK in text:
            if f"'{MARK}'" not in text and f'\\"{MARK}' not in text:  # Python's repr, JSON within JSON
                return form
            shown.append(form)
    return shown[0] if shown else None


def shows_thinking(render: Render) -> bool:
    """Whether a template writes down the thinking that stands in a key of its own."""
    try:
        return MARK in render((ASKED, Message("assistant", "b", reasoning=MARK)), False).text
    except TemplateError:
        return False


def next_openings(render: Render, special_tokens: Sequence[str], bos: str | None) -> tuple[str, str]:
    """What ends an answer in templates that have no end of turn: the special token that opens the next turn (GLM), by
    which the model stops.

    Returns:
        behind words, and behind calls; both "" where the template ends its answers, or where no such token follows.
    """
    openings = []
    for answer, following in ((ANSWERED, Message("user", NEXT)), (CALLING, RESULT)):
        try:
            ended, longer = render((ASKED, answer), False).text, render((ASKED, answer, following), False).text
        except TemplateError:
            openings.append("")
            continue
        closing = closing_of(render, (ASKED, answer)) or ""
        rest = longer[len(ended) :] if longer.startswith(ended) else ""
        token = next((token for token in special_tokens if token != bos and rest.startswith(token)), "")
        openings.append("" if any(token in closing for token in special_tokens) and answer is ANSWERED else token)
    return (openings[0], openings[1]) if openings[0] else ("", "")
