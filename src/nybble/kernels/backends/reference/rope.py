from torch import Tensor

from nybble.kernels import registry


@registry.register("rope_", "reference")
def rope_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, backward: bool) -> None:
    half = cos.shape[-1]
    turning = x[..., : 2 * half]
    one, other = (turning[..., ::2], turning[..., 1::2]) if neighbours else turning.split(half, dim=-1)
    cos, sin = cos[:, None], -sin[:, None] if backward else sin[:, None]  # (tokens, 1, half)
    first, second = one.float(), other.float()
    turned = first * cos - second * sin, second * cos + first * sin  # both before either overwrites its input
    one.copy_(turned[0])
    other.copy_(turned[1])
