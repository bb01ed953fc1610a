"""Copies between a GPU and its host, in the order that events give them, on a card that takes every liberty it has.

Each use of a lane is tried with copies as late as events allow, with kernels as late, and with both; and once more with
one kind of wait forgotten, which must not go unnoticed.
"""

from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
from late_lane import Late, LateLane
from tiny import make_four_bit_model
from torch import Tensor

from nybble.memory import lane as lanes
from nybble.memory import offload, pager
from nybble.memory.lane import lane_to
from nybble.memory.offload import PinnedActivations
from nybble.memory.pager import PagedState
from nybble.memory.store import FolderBlockStore, open_store
from nybble.sizes import SHAPE_RULES
from nybble.sources.open import open_model

LATE: tuple[Late, ...] = ("copies", "kernels", "both")

# ---- the optimizer's state -----------------------------------------------------------------------

SHAPES = [(3, 7), (1, 1), (64, 33), (5,), (2, 2), (9,), (4, 4), (31,)]
PAGE_BYTES = [1, 300, pager.PAGE_BYTES]  # a page each, some share one, all share one


def paged(folder: Path, lane: LateLane) -> PagedState:
    return PagedState([{"moment": (torch.float32, shape)} for shape in SHAPES], folder, lane=lane)


def add_one(state: PagedState, lane: LateLane) -> None:
    for number, moments in enumerate(state):
        lane.compute(lambda moment=moments["moment"], number=number: moment.add_(number + 1))


def read(state: PagedState, lane: LateLane, found: list[Tensor]) -> None:
    """What each moment is; copies of the card's own, as those that go back into its memory."""
    for moments in state.reading():
        lane.compute(lambda moment=moments["moment"]: found.append(moment.clone()))


def check_pages(folder: Path, lane: LateLane) -> None:
    state = paged(folder, lane)
    for _ in range(3):
        add_one(state, lane)
    found: list[Tensor] = []
    for _ in range(2):  # the second pass begins while the first is still computed with
        read(state, lane, found)
    lane.finish()
    assert len(found) == 2 * len(SHAPES)
    for number, moment in enumerate(found):
        assert (moment == 3 * (number % len(SHAPES) + 1)).all(), number


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("late", LATE)
def test_state_is_updated_once_it_is_there_and_written_once_it_is_updated(tmp_path, monkeypatch, late, page_bytes):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)
    check_pages(tmp_path, LateLane(late))


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("late", LATE)
def test_a_pass_that_broke_off_is_computed_before_the_next_begins(tmp_path, monkeypatch, late, page_bytes):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)
    lane = LateLane(late)
    state = paged(tmp_path, lane)
    add_one(state, lane)
    found: list[Tensor] = []
    broken_off = state.reading()
    for _ in range(len(SHAPES) // 2):
        moments = next(broken_off)
        lane.compute(lambda moment=moments["moment"]: found.append(moment.clone()))
    broken_off.close()
    read(state, lane, [])
    lane.finish()
    assert all((moment == number + 1).all() for number, moment in enumerate(found))


# ---- blocks of the base --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    make_four_bit_model(path)
    return path


@pytest.fixture
def three_buffers(monkeypatch) -> None:
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], block_buffers=3))


def check_blocks(folder: Path, lane: LateLane, resident: int = 0, in_ram: bool = False) -> None:
    source = open_model(str(folder))
    store = open_store(source, resident, in_ram=in_ram, lane=lane)
    found: list[tuple[str, Tensor, Tensor]] = []

    def use(name: str) -> None:
        q = store.fetch(name)
        lane.compute(lambda: found.append((name, q.packed.clone(), q.scales.clone())))

    for _ in range(3):
        store.begin(will_return=True)
        for name in (*store.names, *reversed(store.names)):
            use(name)
    lane.finish()
    assert len(found) == 6 * len(source.linears)
    for name, packed, scales in found:
        stored = source.read(f"{name}.weight")
        assert torch.equal(packed, stored.packed) and torch.equal(scales, stored.scales), name


@pytest.mark.parametrize("in_ram", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 3, 4])
@pytest.mark.parametrize("late", LATE)
def test_blocks_are_computed_with_once_they_are_there(folder, three_buffers, late, resident, in_ram):
    check_blocks(folder, LateLane(late), resident, in_ram)


@pytest.mark.parametrize("in_ram", [False, True])
def test_two_blocks_are_on_their_way_while_one_is_computed_with(folder, three_buffers, in_ram):
    lane = LateLane("copies")
    store = open_store(open_model(str(folder)), 0, in_ram=in_ram, lane=lane)
    first_of = [next(name for name in store.names if f".{block}." in name) for block in range(4)]
    store.begin(will_return=True)
    coming = []
    for block in (0, 1, 2, 3, 2, 1, 0):
        store.fetch(first_of[block])
        coming.append(sorted(asked_for(store)))
        if len(coming) == 1 and in_ram:  # those from the disk wait for their staging
            assert (lane.copies.done, lane.copies.asked) == (1, 3)
    assert coming == [[0, 1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


def asked_for(store: FolderBlockStore) -> list[int]:
    for _, coming in store._coming.values():
        coming.result()
    return list(store._coming)


# ---- what blocks keep ----------------------------------------------------------------------------

BLOCKS = 5
KEPT = [((4, 6), torch.float32), ((3, 6), torch.bfloat16), ((7,), torch.float32)]  # by each block
BLOCK_BYTES = 96 + 36 + 28


def keep(kept: PinnedActivations, lane: LateLane, first: int) -> list[tuple[int, object]]:
    """A forward pass that lets go of what it keeps: numbers from `first` on, and where they went."""
    kept.begin()
    places: list[tuple[int, object]] = []
    for _ in range(BLOCKS):
        kept.next_block()
        for shape, dtype in KEPT:
            number = first + len(places)
            tensor = lane.device_memory(prod(shape) * dtype.itemsize).view(dtype).view(shape)
            lane.compute(partial(tensor.fill_, number))
            places.append((number, kept.put(tensor.mT if number % 2 and len(shape) == 2 else tensor)))
    return places


def check_kept(lane: LateLane, num_bytes: int = 2000) -> None:
    kept = PinnedActivations(lane, num_bytes, BLOCK_BYTES)
    found: list[tuple[int, Tensor]] = []

    def take(number: int, place: object) -> None:
        tensor = kept.get(place)
        lane.compute(lambda: found.append((number, tensor.clone())))
        lane.compute(partial(tensor.fill_, -1))  # as a backward pass may

    for first in (0, 100, 200):
        places = keep(kept, lane, first)
        for block in reversed(range(0 if first != 100 else 3, BLOCKS)):  # the second breaks off
            for number, place in places[block * len(KEPT) :][: len(KEPT)]:
                take(number, place)
        places.clear()  # as the graph that held them goes
    lane.finish()
    assert len(found) == len(KEPT) * (BLOCKS + 2 + BLOCKS)
    for number, tensor in found:
        shape, dtype = KEPT[number % 100 % len(KEPT)]
        assert tensor.dtype == dtype and sorted(tensor.shape) == sorted(shape)
        assert (tensor == number).all(), number


@pytest.mark.parametrize("num_bytes", [2000, 150])  # enough, and too little
@pytest.mark.parametrize("late", LATE)
def test_what_blocks_keep_comes_back(monkeypatch, late, num_bytes):
    monkeypatch.setattr(offload, "MORE_BYTES", 200)
    check_kept(LateLane(late), num_bytes)


def test_what_blocks_keep_leaves_one_block_behind_and_comes_back_one_ahead():
    lane = LateLane("copies")
    kept = PinnedActivations(lane, 2000, BLOCK_BYTES)
    places = keep(kept, lane, 0)
    per_block = len(KEPT)
    assert lane.copies.done == (BLOCKS - 1) * per_block == lane.copies.asked - per_block
    for block in reversed(range(BLOCKS)):
        for number, place in places[block * per_block :][:per_block]:
            assert (kept.get(place) == number).all()
        on_the_device = {number for number, place in places if place.here is not None}
        assert on_the_device == set(range(max(0, block - 1) * per_block, block * per_block))
        assert lane.copies.asked == (BLOCKS + (BLOCKS - 1) - max(0, block - 1)) * per_block
    assert len(kept._pieces) == 1 and kept._bytes_here == 0


def test_what_is_asked_for_twice_or_was_never_a_gpus_comes_back_as_well():
    lane = LateLane("copies")
    kept = PinnedActivations(lane, 2000, BLOCK_BYTES)
    for number, place in keep(kept, lane, 0):  # the first first
        for _ in range(2):
            assert (kept.get(place) == number).all()
    elsewhere = torch.empty(3, device="meta")
    assert kept.get(kept.put(elsewhere)).device == elsewhere.device


# ---- what is forgotten ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "late", "forget"),
    [
        *((use, late, "wait") for use in ("pages", "blocks", "kept") for late in ("copies", "both")),
        *((use, "kernels", "after") for use in ("pages", "blocks", "kept")),
        *((use, "both", "staging") for use in ("pages", "blocks")),  # what is kept goes through none
    ],
)
def test_what_is_forgotten_is_missed(folder, three_buffers, tmp_path, monkeypatch, use, late, forget):
    monkeypatch.setattr(pager, "PAGE_BYTES", 1)
    lane = LateLane(late, forget)
    check = {"pages": partial(check_pages, tmp_path), "blocks": partial(check_blocks, folder), "kept": check_kept}[use]
    with pytest.raises(AssertionError):
        check(lane)


# ---- memory that CUDA pins -----------------------------------------------------------------------


class FakeCudart:
    def __init__(self, error: int):
        self.error, self.registered = error, {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            self.registered[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_memory_is_pinned_in_its_own_size_for_as_long_as_it_lives(monkeypatch):
    cudart = FakeCudart(error=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    view = lanes._pinned(5000)[10:20].fill_(7)
    assert list(cudart.registered.values()) == [5000] and (view == 7).all()
    del view
    assert not cudart.registered


def test_memory_that_cuda_does_not_pin_is_pytorchs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudart(error=2))
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: asked.append((shape, options)))
    with pytest.warns(UserWarning, match=r"pins no 0\.00 GB in place \(error 2\)"):
        lanes._pinned(5000)
    assert asked == [((5000,), {"dtype": torch.uint8, "pin_memory": True})]


# ---- on a card -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_what_a_gpus_blocks_keep_comes_back_whatever_is_computed_meanwhile():
    """Memory of a tensor is handed out anew, and written, as soon as it may be."""
    kept, busy = PinnedActivations(lane_to(torch.device("cuda")), 20 * 2**22, 2**22), torch.randn(4096, 4096).cuda()
    for _ in range(3):
        kept.begin()
        places = []
        for number in range(20):
            tensor = torch.full((1024, 1024), -1.0, device="cuda")
            for _ in range(5):
                busy = busy @ busy / 64
            tensor.copy_(busy[:1024, :1024] * 0 + number)
            places.append(kept.put(tensor.T if number % 2 else tensor))
            del tensor
        for number, place in reversed(list(enumerate(places))):
            back = kept.get(place)
            assert (back == number).all()
            back.fill_(-2)
