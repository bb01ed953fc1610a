"""Tensors of slabs: their own memory while they live, used again afterwards, never more than once was in use."""

import errno
import gc
import mmap
import resource
import sys
import threading
from typing import Any

import pytest
import torch

from nybble.errors import is_out_of_memory
from nybble.kernels import slabs
from nybble.kernels.heap import trim_heap
from nybble.kernels.slabs import Slabs, copy_of, empty, empty_like, slabs_in_use
from nybble.sizes import SLABS_FROM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="slabs are used on Linux")
CPU = torch.device("cpu")
MIB = 1 << 20


def of(pool: Slabs, mebibytes: float) -> torch.Tensor:
    return pool.empty((int(mebibytes * MIB),), torch.uint8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8))
@pytest.mark.parametrize("shape", ((3, 5, 7), (1,), (1000, 1001), (0, 4)))
def test_a_tensor_is_as_torch_makes_it(shape, dtype):
    with slabs_in_use():
        made = empty(shape, dtype, CPU)
    assert (made.shape, made.dtype, made.device, made.stride()) == (shape, dtype, CPU, torch.empty(shape).stride())
    assert torch.equal(made.fill_(3), torch.full(shape, 3, dtype=dtype))
    assert torch.equal(copy_of(made), made) and empty_like(made, dtype=torch.float64).dtype == torch.float64


def test_what_lives_keeps_its_memory():
    pool = Slabs()
    held = [of(pool, 1.5).fill_(i) for i in range(4)]
    views = [tensor[100:200] for tensor in held]
    del held
    others = [of(pool, 1.5).fill_(9) for _ in range(4)]  # a view refers to all of it
    assert [view.unique().item() for view in views] == [0, 1, 2, 3] and len(others) == 4
    assert len({tensor.data_ptr() for tensor in (*views, *others)}) == 8


def test_what_is_gone_is_used_again_by_what_is_about_as_large():
    pool = Slabs()
    of(pool, 3).fill_(7)
    assert of(pool, 2.9)[0] == 7
    assert pool.num_bytes == 3 * MIB
    _small, _large = of(pool, 1), of(pool, 3.1)  # a third of it, and more than it
    assert pool.num_bytes == int(4.1 * MIB)  # and the one that nobody used is gone


def test_there_are_never_more_than_once_were_in_use():
    pool = Slabs()
    for sizes in ((4, 4), (1, 2, 3), (8,), (2, 2, 2, 2), (5, 3)):
        tensors = [of(pool, size) for size in sizes]
        assert pool.num_bytes <= 8 * MIB, sizes
        del tensors


def test_what_nobody_uses_is_returned():
    pool = Slabs()
    held, gone = of(pool, 2), of(pool, 4)
    del gone
    pool.release()
    assert pool.num_bytes == 2 * MIB
    del held


def test_pages_are_there_again():
    def pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [empty((2 * MIB + 4096,), torch.uint8, CPU).fill_(1) for _ in range(50)]
        del pieces
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with slabs_in_use():
        first, second = pages(), pages()
        trim_heap()
        third = pages()
    assert second < first / 4 and second < third / 4, (first, second, third)


def test_only_what_is_large_and_only_within_the_block():
    with slabs_in_use():
        pool = slabs._slabs
        assert pool is not None
        _small = empty((SLABS_FROM - 1,), torch.uint8, CPU)
        assert pool.num_bytes == 0
        large = empty((SLABS_FROM,), torch.uint8, CPU)
        assert pool.num_bytes == SLABS_FROM
        assert empty((SLABS_FROM,), torch.uint8, torch.device("meta")).device.type == "meta"
        with slabs_in_use():
            assert slabs._slabs is not pool
        assert slabs._slabs is pool
    large.fill_(1)  # lives on
    _later = empty((SLABS_FROM,), torch.uint8, CPU)
    assert slabs._slabs is None and pool.num_bytes == SLABS_FROM


def test_a_system_without_memory_is_said_to_have_none(monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    pool = Slabs()
    held = of(pool, 1)
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", full)
        with pytest.raises(MemoryError, match="2097152 bytes could not be mapped: Cannot allocate") as raised:
            of(pool, 2)
    assert is_out_of_memory(raised.value)
    assert of(pool, 2).fill_(1).sum() == 2 * MIB and held.numel() == MIB == pool.num_bytes - 2 * MIB


def test_threads_share_them():
    pool, wrong = Slabs(), []

    def work(number: int) -> None:
        for _ in range(200):
            tensors = [of(pool, 0.3).fill_(number) for _ in range(3)]
            wrong.extend(tensor for tensor in tensors if not bool((tensor == number).all()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    pool.release()
    assert pool.num_bytes == 0
