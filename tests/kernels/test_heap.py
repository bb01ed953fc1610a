"""What is freed within `kept_heap` is there again without new pages, but for pieces that are mapped by themselves."""

import resource
import sys

import pytest
import torch

from nybble.kernels.heap import WIDE, WIDE_MAPPED_FROM, kept_heap, mapped_from, trim_heap
from nybble.memory.measure import used_bytes

PIECES, PIECE = 100, 2 << 20  # bytes: in the heap, and together more than glibc keeps by itself
PAGES = PIECES * PIECE // resource.getpagesize()


def pages_of_a_step():
    """New pages while pieces are written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(PIECE, dtype=torch.uint8) for _ in range(PIECES)]
    del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_kept_heap_pages_in_once():
    with kept_heap(True):
        pages_of_a_step()
        assert pages_of_a_step() < PAGES / 10
    assert pages_of_a_step() > PAGES / 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_pieces_of_wide_models_leave_no_gaps():
    """What lies behind a freed piece keeps it in the heap, unless it had a mapping of its own."""

    def held_by_gaps(hidden_size: int) -> int:
        with kept_heap(True, mapped_from(hidden_size)):
            trim_heap()
            before = used_bytes(torch.device("cpu"))
            pieces, small = [], []
            for _ in range(20):
                pieces.append(torch.ones(WIDE_MAPPED_FROM, dtype=torch.uint8))
                small.append(torch.ones(10_000, dtype=torch.uint8))
            pieces.clear()
            return used_bytes(torch.device("cpu")) - before

    assert held_by_gaps(WIDE - 1) > 10 * WIDE_MAPPED_FROM > 10 * held_by_gaps(WIDE)
