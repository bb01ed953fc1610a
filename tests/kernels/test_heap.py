"""What is freed within `kept_heap` is there again without new pages, but for pieces that are mapped by themselves."""

import resource
import subprocess
import sys

import pytest
import torch

from nybble.kernels.heap import kept_heap
from nybble.sizes import WIDE, WIDE_MAPPED_FROM, mapped_from

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


GAPS = """
import sys, torch
from nybble.kernels.heap import kept_heap
from nybble.memory.measure import used_bytes
pieces, small, piece, cpu = [], [], int(sys.argv[1]), torch.device("cpu")
with kept_heap(True, int(sys.argv[2])):
    before = used_bytes(cpu)
    for _ in range(20):
        pieces.append(torch.ones(piece, dtype=torch.uint8))
        small.append(torch.ones(10_000, dtype=torch.uint8))
    pieces.clear()
    print(used_bytes(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_pieces_of_wide_models_leave_no_gaps():
    """What lies behind a freed piece keeps it in the heap, unless it had a mapping of its own. Each in a process of its
    own: a heap that has gaps already fills those first.
    """

    def gaps(hidden_size: int) -> int:
        command = [sys.executable, "-c", GAPS, str(WIDE_MAPPED_FROM), str(mapped_from("blocks", hidden_size))]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert gaps(WIDE - 1) > 10 * WIDE_MAPPED_FROM > 10 * gaps(WIDE)
