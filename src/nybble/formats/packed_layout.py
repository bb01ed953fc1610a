"""What a matrix is stored as, where other programs keep it in few bits: the tensors, their types, and the way back.

A layout is plain data and functions on tensors; a file beside this one has the arithmetic of each, and
`packed_methods.py` says which one a config means. They are read and never written: a weight is widened, one at a time,
and then put into the format that is trained over.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from nybble.errors import FormatError

FLOATS = ("F32", "BF16", "F16")
FP8 = ("F8_E4M3", "F8_E5M2")
Shapes = Mapping[str, tuple[int, ...]]
Widened = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Part:
    """One of the tensors that a weight consists of.

    Args:
        dtypes: it may have, as safetensors names them.
        needed: without it the weight cannot be read.
    """

    dtypes: tuple[str, ...]
    needed: bool = True


@dataclass(frozen=True)
class PackedLayout:
    """How one kind of checkpoint keeps a matrix. Tensors are told apart by how their names end.

    Args:
        name: for sentences, such as "GPTQ, 4 bits".
        codes: end of the name of the tensor that holds the codes. One of that name and of another type is a weight
            like any other.
        parts: end of name -> part, the codes among them.
        shape: of the matrix, from those of its parts; raises FormatError where they do not fit together.
        dequantize: the matrix, fp32 or a type that holds its values exactly.
        weight: end of the parameter's name that it stands for.
        unused: ends of names of scales that belong to activations, not to weights.
        aliases: other ends that some programs give to parts -> the part.
    """

    name: str
    codes: str
    parts: Mapping[str, Part]
    shape: Callable[[Shapes], tuple[int, ...]]
    dequantize: Widened
    weight: str = ".weight"
    unused: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


def check_shape(part: str, got: tuple[int, ...], *allowed: tuple[int, ...]) -> None:
    """Refuse a part whose shape does not fit those of the others.

    Raises:
        FormatError: names the part.
    """
    if got not in allowed:
        raise FormatError(
            f"{part} has the shape {list(got)}.",
            f"The other tensors of its weight ask for {' or '.join(str(list(each)) for each in allowed)}.",
            "The checkpoint is damaged, or its config belongs to another.",
        )


def check_matrix(part: str, got: tuple[int, ...]) -> tuple[int, int]:
    """Refuse what is no matrix."""
    if len(got) != 2 or 0 in got:
        refuse_shape(part, got, "a matrix")
    return got[0], got[1]


def refuse_shape(part: str, got: tuple[int, ...], wanted: str) -> NoReturn:
    raise FormatError(f"{part} has the shape {list(got)}.", f"Needed: {wanted}.", "The checkpoint may be damaged.")


def group_count(columns: int, group_size: int) -> int:
    """Groups of a row; -1 is one group as long as the row.

    Raises:
        FormatError: the groups do not divide the row.
    """
    if group_size == -1:
        return 1
    if columns % group_size:
        raise FormatError(
            f"Rows of {columns} are not divided by groups of {group_size}.",
            "Allowed: group sizes that divide the rows.",
            "Check that config.json and the weights belong together.",
        )
    return columns // group_size


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes that fill int32 words one after another from the lowest bit, across words where they do not divide them.

    Args:
        words: int32 `[.., n]`.
        bits: of a code, 1 to 8.

    Returns:
        uint8 `[.., n * 32 // bits]`.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
    streams = words.unflatten(-1, (-1, bits)).long() & 0xFFFFFFFF  # 32 codes in as many words as a code has bits
    codes = []
    for first in range(0, 32 * bits, bits):
        word, shift = divmod(first, 32)
        code = streams[..., word] >> shift
        if shift + bits > 32:
            code = code | streams[..., word + 1] << (32 - shift)
        codes.append((code & ((1 << bits) - 1)).to(torch.uint8))
    return torch.stack(codes, dim=-1).flatten(-2)


def scale_groups(codes: Tensor, scales: Tensor, zero_points: Tensor | None, group: Tensor | None = None) -> Tensor:
    """`(code - zero point of its group) * scale of its group`, fp32.

    Args:
        codes: integers `[out, in]`.
        scales: `[out, groups]`, or `[1, 1]` for all.
        zero_points: as scales; None for zeros.
        group: of each column, int64 `[in]`; groups are of neighbours if not given.
    """
    rows, columns = codes.shape
    values = codes.float()
    if group is not None:
        if zero_points is not None:
            values -= zero_points.float()[:, group]
        return values.mul_(scales.float()[:, group])
    blocks = values.view(rows, scales.shape[1], columns // scales.shape[1])
    if zero_points is not None:
        blocks -= zero_points.float().unsqueeze(-1)
    blocks *= scales.float().unsqueeze(-1)
    return values
