"""What the checks of several ops share. Bodies trust their arguments.

"Rows" are a tensor [tokens, width], or [tokens, heads, width] with the heads side by side, whose tokens may lie any
distance apart: a slice of a fused q/k/v or gate/up buffer is such rows.

Checks run at every call, so messages are put together only when there is something to say.
"""

import torch
from torch import Tensor

from nybble.errors import KernelError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32 = (torch.float32,)


def refusal(name: str, tensor: Tensor, allowed: str) -> KernelError:
    return KernelError(
        f"{name} is {tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}.",
        f"Allowed: {allowed}.",
    )


def _is_rows(x: Tensor) -> bool:
    sizes, strides = x.shape, x.stride()
    if x.dtype not in FLOAT_DTYPES or len(sizes) not in (2, 3):
        return False
    beside = len(sizes) == 2 or sizes[1] == 1 or strides[1] == sizes[2]  # heads side by side
    return beside and (sizes[-1] == 1 or strides[-1] == 1)


def check_rows(dim: int | None, **tensors: Tensor) -> None:
    """All are rows, of one shape, dtype and device; with `dim` dimensions where it is given."""
    like = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not _is_rows(tensor) or (dim is not None and tensor.dim() != dim):
            shapes = {2: "[tokens, width]", 3: "[tokens, heads, width]", None: "[tokens, (heads,) width]"}
            raise refusal(name, tensor, f"fp32, bf16 or fp16 rows {shapes[dim]}, contiguous within a token")
        if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
            raise refusal(name, tensor, f"{like.dtype}, shape {tuple(like.shape)}, on {like.device}")


def check_tensor(
    name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Contiguous, of that shape, one of these dtypes, on the device of `like`."""
    right = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == like.device
    if not (right and tensor.is_contiguous()):
        names = " or ".join(map(str, dtypes))
        raise refusal(name, tensor, f"{names}, contiguous, shape {tuple(shape)}, on {like.device}")


def nothing(*arguments: object) -> None:
    """The fake of an op that only writes into what it was given."""
