"""Who can run the ops: a folder a backend, with a file for each file of `ops/` that it has bodies for (README.md)."""

from nybble.kernels.backends import bitsandbytes as bitsandbytes
from nybble.kernels.backends import cpp as cpp
from nybble.kernels.backends import flash as flash
from nybble.kernels.backends import reference as reference
from nybble.kernels.backends import triton as triton
