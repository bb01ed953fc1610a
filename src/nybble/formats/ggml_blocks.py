"""ggml's blocks, as GGUF files hold them and llama.cpp computes with them: what their bytes stand for.

They are trained over as they are, and never made here. A block's bytes, in their order; `d` and `m` are fp16:

    q4_0    d | 16 bytes                          32 of (nibble - 8) * d
    q8_0    d | 32 int8                           32 of code * d
    iq4_nl  d | 16 bytes                          32 of NON_LINEAR[nibble] * d
    q4_k    d | m | 12 | 128 bytes                256 of nibble * (d * scale) - m * minimum
    q5_k    d | m | 12 | 32 | 128 bytes           the same with a fifth bit from the 32 bytes
    q6_k    128 | 64 bytes | 16 int8 scales | d   256 of (code - 32) * (d * scale)
    iq4_xs  d | 2 | 4 | 128 bytes                 256 of NON_LINEAR[nibble] * (d * (scale - 32))

Of a run of n bytes the low nibbles are the first n elements and the high ones the next. The twelve bytes hold six bits
of scale and six of minimum for each of eight parts. Source: https://github.com/ggml-org/ggml, ggml-common.h.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nybble.formats.format import named_format
from nybble.formats.quantized_tensor import QuantizedTensor

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
ROWS_AT_ONCE = 1 << 20  # elements


def dequantize_into(q: QuantizedTensor, out: Tensor) -> None:
    """The values of a matrix of blocks, in fp32 rounded once to the dtype of `out`, contiguous, shape `q.shape`."""
    block = named_format(q.spec.format).block
    assert block is not None, q.spec
    blocks = q.packed.view(-1, block.num_bytes)
    values = out.view(-1, block.size)
    step = max(1, ROWS_AT_ONCE // block.size)
    for first in range(0, len(blocks), step):
        values[first : first + step] = WIDENING[q.spec.format](blocks[first : first + step])


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _non_linear(_nibbles(blocks[:, 2:])) * _half(blocks, 0)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _parts_of_nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1  # (n, 8, 32)
    return _with_minima(blocks, _parts_of_nibbles(blocks[:, 48:], 32) + 16 * fifth.view(-1, 256))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _parts_of_nibbles(blocks[:, :128], 64).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low + 16 * high).view(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return (codes * scales.unsqueeze(-1)).view(-1, 256)


def _iq4_xs(blocks: Tensor) -> Tensor:
    upper = blocks[:, 2].int() | blocks[:, 3].int() << 8
    lower = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=-1).view(-1, 8)
    shifts = torch.arange(0, 16, 2, device=blocks.device)
    scales = (lower | ((upper[:, None] >> shifts) & 3) << 4).float() - 32
    codes = _non_linear(_parts_of_nibbles(blocks[:, 8:], 16)).view(-1, 8, 32)
    return (codes * (scales * _half(blocks, 0)).unsqueeze(-1)).view(-1, 256)


WIDENING: dict[str, Callable[[Tensor], Tensor]] = {  # in the order of BlockType in csrc/ggml_blocks.cpp
    "q4_0": _q4_0,
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_xs": _iq4_xs,
}


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number that begins at a byte of each block, fp32 (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(run: Tensor) -> Tensor:
    """(.., n) bytes -> (.., 2 n): low nibbles, then high ones."""
    return torch.cat([run & 15, run >> 4], dim=-1)


def _parts_of_nibbles(run: Tensor, size: int) -> Tensor:
    """The same of each part of `size` bytes, one after another."""
    return _nibbles(run.unflatten(-1, (-1, size))).flatten(-2)


def _non_linear(codes: Tensor) -> Tensor:
    return torch.tensor(NON_LINEAR, dtype=torch.float32, device=codes.device)[codes.int()]


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Codes (n, 256) times the scales of their parts, less the minima."""
    first, second, last = blocks[:, 4:16].view(-1, 3, 4).unbind(1)  # (n, 4) each
    scales = torch.cat([first & 63, (last & 15) | (first >> 6) << 4], dim=-1).float() * _half(blocks, 0)
    minima = torch.cat([second & 63, last >> 4 | (second >> 6) << 4], dim=-1).float() * _half(blocks, 2)
    parts = codes.view(-1, 8, 32).float()
    return (parts * scales.unsqueeze(-1) - minima.unsqueeze(-1)).view(-1, 256)
