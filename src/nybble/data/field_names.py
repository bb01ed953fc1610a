"""How the rows of a user are named: columns, roles, and the tools of those that bring none."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.data.tool_formats import read_tools_file
from nybble.data.turns import ROLES
from nybble.errors import ConfigError
from nybble.options.groups import RowOptions


@dataclass(frozen=True)
class FieldNames:
    """How the user's rows are named; for a column None means "detect".

    Args:
        roles: (the user's own name of a role, the known one).
        tools: of the rows that bring none.
        calls_as_text: tool calls that stand in a row's text stay text.

    Raises:
        ConfigError: more than one form is named. A `prompt` without a `completion` (or the reverse) is paired
            with the column of that very name, and so are `chosen` and `rejected`.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    roles: tuple[tuple[str, str], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    calls_as_text: bool = False

    def __post_init__(self) -> None:
        unknown = [name for _, name in self.roles if name not in ROLES]
        if unknown:
            raise ConfigError(f"role: {unknown[0]!r} is no role", f"allowed: OLD=NEW, NEW one of {', '.join(ROLES)}")
        forms = (self.prompt or self.completion, self.messages, self.text)
        if sum(form is not None for form in forms) > 1:
            raise ConfigError(
                f"fields of more than one form: {', '.join(repr(form) for form in forms if form)}",
                "allowed: --prompt-field with --completion-field, or --messages-field, or --text-field",
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are named."""
        texts = () if self.text is None else (name.strip() for name in self.text.split(","))
        named = (self.prompt, self.completion, self.messages, *texts, self.chosen, self.rejected, self.label)
        return tuple(column for column in named if column is not None)

    def refuse(self, unused: Iterable[str], rows: str) -> None:
        """Refuse names of columns that the rows do not have.

        Args:
            unused: attributes of such columns.
            rows: what they are.

        Raises:
            ConfigError: one of them is named.
        """
        options = [f"--{name}-field" for name in unused if getattr(self, name) is not None]
        if options:
            raise ConfigError(f"{options[0]} is given, and rows are {rows}", "", f"leave {' and '.join(options)} out")


def field_names(options: RowOptions) -> FieldNames:
    """The user's own names of columns and roles, and their tools.

    Raises:
        ConfigError: a role is not given as OLD=NEW, or the file of tools cannot be read.
    """
    wrong = next((role for role in options.role if role.count("=") != 1), None)
    if wrong is not None:
        raise ConfigError(f"role: {wrong!r}", "allowed: OLD=NEW, as in narrator=assistant")
    return FieldNames(
        options.prompt_field,
        options.completion_field,
        options.messages_field,
        options.text_field,
        options.chosen_field,
        options.rejected_field,
        options.label_field,
        roles=tuple((old.strip(), new.strip()) for old, _, new in (role.partition("=") for role in options.role)),
        tools=() if options.tools is None else read_tools_file(Path(options.tools).expanduser()),
        calls_as_text=options.tool_calls == "text",
    )
