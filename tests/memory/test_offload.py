"""Tensors that go to a file come back the same, block by block in reverse; a disk that fails says so."""

import pytest
import torch

from nybble.errors import PlanError
from nybble.memory.offload import ActivationFile

TENSORS = [torch.randn(3, 5), torch.randn(4, 1).bfloat16(), torch.arange(7), torch.randn(6, 4).T, torch.empty(0)]


def fill(file: ActivationFile, blocks: int = 4) -> list[list[tuple[object, torch.Tensor]]]:
    file.begin()
    kept = []
    for block in range(blocks):
        file.next_block()
        kept.append([(file.put(tensor + block), tensor + block) for tensor in TENSORS[: 1 + block]])
    return kept


def test_tensors_come_back(tmp_path):
    file = ActivationFile(tmp_path, 10)
    for _ in range(2):
        for block in reversed(fill(file)):
            for place, tensor in block:
                back = file.get(place)
                assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    assert not any(tmp_path.iterdir())


def test_a_backward_pass_that_broke_off_leaves_nothing_behind(tmp_path):
    """As after a failed allocation: what was read ahead belongs to the micro-batch before."""
    file = ActivationFile(tmp_path, 10)
    file.get(fill(file)[-1][0][0])
    file.begin()
    file.next_block()
    places = [file.put(torch.full_like(TENSORS[0], 7.0)) for _ in range(3)]
    assert all((file.get(place) == 7).all() for place in places)


def test_the_block_before_is_on_its_way_while_one_is_computed(tmp_path):
    file = ActivationFile(tmp_path, 10)
    kept = fill(file)
    for place, _ in kept[3]:
        file.get(place)
    shorten_all(file)  # what is already there is not read again
    assert [file.get(place).equal(tensor) for place, tensor in kept[2]] == [True] * 3


def shorten_all(file: ActivationFile) -> None:
    for coming in file._coming.values():
        coming.result()
    file._file._file.truncate(0)


def test_a_full_disk_says_what_to_do(tmp_path, disk):
    with (
        disk.largest_file(10_000),
        pytest.raises(PlanError, match=r"0\.01 GB.*too large.*\n.*--offload-activations never"),
    ):
        ActivationFile(tmp_path, 5_000_000)


@pytest.mark.parametrize(("fault", "words"), [("fail", "Input/output"), ("shorten", "shortened"), ("fill", "No space")])
def test_a_disk_that_fails_is_an_error(tmp_path, disk, fault, words):
    file = ActivationFile(tmp_path, 10)
    kept = fill(file)
    getattr(disk, fault)(file._file._file.fileno())
    with pytest.raises(OSError, match=f"What blocks keep.*{words}"):
        if fault == "fill":
            fill(file)
        for block in reversed(kept):
            for place, _ in block:
                file.get(place)
