"""The optimizer's state paged through a file: the same bits, whatever its size and whenever it moves."""

import errno
import os
import random

import pytest
import torch
from torch import nn

from nybble.errors import PlanError
from nybble.memory import pager
from nybble.memory.pager import PagedMoments
from nybble.training.optimizer import AdamW

SHAPES = [(3, 7), (1, 1), (64, 33), (5,)]  # a state of a single number is paged too


def train(tmp_path, move):
    """Parameters after 12 steps; `move(optimizer, step)` pages as it likes."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.99, weight_decay=0.1)
    for step in range(12):
        move(optimizer, step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if step == 5:
            parameters[1].grad = None  # its page is read and written all the same
        optimizer.step(1e-2, grad_scale=0.5)
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("page_bytes", [1, 200, pager.PAGE_BYTES])  # a page each, some share one, all share one
def test_paging_changes_no_bit(tmp_path, monkeypatch, page_bytes):
    monkeypatch.setattr(pager, "PAGE_BYTES", page_bytes)
    dice = random.Random(0)

    def at_random(optimizer, step):
        optimizer.page_out(tmp_path) if dice.random() < 0.5 else optimizer.page_in()

    resident = train(tmp_path, lambda optimizer, step: None)
    for move in (lambda optimizer, step: optimizer.page_out(tmp_path), at_random):
        for a, b in zip(resident, train(tmp_path, move), strict=True):
            assert torch.equal(a, b)
    assert not any(tmp_path.iterdir())  # the file has no name


def test_views_show_what_was_written(tmp_path):
    paged = PagedMoments([torch.Size(shape) for shape in SHAPES], tmp_path)
    for i, moments in enumerate(paged):
        moments.exp_avg.fill_(i + 1)
        moments.exp_avg_sq.fill_(-i)
    for i, moments in enumerate(paged.views()):
        assert moments.exp_avg.shape == SHAPES[i]
        assert (moments.exp_avg == i + 1).all() and (moments.exp_avg_sq == -i).all()


def test_a_full_disk_is_found_out_before_the_first_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match="No space left"):
        PagedMoments([torch.Size((3, 7))], tmp_path)


def test_a_disk_that_fails_stops_the_step_that_met_it(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    def move(optimizer, step):
        optimizer.page_out(tmp_path)
        if step == 3:
            monkeypatch.setattr(os, "pwrite", fails)

    with pytest.raises(OSError, match="Input/output"):
        train(tmp_path, move)
