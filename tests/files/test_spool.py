"""A list on the disk does what a list does, and leaves nothing."""

import gc
import os

import numpy as np
import pytest

from nybble.errors import DataError
from nybble.files import spool as module
from nybble.files.spool import Chosen, Spool


@pytest.fixture(autouse=True)
def small_tail(monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 300)
    monkeypatch.setattr(module, "TAIL_BYTES", 200)  # so that most items are in the file


def test_it_reads_as_a_list(tmp_path):
    expected = [("row", number, "x" * (number * 7 % 300)) for number in range(50)]
    spool = Spool.of(expected[:30], tmp_path)
    assert [spool[number] for number in (29, 0, 17, -1)] == [expected[number] for number in (29, 0, 17, 29)]
    spool.extend(expected[30:])  # after it was read from
    assert list(spool) == expected and len(spool) == 50 and spool[3:40:7] == expected[3:40:7]
    assert spool[:0] == [] and not Spool() and list(Spool()) == []
    with pytest.raises(IndexError):
        spool[50]


def test_chosen_items_come_in_the_order_of_their_numbers(tmp_path):
    spool = Spool.of(range(20), tmp_path)
    chosen = Chosen(spool, np.array([5, 3, 19, 3]))
    assert list(chosen) == [5, 3, 19, 3] == [chosen[n] for n in range(4)]
    assert chosen[1:3] == [3, 19] and chosen[-1] == 3 and len(chosen) == 4


def test_the_file_has_no_name_and_goes_with_the_list(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    spool = Spool.of(["x" * 1000] * 10, tmp_path)
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == before + 1
    del spool
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_takes_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"do not go into a file in .*absent(?s:.*)TMPDIR"):
        Spool.of(["x" * 1000], tmp_path / "absent")
