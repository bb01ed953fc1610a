"""The machine a plan is made for, as plain numbers: this one (planning/machine.py), or one with a card of CARDS."""

from dataclasses import dataclass

from nybble.cards import CARDS
from nybble.sizes import PRODUCT_BYTES

CUDA_CONTEXT_BYTES = 500_000_000  # of a process on a GPU before its first tensor, libraries included; assumed
NEVER_RUN = "predicted; never run on such a card"
PLAIN = "predicted by what CUDA takes; nybble was never run on such a GPU"
RUN_BYTES = 6_000_000  # modules, objects and threads that a run adds to its process after it was planned, measured


@dataclass(frozen=True)
class Machine:
    """What bounds a run.

    Args:
        name: for the user.
        kind: "cpu", "cuda", "xpu" or "mps", as torch calls the type of its device.
        budget_bytes: what the run may take, its process included; on a GPU of the device's memory.
        process_bytes: of it, what the process takes before anything is loaded.
        host_bytes: memory beside a GPU; on a CPU, memory beyond the budget, which caches files.
        flops: sustained by large matrix products in the compute dtype, a second.
        ram_bytes_per_s: of a copy, each byte counted once.
        link_bytes_per_s: host to device; on a CPU as `ram_bytes_per_s`.
        disk_bytes_per_s: of large sequential reads.
        attention: share of `flops` that attention's forward and backward kernels reach.
        here: it is this one, and its speeds are measured.
        others_bytes: of a GPU, what other processes hold.
        product_bytes: that a CPU's library keeps of each product of 16-bit matrices that it has compiled.
    """

    name: str
    kind: str
    budget_bytes: int
    process_bytes: int
    host_bytes: int
    flops: float
    ram_bytes_per_s: float
    link_bytes_per_s: float
    disk_bytes_per_s: float
    attention: tuple[float, float] = (1.0, 1.0)
    here: bool = True
    others_bytes: int = 0
    product_bytes: int = PRODUCT_BYTES

    @property
    def on_cpu(self) -> bool:
        """Whether the budget is of the process's own memory; a GPU's is its own."""
        return self.kind == "cpu"

    @property
    def note(self) -> str:
        """What users should know of its figures."""
        if self.here and not self.has_lane:
            return PLAIN
        return "" if self.here else NEVER_RUN

    @property
    def has_lane(self) -> bool:
        """Whether copies to and from it go beside its computing (`memory/lane.py`)."""
        return self.kind in ("cpu", "cuda")

    @property
    def begun_bytes(self) -> int:
        """What a run's process takes beside all that it holds for training."""
        return self.process_bytes + (RUN_BYTES if self.on_cpu else 0)


_DISK = 2.5e9  # an NVMe disk


def named_machine(name: str, memory: int | None, host_memory: int | None) -> Machine:
    """A machine with one of CARDS, and with other sizes where they are given; its host has twice the card's memory."""
    card = CARDS[name]
    total = card.memory_gb * 10**9
    return Machine(
        name,
        "cuda",
        budget_bytes=memory or total,
        process_bytes=CUDA_CONTEXT_BYTES,
        host_bytes=host_memory or 2 * total,
        flops=card.flops,
        ram_bytes_per_s=card.ram_bytes_per_s,
        link_bytes_per_s=card.link_bytes_per_s,
        disk_bytes_per_s=_DISK,
        attention=card.attention,
        here=False,
    )
