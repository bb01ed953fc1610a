"""csrc/rope.cpp."""

from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.cpp.library import DTYPES, INT, INT64, POINTER, function, no_fp16, pointer, sizes

_rope = function("rope", POINTER, INT, INT64, INT64, INT64, INT64, POINTER, POINTER, INT64, INT, INT)


@registry.register("rope_", "cpp", unsupported=no_fp16)
def rope_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, backward: bool) -> None:
    tokens, heads, head_dim = sizes(x)
    _rope(
        pointer(x), DTYPES[x.dtype], tokens, x.stride(0), heads, head_dim, pointer(cos), pointer(sin), cos.shape[-1],
        neighbours, backward,
    )  # fmt: skip
