"""Seeded orders of rows that no library's version changes."""

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def permutation(num_rows: int, seed: int, label: str) -> np.ndarray:
    """int64: the numbers 0..num_rows-1 in an order fixed by (seed, label) on every platform.

    They are sorted by a keyed hash, not by a library's random generator, so that a run resumed on another machine or
    another version of Python, numpy or torch draws the same rows.
    """
    key = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    ranks = bytearray()
    for row in range(num_rows):
        ranks += hashlib.blake2b(row.to_bytes(8, "little"), key=key, digest_size=16).digest()
    high, low = np.frombuffer(ranks, dtype=">u8").reshape(num_rows, 2).T
    order = np.lexsort((low, high))
    order.flags.writeable = False  # it is shared
    return order
