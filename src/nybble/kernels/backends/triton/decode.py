"""Op by op: so many launches that a step of few texts is worth a graph (memory/graph.py)."""

from nybble.kernels import registry
from nybble.kernels.backends.reference.decode import OpByOp

registry.register("decode", "triton")(OpByOp)
