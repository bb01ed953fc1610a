"""Ops declared once, with a body per backend. Importing the package declares every op and registers every body."""

from nybble.kernels import backends as backends
from nybble.kernels import ops as ops
