"""How users name modules: by the ends of dotted names, and by patterns."""

import re
from fnmatch import fnmatchcase

PATTERN_SIGNS = set("*?[]()|^$+\\{}")


def matches(layer: str, wanted: str) -> bool:
    """Whether a name is the one wanted, or ends in it after a dot, or fits it as a wildcard or regular expression."""
    if layer == wanted or layer.endswith("." + wanted):
        return True
    if not PATTERN_SIGNS & set(wanted):
        return False
    wildcard = fnmatchcase(layer, wanted) or fnmatchcase(layer, f"*.{wanted}")
    return wildcard or (_is_expression(wanted) and re.fullmatch(wanted, layer) is not None)


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
