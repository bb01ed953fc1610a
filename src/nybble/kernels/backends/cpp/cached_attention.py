"""Of many texts, PyTorch's own attention; of few, csrc/decode.cpp has its own."""

from nybble.kernels import registry
from nybble.kernels.backends.reference.cached_attention import cached_attention

registry.register("cached_attention", "cpp", waits=True)(cached_attention)
