"""What an option is: how it is declared, read from flags and YAML, checked, written, and refused.

A verb's options are groups (`config.memory.keep`); to users they are flat (`--keep`, `keep:`). What goes from the one
to the other is here; the options themselves are in groups.py, use_groups.py and verbs.py.
"""

import difflib
import re
import reprlib
import types
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo

from nybble.errors import ConfigError


def knob(default: Any, description: str, *, aliases: tuple[str, ...] = (), **bounds: Any) -> Any:
    """One option. `aliases`: what other tools call it, so that an error can name ours."""
    return Field(default, description=description, json_schema_extra={"aliases": list(aliases)}, **bounds)


def _digits_to_int(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _nameable(value: Any) -> Any:
    if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
        raise ValueError("a NUL or half a surrogate pair")
    return value


def _not_empty(value: Any) -> Any:
    if value == "":  # Path("") is the current folder, which --overwrite must not reach by accident.
        raise ValueError("empty")
    return value


def split_names(value: Any) -> Any:
    """Names separated by commas, in one text or in several: a flag may be given again."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def pattern_of(value: Any) -> Any:
    """`q_proj=8,layers.0.*=32` as a mapping, in this order; a comma in brackets belongs to an expression."""
    if isinstance(value, str):
        parts = [part.strip().rpartition("=") for part in re.split(COMMA, value)]
        pairs = [(name.strip(), number.strip()) for name, _, number in parts]
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an expression is given twice")
        value = dict(pairs)
    if isinstance(value, dict):
        for name, number in value.items():
            if not isinstance(name, str) or not name or isinstance(number, bool):
                raise ValueError("not an expression and a number")
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError("not a regular expression") from error
    return value


def one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _interval(value: Any) -> str:
    text = str(value)
    if not re.fullmatch(r"[1-9]\d*m?", text):
        raise ValueError("neither steps nor minutes")
    return text


class Size(int):
    """A number of bytes, written with a unit: GB is 10^9 bytes, GiB 2^30."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler(int)


COMMA = r",(?![^([{]*[)\]}])"  # a comma in brackets belongs to a pattern
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(value: Any) -> Any:
    """The bytes that "8GB", "8GiB", "1.5G" or "500 MB" say; a whole number is bytes already.

    Raises:
        ValueError: the text is none of these.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("not a size")
    number, unit, binary = match.groups()
    return round(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


MIN_BYTES = 1_000_000
Bytes = Annotated[Size, BeforeValidator(parse_size), Field(ge=MIN_BYTES)]
BlockSize = Annotated[Literal[32, 64, 128, 256, 512, 1024, 2048, 4096], BeforeValidator(_digits_to_int)]
MomentBits = Annotated[Literal[32, 8], BeforeValidator(_digits_to_int)]
Name = Annotated[str, Field(min_length=1), BeforeValidator(_nameable)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Folder = Annotated[Path, BeforeValidator(_not_empty), BeforeValidator(_nameable)]
AutoRate = Literal["auto"] | Annotated[float, Field(gt=0)]
AutoRank = Literal["auto"] | Annotated[int, Field(ge=1)]
Sources = Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(one_or_more)]  # may hold commas: not split
RankPattern = Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(pattern_of)]
AlphaPattern = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(pattern_of)]
MAX_YAML_BYTES = 1_000_000
Interval = Annotated[str, BeforeValidator(_interval)]


class Options(BaseModel):
    """Base of every group: values never change, and only declared names are accepted.

    `group` is the heading under which users meet its options; what extends a group has the group's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    group: ClassVar[str]

    def __init_subclass__(cls, group: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if group:
            cls.group = group

    @field_validator("*", mode="before")
    @classmethod
    def _only_switches_are_bool(cls, value: Any, info: Any) -> Any:
        # YAML reads a bare `yes` as true, and pydantic would then read true as the number 1.
        if isinstance(value, bool) and bool not in alternatives(cls.model_fields[info.field_name]):
            raise ValueError("not a switch")
        return value


class Verb(BaseModel):
    """Base of each verb's options: a field for each group. An option is in one group of a verb only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        names = [name for group in groups_of(cls).values() for name in group.model_fields]
        twice = [name for index, name in enumerate(names) if name in names[:index]]
        assert not twice, f"{cls.__name__} has {', '.join(twice)} in two groups"


AnyVerb = TypeVar("AnyVerb", bound=Verb)


def yaml_key(name: str) -> str:
    """`rows_per_step` -> `rows-per-step`, which is also the flag without its `--`."""
    return name.replace("_", "-")


def groups_of(verb: type[Verb]) -> dict[str, type[Options]]:
    """Name of the field -> group, in the order of the fields."""
    return {name: cast(type[Options], field.annotation) for name, field in verb.model_fields.items()}


def fields_by_group(verb: type[Verb]) -> dict[str, dict[str, FieldInfo]]:
    """Heading -> option name -> field, in the order in which users meet them."""
    headings: dict[str, dict[str, FieldInfo]] = {}
    for group in groups_of(verb).values():
        headings.setdefault(group.group, {}).update(group.model_fields)
    return headings


def fields_of(verb: type[Verb]) -> dict[str, FieldInfo]:
    """Option name -> field, in the order in which users meet them."""
    return {name: field for fields in fields_by_group(verb).values() for name, field in fields.items()}


def spread(verb: type[Verb], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`values` of options by the verb's groups, of which each is there.

    Raises:
        KeyError: the verb has no such option.
    """
    spread_values: dict[str, dict[str, Any]] = {name: {} for name in verb.model_fields}
    owners = {name: field for field, group in groups_of(verb).items() for name in group.model_fields}
    for name, value in values.items():
        spread_values[owners[name]][name] = value
    return spread_values


def flat(config: Verb, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
    """Option name -> value, in the order in which users meet them; of mode "json", as JSON and YAML have it."""
    return {name: value for group in config.model_dump(mode=mode).values() for name, value in group.items()}


def with_options(config: AnyVerb, **values: Any) -> AnyVerb:
    """`config` with these options replaced. They are not checked: they are nybble's own, not the user's."""
    owned = spread(type(config), values).items()
    return config.model_copy(update={field: getattr(config, field).model_copy(update=own) for field, own in owned})


def build_options(
    verb: type[AnyVerb],
    values: Mapping[str, Any],
    from_file: Mapping[str, Any] | None = None,
    origin: str = "",
) -> AnyVerb:
    """Checked options of one verb. `values` win over `from_file`; `origin` is the file's name in messages.

    Raises:
        ConfigError: a name is unknown, a value is not allowed, or a required option is missing.
    """
    typed = named_values(verb, values, "")
    filed = named_values(verb, from_file or {}, origin)
    # A key without a value, as `train --print-config` writes for what must still be filled in, is not given.
    given = {name: value for name, value in (filed | typed).items() if value is not None}
    try:
        return verb.model_validate(spread(verb, given))
    except ValidationError as error:
        # What options say together is refused only where each by itself is allowed.
        causes = [(detail, detail.get("ctx", {}).get("error")) for detail in error.errors()]
        detail, cause = min(causes, key=lambda each: isinstance(each[1], ConfigError))
        if isinstance(cause, ConfigError):
            raise cause from None
        name = str(detail["loc"][1])  # after the group's
        if detail["type"] == "missing":
            raise _missing_option(verb, name) from None
        raise _bad_value(verb, name, given[name], "" if name in typed else origin) from None


def config_to_yaml(config: Verb, comments: bool = True, to_fill_in: Collection[str] = ()) -> str:
    """The YAML text that `load_config` reads back as the same options.

    Args:
        config: resolved options.
        comments: write each group's name, and each option's meaning and allowed values.
        to_fill_in: names of options to leave without a value, for the user to write one.
    """
    values = flat(config, "json")
    lines: list[str] = []
    for group, fields in fields_by_group(type(config)).items():
        if comments:
            lines += ["", f"# {group}"] if lines else [f"# {group}"]
        for name, field in fields.items():
            value = None if name in to_fill_in else values[name]
            if comments:
                lines += ["", f"# {field.description} {allowed_values(field)}"]
            lines.append(_yaml_line(yaml_key(name), value))
    return "\n".join(lines) + "\n"


def allowed_values(field: FieldInfo) -> str:
    """What an option takes, in words."""
    kinds = " or ".join(_describe_type(kind) for kind in alternatives(field))
    bounds = [text.format(bound) for kind, text in _BOUNDS.items() for bound in bounds_of(field, kind)]
    sentence = ", ".join([kinds, *bounds]) + "."
    return sentence[0].upper() + sentence[1:]


def alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """The types an option takes, None aside and Annotated taken off."""
    bare = (get_args(member)[0] if get_origin(member) is Annotated else member for member in _members(field))
    return tuple(member for member in bare if member is not type(None))


def _members(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a `Literal` or an enumeration; none of another type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def nearest(name: str, known: Mapping[str, str]) -> str:
    """The value of the key of `known` that is most like `name`."""
    wanted = name.strip("-").lower().replace("_", "-")
    return known[max(known, key=lambda key: difflib.SequenceMatcher(None, wanted, key).ratio())]


def known_names(verb: type[Verb]) -> dict[str, str]:
    """Every name of an option, here and in other tools, to the YAML key."""
    return {
        yaml_key(alias): yaml_key(name) for name, field in fields_of(verb).items() for alias in (*_aliases(field), name)
    }


def _aliases(field: FieldInfo) -> list[str]:
    return cast(dict[str, list[str]], field.json_schema_extra)["aliases"]


_BOUNDS: dict[str, str] = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def bounds_of(field: FieldInfo, kind: str) -> Iterable[Any]:
    """Of the option, or of a number that it may be."""
    annotated = [get_args(member) for member in _members(field) if get_origin(member) is Annotated]
    details = [detail for number, *details in annotated if number in (int, float) for detail in details]
    constraints = (each for detail in details for each in detail.metadata)
    return (getattr(each, kind) for each in (*field.metadata, *constraints) if hasattr(each, kind))


def _describe_type(kind: Any) -> str:
    if choices := choices_of(kind):
        listed = ", ".join(map(str, choices))
        return f"one of {listed}" if len(choices) > 1 else listed
    if get_args(kind)[:1] == (float,):
        return "numbers"
    if get_origin(kind) is tuple:
        return (
            "a name or a list of names" if get_origin(get_args(kind)[0]) is not Literal else f"some of {_choices(kind)}"
        )
    if get_origin(kind) is dict:
        number = get_args(get_args(kind)[1])[0]
        return f"regular expressions, each with {_describe_type(number)}, such as q_proj=8,layers.0.*=4"
    names = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    return {**names, Size: "a size such as 8GB, 8GiB or 1.5G"}[kind]


def _choices(names: Any) -> str:
    """Of a `tuple[Literal[...], ...]`."""
    return ", ".join(get_args(get_args(names)[0]))


def named_values(verb: type[Verb], values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`values` under the options' Python names."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields_of(verb):
            raise _unknown_option(verb, str(key), origin)
        if name in named:
            raise ConfigError(f"{_place(origin)}{key} is given twice.", "Each option is given once.", "Remove one.")
        named[name] = value
    return named


def _unknown_option(verb: type[Verb], name: str, origin: str) -> ConfigError:
    known = known_names(verb)
    return ConfigError(
        f"{_place(origin)}There is no option {name!r}. Did you mean {nearest(name, known)!r}?",
        f"Options: {', '.join(dict.fromkeys(known.values()))}.",
        "`nybble train --print-config` explains each.",
    )


def _missing_option(verb: type[Verb], name: str) -> ConfigError:
    key, field = yaml_key(name), fields_of(verb)[name]
    return ConfigError(f"{key} is not given.", f"{key}: {field.description}", f"Add --{key} {key.upper()}.")


def _bad_value(verb: type[Verb], name: str, value: Any, origin: str) -> ConfigError:
    key, field = yaml_key(name), fields_of(verb)[name]
    default = "" if field.is_required() or field.default is None else f" Leave it out to get {field.default}."
    return ConfigError(
        f"{_place(origin)}{key} is {_shortened.repr(value)}.",
        f"Allowed: {allowed_values(field)}",
        f"{field.description}{default}",
    )


# An alias in YAML stands for a whole subtree, so that a small file can hold a value that is too long to print.
_shortened = reprlib.Repr()
_shortened.maxlevel, _shortened.maxstring, _shortened.maxother = 3, 200, 200


def _place(origin: str) -> str:
    return f"{origin}: " if origin else ""


def _yaml_line(key: str, value: Any) -> str:
    if value is None:
        return f"{key}:"
    text: str = yaml.safe_dump(
        {key: value}, default_flow_style=False, sort_keys=False
    )  # ASCII: YAML folds some of Unicode away
    return text.rstrip("\n")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML's own would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    fix = "`nybble train --print-config` prints a file to start from."
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ValueError(f"it is larger than {MAX_YAML_BYTES} bytes")
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", "A YAML file that can be read.", fix) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers and dates of YAML raise ValueError
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {detail}.", "A YAML file in UTF-8.", fix) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not options.", "Lines such as `rank: 16`.", fix)
    return content
