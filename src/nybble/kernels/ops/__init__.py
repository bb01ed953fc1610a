"""Each op declared once: schema, checks, fake, and the function that callers use. Bodies are in `backends/`."""

from nybble.kernels.ops import attention as attention
from nybble.kernels.ops import calibration as calibration
from nybble.kernels.ops import decode as decode
from nybble.kernels.ops import four_bit as four_bit
from nybble.kernels.ops import glu as glu
from nybble.kernels.ops import loss as loss
from nybble.kernels.ops import norm as norm
from nybble.kernels.ops import optimizer as optimizer
from nybble.kernels.ops import rope as rope
