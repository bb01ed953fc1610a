"""From a verb's options and a function to a verb of the command line.

Flags, help texts, defaults and help panels come from the fields of the verb's groups, so that an option
is declared in `nybble.options.groups` and nowhere else. Flags arrive as text; the options convert and
check them, which gives one set of messages for flags and YAML files.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from nybble.cli.completion import completer
from nybble.errors import ConfigError, NybbleError
from nybble.options.option import Verb, alternatives, choices_of, fields_by_group, known_names, nearest, yaml_key

Body = Callable[..., int]  # takes the given flags, and arguments of its own; returns the exit code


def add_verb(app: typer.Typer, name: str | None, body: Body, options: type[Verb] = Verb) -> None:
    """Adds `body` to `app` as the verb `name`; None makes it what `app`, a group of verbs, does by itself.

    Args:
        body: called with a dict of the flags the user gave (option name -> text, bool for a switch, list of texts
            for what may be given again), then
            with the arguments and options that its own signature declares with typer. Its docstring is the help.
        options: their fields become flags.
    """
    own_parameters = list(inspect.signature(body).parameters.values())[1:]

    def run(ctx: typer.Context, **arguments: Any) -> None:
        if ctx.invoked_subcommand is not None:
            return
        given = {flag.name: arguments.pop(flag.name) for flag in flags}
        try:
            exit_code = body({name: value for name, value in given.items() if value not in (None, [])}, **arguments)
        except NybbleError as error:
            exit_code = report(error)
        raise typer.Exit(exit_code)

    flags = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(option, field, group))
        for group, fields in fields_by_group(options).items()
        for option, field in fields.items()
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own_parameters]
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *own, *flags]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = body.__doc__
    if name is None:
        app.callback(invoke_without_command=True, cls=_with_nearest_flag(TyperGroup, options))(run)
    else:
        app.command(name, cls=_with_nearest_flag(TyperCommand, options))(run)


def report(error: NybbleError) -> int:
    """Prints what was got, what is allowed and what to do, a line each; returns the exit code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("Error: ", "bold red"), printable(error.got)))
    for line in (error.allowed, error.fix):
        if line:
            console.print(Text(printable(line)))
    return error.exit_code


def printable(text: str) -> str:
    """`text` without characters that a terminal would act on or could not show: a damaged file's names have any."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _flag(name: str, field: FieldInfo, group: str) -> Any:
    """The annotation from which typer makes the flag of one option."""
    is_switch = alternatives(field)[0] is bool
    kind: Any = bool if is_switch else list[str] if _is_list(field) else str
    option = typer.Option(
        f"--{yaml_key(name)}/--no-{yaml_key(name)}" if is_switch else f"--{yaml_key(name)}",
        help=f"{field.description} {_default(field)}".rstrip(),
        metavar="" if is_switch else _metavar(field),
        show_default=False,
        rich_help_panel=group,
        autocompletion=completer(name, field),
    )
    return Annotated[kind | None, option]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    if field.default is None or field.default == {}:
        return ""
    return f"(default: {'on' if field.default is True else 'off' if field.default is False else field.default})"


def _metavar(field: FieldInfo) -> str:
    kind = alternatives(field)[0]
    choices = choices_of(kind)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    if get_origin(kind) is dict:
        return "PATTERN=N"
    if get_args(kind)[:1] == (float,):
        return "X,X"
    if get_origin(kind) is tuple:
        return "PATH" if get_args(get_args(kind)[0])[:1] == (Path,) else "NAMES"
    return {str: "TEXT", Path: "PATH", float: "X"}.get(kind, "N")


def _is_list(field: FieldInfo) -> bool:
    """Whether an option holds several values: its flag may then be given again."""
    return get_origin(alternatives(field)[0]) is tuple


def _given_again(command: Any, ctx: Any, args: list[str]) -> str | None:
    """A flag that stands in `args` more than once and holds one value, of which the parser would keep the last."""
    _, _, order = command.make_parser(ctx).parse_args(args=list(args))
    counts = Counter(id(parameter) for parameter in order)
    options = (parameter for parameter in command.params if parameter.param_type_name == "option")
    again = [option.opts[0] for option in options if counts[id(option)] > 1 and not option.multiple]
    return again[0] if again else None


def _with_nearest_flag(kind: Any, options: type[Verb]) -> Any:
    class Command(kind):
        """A command or group that refuses a flag given twice, where click would keep the last value in silence, and
        always names the nearest flag, where click's own suggestion needs a close one."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            try:
                again = _given_again(self, ctx, args)
                if again is not None:
                    problem = ConfigError(f"{again} is given twice.", "Each option is given once.", "Remove one.")
                    raise typer.Exit(report(problem))
                parsed: list[str] = super().parse_args(ctx, args)
                return parsed
            except typer.TyperException as error:
                if not hasattr(error, "possibilities"):  # only click's NoSuchOption has it
                    raise
                own = [flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)]
                flags = {flag.lstrip("-"): flag for flag in own if flag.startswith("--")} | {"help": "--help"}
                flags = {alias: f"--{key}" for alias, key in known_names(options).items()} | flags
                unknown: str = error.option_name  # type: ignore[attr-defined]
                problem = ConfigError(
                    f"There is no flag {unknown}. Did you mean {nearest(unknown, flags)}?",
                    f"Flags: {', '.join(dict.fromkeys(flags.values()))}.",
                    f"`{ctx.command_path} --help` explains each.",
                )
                raise typer.Exit(report(problem)) from None

    return Command
