"""MXFP4 against transformers' own dequantisation of gpt-oss, and by hand."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nybble.errors import FormatError
from nybble.formats import mxfp4


def experts(num: int = 3, rows: int = 5, groups: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (num, rows, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(100, 140, (num, rows, groups), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_of_gpt_oss_are_those_of_transformers(dtype: torch.dtype) -> None:
    blocks, scales = experts()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(mxfp4.dequantize(blocks, scales, dtype), theirs)
    one = mxfp4.dequantize(blocks[1], scales[1], dtype)  # an expert at a time, or some of its rows
    assert torch.equal(one, theirs[1]) and torch.equal(mxfp4.dequantize(blocks[1, 2:], scales[1, 2:], dtype), one[2:])


def test_every_code_and_the_ends_of_the_scales() -> None:
    packed = torch.tensor([[low | (low + 1) << 4 for low in range(0, 16, 2)] * 2] * 3, dtype=torch.uint8)
    values = mxfp4.dequantize(packed, torch.tensor([[0], [127], [254]], dtype=torch.uint8)).double()
    levels = torch.tensor([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)] * 2, dtype=torch.float64)
    assert torch.equal(values[:2], levels * torch.tensor([[2.0**-127], [1.0]], dtype=torch.float64))
    assert torch.equal(values[2, :4], levels[:4] * 2.0**127)  # 4 * 2 ** 127 is beyond fp32


def test_what_does_not_belong_together_is_refused() -> None:
    blocks, scales = experts()
    for wrong in (blocks[..., :8], blocks[:, :4], blocks[0]):
        with pytest.raises(FormatError, match=r"A scale belongs to 16 bytes"):
            mxfp4.dequantize(wrong, scales)
    with pytest.raises(FormatError, match="uint8"):
        mxfp4.dequantize(blocks.float(), scales)
    scales[1, 2, 3] = 255
    with pytest.raises(FormatError, match="no number"):
        mxfp4.dequantize(blocks, scales)
