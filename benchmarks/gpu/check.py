"""What phases of the check of a GPU share: shapes, what a phase is told, and the record that it writes."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

NO_CARD = "needs a card"
RANK, KEEPS = 16, ("nothing", "attention", "everything")
LR, MAX_GRAD_NORM = 1e-4, 0.3


class Shape(NamedTuple):
    """A Llama's widths."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Of hidden states, queries, keys and the MLP."""
        return self.hidden, self.hidden, self.hidden * self.kv_heads // self.heads, self.intermediate

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the weights, side by side where they share an input."""
        h, q, k, f = self.widths
        return {"qkv": (q + 2 * k, h), "o": (h, q), "gate_up": (2 * f, h), "down": (h, f)}

    @property
    def block_elements(self) -> int:
        return sum(rows * columns for rows, columns in self.products.values())

    @property
    def adapter_parameters(self) -> int:
        h, q, k, f = self.widths
        return self.layers * RANK * ((h + q) + 2 * (h + k) + (q + h) + 2 * (h + f) + (f + h))


class Load(NamedTuple):
    """A micro-batch: tokens in all, in rows of so many."""

    tokens: int
    row: int


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = Shape(8192, 28672, 12, 64, 8, 32768)  # 12 of its 80 blocks, which wait in 5.3 GB of pinned memory
SMALL = Shape(512, 1408, 2, 8, 2, 1000)
TINY = Shape(64, 96, 2, 4, 2, 96)
LOADS = (Load(8192, 2048), Load(2048, 2048), Load(1024, 512))


@dataclass(frozen=True)
class Check:
    """What a phase is told.

    Args:
        ends: as `time.time()` counts: when it is stopped.
        kernels: those of NYBBLE_KERNELS, empty for all.
    """

    phase: str
    device: str
    tiny: bool
    out: Path
    ends: float = math.inf
    kernels: str = ""

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds that remain, less what ending takes."""
        return self.ends - time.time() - 3

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 5

    @property
    def loads(self) -> tuple[Load, ...]:
        return (Load(64, 32),) if self.tiny else LOADS

    @property
    def model(self) -> Shape:
        return TINY if self.tiny else LLAMA_8B

    def say(self, what: str, **values: Any) -> None:
        """Append a line to the record."""
        with (self.out / "gpu-check.jsonl").open("a") as file:
            file.write(json.dumps({"phase": self.phase, "what": what, **values}, default=str) + "\n")

    def lines(self, what: str, phase: str | None = None) -> list[dict[str, Any]]:
        """Lines of the record so far."""
        path = self.out / "gpu-check.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if line["what"] == what and phase in (None, line["phase"])]

    def test(self, name: str, error: float, allowed: float) -> None:
        """One comparison; NaN passes none."""
        self.say("test", name=name, error=error, allowed=allowed, passed=bool(error <= allowed))
