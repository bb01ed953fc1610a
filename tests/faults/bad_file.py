"""What a case of the corpus is: a bad file, built in code, with the words that its message must have."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Build = Callable[[Path, Path], list[str]]  # (a fresh folder, the good model's folder) -> arguments of `nybble`
GOOD = b'{"prompt": "What is %d?", "completion": "It is %d."}\n'
GOOD_ROWS = b"".join(GOOD % (n, n) for n in range(30))
MEGABYTES_2 = 2_000_000  # more than a row may have


@dataclass(frozen=True)
class BadFile:
    """Args:
    says: what the message must contain, file and place first.
    """

    name: str
    build: Build
    says: tuple[str, ...]
