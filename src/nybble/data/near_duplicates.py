"""Texts that say nearly the same: Jaccard similarity of their word 5-grams, found by MinHash.

Broder 1997, "On the resemblance and containment of documents". The library rensa hashes and finds candidates; each
candidate's similarity is then computed exactly, so that nothing is reported by chance.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from rensa import RMinHash, RMinHashLSH

NEAR_SIMILARITY = 0.8
WORDS = 5
NUM_HASHES, NUM_BANDS = 128, 32  # a pair of similarity 0.8 is missed once in ten million, one of 0.5 is compared often
_WORD = re.compile(r"\w+")


def near_duplicates(texts: Iterable[str], others: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) in which texts[i] and others[j] are similar, each j once, with the first i that is.

    Args:
        others: the fewer of the two; their hashes stay in memory.
    """
    left = {j: words for j, text in enumerate(others) if (words := _shingles(text))}
    index = RMinHashLSH(threshold=NEAR_SIMILARITY, num_perm=NUM_HASHES, num_bands=NUM_BANDS)
    for j, words in left.items():
        index.insert(j, _hashed(words))
    for i, text in enumerate(texts):
        if not left:
            return
        words = _shingles(text)
        for j in sorted(index.query(_hashed(words))) if words else ():
            if j in left and len(words & left[j]) >= NEAR_SIMILARITY * len(words | left[j]):
                del left[j]
                yield i, j


def _shingles(text: str) -> set[str]:
    """Runs of `WORDS` words, case and punctuation aside; a shorter text is one run."""
    words = _WORD.findall(text.casefold())
    return {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))} if words else set()


def _hashed(words: set[str]) -> RMinHash:
    minhash = RMinHash(num_perm=NUM_HASHES, seed=0)
    minhash.update(words)
    return minhash
