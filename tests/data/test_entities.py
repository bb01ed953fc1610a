"""Entities in tags, as the seqeval package (1.2.2, `get_entities`) reads them."""

import pytest

from nybble.data.entities import entities_of, is_entity_tag, mean_entities, say_entities, stray_places


@pytest.mark.parametrize(
    ("tags", "entities"),  # what seqeval gives
    [
        ("O B-X I-X O", [("X", 1, 2)]),
        ("I-X I-X O I-Y", [("X", 0, 1), ("Y", 3, 3)]),
        ("B-X B-X I-Y I-Y", [("X", 0, 0), ("X", 1, 1), ("Y", 2, 3)]),
        ("B-X I-Y", [("X", 0, 0), ("Y", 1, 1)]),
        ("S-X B-Y E-Y O", [("X", 0, 0), ("Y", 1, 2)]),
        ("E-X E-X", [("X", 0, 0), ("X", 1, 1)]),
        ("B-X E-X I-X", [("X", 0, 1), ("X", 2, 2)]),
        ("S-X I-X", [("X", 0, 0), ("X", 1, 1)]),
        ("B-X O I-X", [("X", 0, 0), ("X", 2, 2)]),
        ("O O", []),
        ("I-X E-X E-X", [("X", 0, 1), ("X", 2, 2)]),
        ("B-X I-X B-X", [("X", 0, 1), ("X", 2, 2)]),
        ("B-A-B I-A-B O", [("A-B", 0, 1)]),
    ],
)
def test_entities_are_those_of_seqeval(tags: str, entities: list[tuple[str, int, int]]) -> None:
    assert entities_of(tags.split()) == entities


def test_tags_that_go_on_with_nothing() -> None:
    assert list(stray_places(["O", "I-X", "I-X", "B-Y", "I-X", "S-X", "E-X"])) == [1, 4, 6]
    assert list(stray_places(["B-X", "I-X", "O", "B-Y", "E-Y"])) == []


def test_which_tags_mean_entities() -> None:
    assert say_entities(["O", "B-X", "I-X"]) and not say_entities(["NOUN", "VERB"]) and not mean_entities([0, 1])
    assert mean_entities(["O", "B-X", "PER"]) and not say_entities(["O", "B-X", "PER"])
    assert not any(map(is_entity_tag, ("PER", "B-", "B", "X-PER", 3)))
