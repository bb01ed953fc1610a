"""jit/rope.py."""

from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends.triton.launch import launch_tiles


@registry.register("rope_", "triton")
def rope_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, backward: bool) -> None:
    from nybble.kernels.backends.triton.jit.rope import rope_kernel

    tokens, heads, head_dim = x.shape
    launch_tiles(
        rope_kernel,
        tokens * heads,
        cos.shape[1],
        x,
        cos,
        sin,
        heads,
        head_dim,
        x.stride(0),
        NEIGHBOURS=neighbours,
        BACKWARD=backward,
    )
