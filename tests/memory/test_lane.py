"""Copies between a GPU and its host, in the order that events give them, on a card that takes every liberty it has.

The card stands in for a GPU on the CPU: it computes nothing before somebody waits for it, and what it hands out as
fresh memory is still written by the kernels of its former owner.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nybble.formats.quant_spec import QuantSpec
from nybble.memory import pager
from nybble.memory.offload import PinnedActivations
from nybble.memory.pager import PagedState
from nybble.memory.store import open_store
from nybble.quantization.synth import synthesize
from nybble.sources.open import open_model

RUBBISH = 170


class LateCard:
    """A `Lane`; an event is how much of what was asked for comes before it."""

    def __init__(self) -> None:
        self._asked: list[Callable[[], object]] = []
        self._computed = 0

    def compute(self, kernel: Callable[[], object]) -> None:
        self._asked.append(kernel)

    def mark(self) -> int:
        return len(self._asked)

    def wait(self, event: int | None = None) -> None:
        """Compute up to the event, or all."""
        until = len(self._asked) if event is None else event
        while self._computed < until:
            self._asked[self._computed]()
            self._computed += 1

    def copy(self, source: Tensor, target: Tensor, after: int) -> None:
        self.wait(after)
        target.copy_(source)

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), RUBBISH, dtype=torch.uint8)

    def device_memory(self, num_bytes: int) -> Tensor:
        memory = torch.full((num_bytes,), RUBBISH, dtype=torch.uint8)
        self.compute(lambda: memory.fill_(RUBBISH))
        return memory


# ---- the optimizer's state -----------------------------------------------------------------------

SHAPES = [(3, 7), (1, 1), (64, 33), (5,), (2, 2), (9,), (4, 4), (31,)]


@pytest.fixture(params=[1, 300, pager.PAGE_BYTES])  # a page each, some share one, all share one
def paged(request, monkeypatch, tmp_path) -> tuple[PagedState, LateCard]:
    monkeypatch.setattr(pager, "PAGE_BYTES", request.param)
    card = LateCard()
    return PagedState([{"moment": (torch.float32, shape)} for shape in SHAPES], tmp_path, lane=card), card


def add_one(state: PagedState, card: LateCard) -> None:
    for number, moments in enumerate(state):
        card.compute(lambda moment=moments["moment"], number=number: moment.add_(number + 1))


def read(state: PagedState, card: LateCard, found: list[Tensor]) -> None:
    """What each moment is; copies of the card's own, as those that go back into its memory."""
    for moments in state.reading():
        card.compute(lambda moment=moments["moment"]: found.append(moment.clone()))


def test_state_is_read_after_what_was_computed_with_the_page_before(paged):
    state, card = paged
    for _ in range(3):
        add_one(state, card)
    found: list[Tensor] = []
    for _ in range(2):  # the second pass begins while the first is still computed with
        read(state, card, found)
    card.wait()
    assert len(found) == 2 * len(SHAPES)
    for number, moment in enumerate(found):
        assert (moment == 3 * (number % len(SHAPES) + 1)).all(), number


def test_a_pass_that_broke_off_is_computed_before_the_next_begins(paged):
    state, card = paged
    add_one(state, card)
    found: list[Tensor] = []
    broken_off = state.reading()
    for _ in range(len(SHAPES) // 2):
        moments = next(broken_off)
        card.compute(lambda moment=moments["moment"]: found.append(moment.clone()))
    broken_off.close()
    read(state, card, [])
    card.wait()
    assert all((moment == number + 1).all() for number, moment in enumerate(found))


# ---- blocks of the base --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    synthesize("tiny", QuantSpec(), path)
    return path


@pytest.mark.parametrize("in_ram", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 3, 4])
def test_blocks_are_fetched_after_what_was_computed_with_the_one_before(folder, resident, in_ram):
    source, card = open_model(str(folder)), LateCard()
    store = open_store(source, resident, in_ram=in_ram, lane=card)
    found: list[tuple[str, Tensor, Tensor]] = []

    def use(name: str) -> None:
        q = store.fetch(name)
        card.compute(lambda: found.append((name, q.packed.clone(), q.scales.clone())))

    for _ in range(3):
        store.begin(will_return=True)
        for name in (*store.names, *reversed(store.names)):
            use(name)
    card.wait()
    assert len(found) == 6 * len(source.linears)
    for name, packed, scales in found:
        stored = source.read(f"{name}.weight")
        assert torch.equal(packed, stored.packed) and torch.equal(scales, stored.scales), name


# ---- what blocks keep ----------------------------------------------------------------------------


@pytest.mark.gpu
def test_what_a_gpus_blocks_keep_comes_back_whatever_is_computed_meanwhile():
    """Both copies lie on the stream that computes, between what makes a tensor and what overwrites it."""
    kept, busy = PinnedActivations(), torch.randn(4096, 4096, device="cuda")
    places = []
    for number in range(20):
        tensor = torch.full((1024, 1024), float(number), device="cuda")
        for _ in range(5):
            busy = busy @ busy / 64
        tensor.add_(busy.flatten()[0] * 0)
        places.append(kept.put(tensor.T if number % 2 else tensor))
        tensor.fill_(-1)
    for number, place in reversed(list(enumerate(places))):
        back = kept.get(place)
        assert (back == number).all()
        back.fill_(-2)
