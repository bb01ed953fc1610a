"""Ollama's Modelfile: which file, how conversations are laid out, what ends an answer.

Ollama renders conversations with a Go template of its own. One is made from how the chat template renders probes:
what stands before, between and after their contents. It is then run (the same few rules, here) on other
conversations; only if every rendering equals the chat template's is it written, else the file says it was not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from nybble.data.examples import Message
from nybble.data.template import ChatTemplate

_MARKS = ("\x02system\x03", "\x02user\x03", "\x02assistant\x03", "\x02again\x03")
_CHECKS = (
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class Layout:
    """What stands around the contents of a conversation.

    Args:
        default_head: before the first turn where there is no system message.
        system: (before, after) a system message's content; None where the template has no such role.
        user: (before, after) a user's message; `after` leads over to the answer.
        assistant: (before, after) an earlier answer.
        folded: whether a system message opens the user's turn behind it, which then has no `before` of its own.
    """

    default_head: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    folded: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        text = "" if messages[0].role == "system" else self.default_head
        opened = False
        for message in messages:
            if message.role == "system":
                assert self.system is not None
                text += self.system[0] + message.content + self.system[1]
                opened = self.folded
            elif message.role == "user":
                text += ("" if opened else self.user[0]) + message.content + self.user[1]
                opened = False
            else:
                text += self.assistant[0] + message.content + self.assistant[1]
        return text

    def go_template(self) -> str:
        """Say what `render` does in Go's text/template, over Ollama's `.Messages`."""
        head, system, before_user = self.default_head, "", self.user[0]
        declared, opens = "", ""
        if self.folded:
            declared, opens = "{{ $opened := false }}", "{{ $opened = true }}"
            before_user = f"{{{{ if not $opened }}}}{before_user}{{{{ end }}}}{{{{ $opened = false }}}}"
        if self.system is not None:
            after = self.system[1] + opens
            system = f'{{{{ if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{after}{{{{ end }}}}'
            if head:
                head = '{{ if ne (index .Messages 0).Role "system" }}' + head + "{{ end }}"
        return (
            f"{declared}{head}{{{{ range .Messages }}}}{system}"
            f'{{{{ if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}{self.user[1]}{{{{ end }}}}'
            f'{{{{ if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}{{{{ end }}}}'
            "{{ end }}"
        )


def modelfile(model: str, template: ChatTemplate, adapter: str | None = None) -> str:
    """The text of a Modelfile.

    Args:
        model: what FROM names: a GGUF file, relative to the Modelfile.
        adapter: a GGUF adapter beside it.
    """
    lines = [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    layout = find_layout(template)
    go = layout.go_template() if layout else ""
    if layout is None or '"""' in go:
        lines += ["# The chat template could not be put into Ollama's form; set TEMPLATE by hand."]
    else:
        lines += [f'TEMPLATE """{go}"""']
        lines += (
            ["# TEMPLATE lays out plain turns: tools and their calls are not in it."] if template.shows_calls else []
        )
    stops = [template.tokenizer.convert_ids_to_tokens(number) for number in template.stop_ids]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops), "PARAMETER temperature 0", ""])


def find_layout(template: ChatTemplate) -> Layout | None:
    """How the run's chat template lays out a conversation; None where a few fixed pieces cannot say it."""
    if template.chat_template is None:
        return None
    try:
        layout = _probe(template)
        if layout is None or any(piece in str(layout) for piece in ("{{", "}}")):
            return None
        for roles in _CHECKS:
            if roles[0] == "system" and layout.system is None:
                continue
            messages = [Message(role, f"{role} {i} says") for i, role in enumerate(roles)]  # type: ignore[arg-type]
            if layout.render(messages) != _without_bos(template, template.render(messages, True)):
                return None
    except TemplateError:
        return None
    return layout


def _probe(template: ChatTemplate) -> Layout | None:
    system, user, assistant, again = _MARKS
    turns = [Message("user", user), Message("assistant", assistant), Message("user", again)]
    head, after_user, between, lead = _pieces(template, turns, (user, assistant, again))
    if not after_user.startswith(lead):
        return None
    closed = _without_bos(template, template.render(turns[:2], False))
    end = closed[closed.index(assistant) + len(assistant) :]
    if not between.startswith(end):
        return None
    before_user = between[len(end) :]
    if not head.endswith(before_user):
        return None
    default_head = head.removesuffix(before_user) if before_user else head
    try:
        before, after, _ = _pieces(template, [Message("system", system), turns[0]], (system, user))
    except (TemplateError, ValueError):  # a template without system messages, or one that puts them elsewhere
        return Layout(default_head, None, (before_user, lead), (after_user[len(lead) :], end))
    if not after.endswith(before_user):
        return Layout(default_head, (before, after), (before_user, lead), (after_user[len(lead) :], end), folded=True)
    after = after.removesuffix(before_user) if before_user else after
    return Layout(default_head, (before, after), (before_user, lead), (after_user[len(lead) :], end))


def _pieces(template: ChatTemplate, messages: Sequence[Message], marks: Sequence[str]) -> list[str]:
    """The rendered prompt, cut at the marks, which are taken out."""
    pieces, rest = [], _without_bos(template, template.render(messages, True))
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(mark)
        pieces.append(piece)
    return [*pieces, rest]


def _without_bos(template: ChatTemplate, text: str) -> str:
    """Ollama puts the beginning-of-sequence token itself, where the vocabulary asks for one."""
    bos = template.tokenizer.bos_token
    return text.removeprefix(bos) if bos and template.encoder.leading_bos is not None else text
