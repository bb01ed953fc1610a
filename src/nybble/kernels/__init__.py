"""Ops declared once, with a body per backend. Importing the package declares every op and registers every body."""

from nybble.kernels import attention as attention
from nybble.kernels import bitsandbytes_cuda as bitsandbytes_cuda
from nybble.kernels import block_cpu as block_cpu
from nybble.kernels import block_ops as block_ops
from nybble.kernels import block_reference as block_reference
from nybble.kernels import calibration_cpu as calibration_cpu
from nybble.kernels import calibration_ops as calibration_ops
from nybble.kernels import calibration_reference as calibration_reference
from nybble.kernels import cpu as cpu
from nybble.kernels import decode_cpu as decode_cpu
from nybble.kernels import ops as ops
from nybble.kernels import reference as reference
