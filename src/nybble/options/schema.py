"""The JSON schema of a verb's YAML file (https://json-schema.org/draft/2020-12), for editors.

Made of the options as they are declared; a key without a value is not given, so null is allowed everywhere.
"""

from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from nybble.options.option import (
    MIN_BYTES,
    Interval,
    Size,
    Verb,
    alternatives,
    bounds_of,
    choices_of,
    fields_by_group,
    yaml_key,
)

TYPES = {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean"}
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
ALSO_NUMBERS = get_args(Interval)[1:]  # text that YAML may hold as a number


def json_schema(verb: type[Verb], title: str) -> dict[str, Any]:
    """What a YAML file of the verb may hold."""
    properties = {
        yaml_key(name): _property(field, heading)
        for heading, fields in fields_by_group(verb).items()
        for name, field in fields.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _property(field: FieldInfo, heading: str) -> dict[str, Any]:
    values = [_value(kind, field) for kind in alternatives(field)]
    if any(each in field.metadata for each in ALSO_NUMBERS):
        values.append({"type": "integer", "minimum": 1})
    found: dict[str, Any] = {"description": f"{heading}: {field.description}", "anyOf": [*values, {"type": "null"}]}
    if not field.is_required() and isinstance(field.default, str | int | float):
        found["default"] = field.default
    return found


def _value(kind: Any, field: FieldInfo) -> dict[str, Any]:
    if choices := choices_of(kind):
        return {"enum": [getattr(choice, "value", choice) for choice in choices]}
    if kind is Size:
        return {"type": ["integer", "string"], "minimum": MIN_BYTES}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": _item(item)}]}
    if get_origin(kind) is dict:
        return {"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": {"type": "number"}}]}
    limits: dict[str, Any] = {}
    if kind in (int, float):
        limits = {word: bound for name, word in BOUNDS.items() for bound in bounds_of(field, name)}
    return {"type": TYPES[kind], **limits}


def _item(kind: Any) -> dict[str, Any]:
    if choices := choices_of(kind):
        return {"enum": list(choices)}
    bare = get_args(kind)[0] if get_args(kind) else kind
    return {"type": TYPES[bare]}
