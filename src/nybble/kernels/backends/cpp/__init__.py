"""The C++ kernels of csrc/, for CPUs."""

from nybble.kernels import registry
from nybble.kernels.backends.cpp import attention as attention
from nybble.kernels.backends.cpp import calibration as calibration
from nybble.kernels.backends.cpp import decode as decode
from nybble.kernels.backends.cpp import four_bit as four_bit
from nybble.kernels.backends.cpp import glu as glu
from nybble.kernels.backends.cpp import loss as loss
from nybble.kernels.backends.cpp import norm as norm
from nybble.kernels.backends.cpp import optimizer as optimizer
from nybble.kernels.backends.cpp import rope as rope
from nybble.kernels.backends.cpp.library import why_unavailable

registry.register_backend("cpp", devices=("cpu",), probe=why_unavailable)
