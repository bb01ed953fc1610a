from torch import Tensor

from nybble.kernels import registry


@registry.register("rope_", "reference")
def rope_(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    half = cos.shape[-1]
    cos, sin = cos[:, None], -sin[:, None] if backward else sin[:, None]  # (tokens, 1, half)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = first * cos - second * sin, second * cos + first * sin  # both before either overwrites its input
    x[..., :half], x[..., half : 2 * half] = turned
