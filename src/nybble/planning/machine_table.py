"""The machine a plan is made for, as plain numbers; and a small table of those that are not here."""

from dataclasses import dataclass

CUDA_CONTEXT_BYTES = 500_000_000
RUN_BYTES = 6_000_000  # modules, objects and threads that a run adds to its process after it was planned, measured


@dataclass(frozen=True)
class Machine:
    """What bounds a run.

    Args:
        name: for the user.
        kind: "cpu" or "cuda", as torch calls the type of its device.
        budget_bytes: what the run may take, its process included; on CUDA of the device's memory.
        process_bytes: of it, what the process takes before anything is loaded.
        host_bytes: memory beside a GPU; on a CPU, memory beyond the budget, which caches files.
        flops: sustained by large matrix products in the compute dtype, a second.
        ram_bytes_per_s: of a copy, each byte counted once.
        link_bytes_per_s: host to device; on a CPU as `ram_bytes_per_s`.
        disk_bytes_per_s: of large sequential reads.
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

    @property
    def on_cpu(self) -> bool:
        """Whether the budget is of the process's own memory; a GPU's is its own."""
        return self.kind == "cpu"

    @property
    def begun_bytes(self) -> int:
        """What a run's process takes beside all that it holds for training."""
        return self.process_bytes + (RUN_BYTES if self.on_cpu else 0)


# Assumed, not measured: about 60 % of the dense bf16 figure of a card of that memory, its memory at 80 % of its
# bandwidth, PCIe 4 x16, an NVMe disk.
GPUS = {
    "12GB-gpu": (12e9, 30e12, 350e9),
    "16GB-gpu": (16e9, 45e12, 450e9),
    "24GB-gpu": (24e9, 80e12, 800e9),
    "48GB-gpu": (48e9, 150e12, 750e9),
    "80GB-gpu": (80e9, 400e12, 1600e9),
}
LINK_BYTES_PER_S, _DISK = 20e9, 2.5e9


def named_machine(name: str, memory: int | None, host_memory: int | None) -> Machine:
    """A machine of the table, with other sizes where they are given."""
    total, flops, bandwidth = GPUS[name]
    host = host_memory or 2 * int(total)
    budget = memory or int(total)
    return Machine(name, "cuda", budget, CUDA_CONTEXT_BYTES, host, flops, bandwidth, LINK_BYTES_PER_S, _DISK)
