"""What is freed within `kept_heap` is there again without new pages."""

import resource
import sys

import pytest
import torch

from nybble.kernels.heap import kept_heap

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
    with kept_heap(True, slabs=False):
        pages_of_a_step()
        assert pages_of_a_step() < PAGES / 10
    assert pages_of_a_step() > PAGES / 2
