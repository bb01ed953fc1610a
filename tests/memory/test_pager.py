"""The optimizer's state paged through a file: the same bits, whatever its size and whenever it moves."""

import pytest
import torch
from torch import nn

from nybble.errors import PlanError
from nybble.memory import pager
from nybble.memory.pager import PagedState
from nybble.training.optimizer import AdamW, moments_layout

SHAPES = [(3, 7), (1, 1), (64, 33), (5,)]  # a state of a single number is paged too


def train(move, bits=32, device="cpu", paged_in=None):
    """Parameters after 12 steps; `move(optimizer, step)` pages as it likes."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.99, weight_decay=0.1, bits=bits, paged_in=paged_in)
    for step in range(12):
        move(optimizer, step)
        for parameter in parameters:
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step(1e-2, grad_scale=0.5)
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("page_bytes", [1, 5000, pager.PAGE_BYTES])  # a page each, some share one, all share one
def test_paging_changes_no_bit(tmp_path, monkeypatch, page_bytes, bits):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)

    def in_between(optimizer, step):
        if step == 7:
            optimizer.page_out(tmp_path)

    resident = train(lambda optimizer, step: None, bits)
    for move in (lambda optimizer, step: optimizer.page_out(tmp_path), in_between):
        for a, b in zip(resident, train(move, bits), strict=True):
            assert torch.equal(a, b)
    from_the_start = train(lambda optimizer, step: None, bits, paged_in=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(resident, from_the_start, strict=True))
    assert not any(tmp_path.iterdir())  # the file has no name


def test_moments_paged_from_the_start_are_never_made_in_memory(tmp_path, monkeypatch):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    monkeypatch.setattr(AdamW, "_zeros", lambda self, layout: pytest.fail("made in memory"))
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.99, weight_decay=0.1, paged_in=tmp_path)
    assert optimizer.paged


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("page_bytes", [1, 5000, pager.PAGE_BYTES])
def test_paging_a_gpus_state_changes_no_bit(tmp_path, monkeypatch, page_bytes, bits):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)
    resident = train(lambda optimizer, step: None, bits, "cuda")
    paged = train(lambda optimizer, step: optimizer.page_out(tmp_path), bits, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(resident, paged, strict=True))


@pytest.mark.parametrize("page_bytes", [1, 300, pager.PAGE_BYTES])
def test_what_was_written_is_read_without_being_written_back(tmp_path, monkeypatch, page_bytes):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)
    paged = PagedState([moments_layout(shape, 8) for shape in SHAPES], tmp_path)
    for i, state in enumerate(paged):
        assert all((tensor == 0).all() for tensor in state.values())
        for j, tensor in enumerate(state.values()):
            tensor.fill_(10 * i + j)
    for _ in range(2):
        for i, state in enumerate(paged.reading()):
            assert state["exp_avg"].shape == SHAPES[i] and state["exp_avg_absmax"].dtype == torch.float32
            for j, tensor in enumerate(state.values()):
                assert (tensor == 10 * i + j).all()
                tensor.fill_(-1 if tensor.is_floating_point() else 255)


def test_a_full_disk_is_found_out_before_the_first_step(tmp_path, disk):
    with disk.largest_file(10_000), pytest.raises(PlanError, match=r"File too large.*\n.*--page-optimizer never"):
        PagedState([moments_layout((300, 7), 32)], tmp_path)
    with pytest.raises(PlanError, match=r"The optimizer's state, 0\.00 GB.*No such file"):
        PagedState([moments_layout((3, 7), 32)], tmp_path / "absent")


@pytest.mark.parametrize("page_bytes", [1, 300, pager.PAGE_BYTES])
@pytest.mark.parametrize(
    ("fault", "words"), [("fail", "Input/output error"), ("shorten", "has been shortened"), ("fill", "No space left")]
)
def test_a_disk_that_fails_stops_the_step_that_met_it(tmp_path, disk, monkeypatch, page_bytes, fault, words):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)

    def move(optimizer, step):
        assert step < 4, "the step before met nothing"
        optimizer.page_out(tmp_path)
        if step == 3:
            getattr(disk, fault)(optimizer._state._file._file.fileno())

    with pytest.raises(OSError, match=f"optimizer's state.*{words}"):
        train(move)
