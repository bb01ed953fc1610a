"""Plain PyTorch, on every device: what other bodies are compared with, and what runs where they are missing."""

from nybble.kernels import registry
from nybble.kernels.backends.reference import attention as attention
from nybble.kernels.backends.reference import calibration as calibration
from nybble.kernels.backends.reference import decode as decode
from nybble.kernels.backends.reference import four_bit as four_bit
from nybble.kernels.backends.reference import glu as glu
from nybble.kernels.backends.reference import loss as loss
from nybble.kernels.backends.reference import norm as norm
from nybble.kernels.backends.reference import optimizer as optimizer
from nybble.kernels.backends.reference import rope as rope

registry.register_backend("reference", devices=None, probe=lambda: None)
