"""Entities in tags of single tokens: where each begins and ends, and what it is.

Tags are O, or a letter and a kind: B-X begins an entity of the kind X, I-X goes on with it, E-X ends it, S-X is one by
itself (L and U are other names of E and S). Read as conlleval reads them (Tjong Kim Sang and De Meulder 2003), and with
it the seqeval package: what goes on with no entity of its kind begins one.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

OUTSIDE = "O"
BEGINS, GOES_ON, ENDS, ALONE = "B", "I", "EL", "SU"


class Entity(NamedTuple):
    """Tokens `first` to `last`, both included, of one kind."""

    kind: str
    first: int
    last: int


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities that tags say, in their order."""
    found: list[Entity] = []
    before = OUTSIDE
    for place, tag in enumerate(tags):
        letter, kind = _parts(tag)
        if letter != OUTSIDE:
            first = found[-1].first if _continues(before, tag) else place
            if first != place:
                found.pop()
            found.append(Entity(kind, first, place))
        before = tag
    return found


def stray_places(tags: Sequence[str]) -> Iterator[int]:
    """Where a tag goes on with an entity, or ends one, that no tag before it has begun."""
    for place, tag in enumerate(tags):
        before = tags[place - 1] if place else OUTSIDE
        if _parts(tag)[0] in GOES_ON + ENDS and not _continues(before, tag):
            yield place


def _continues(before: str, tag: str) -> bool:
    """Whether a tag goes on with the entity of the tag before it."""
    (left, kind_before), (letter, kind) = _parts(before), _parts(tag)
    return left in BEGINS + GOES_ON and letter in GOES_ON + ENDS and kind == kind_before


def _parts(tag: str) -> tuple[str, str]:
    """The letter and the kind of a tag."""
    letter, _, kind = tag.partition("-")
    return letter, kind


def is_entity_tag(tag: Any) -> bool:
    """Whether a tag is O, or of the form B-X."""
    letter, mark, kind = str(tag).partition("-")
    known = len(letter) == 1 and letter in BEGINS + GOES_ON + ENDS + ALONE
    return tag == OUTSIDE or bool(known and mark and kind)


def mean_entities(tags: Iterable[Any]) -> bool:
    """Whether a set of tags is meant to say where entities are: some begin one."""
    return any(isinstance(tag, str) and tag.startswith((f"{BEGINS}-", f"{GOES_ON}-")) for tag in tags)


def say_entities(tags: Collection[Any]) -> bool:
    """Whether all of a set of tags say where entities are."""
    return mean_entities(tags) and all(map(is_entity_tag, tags))
