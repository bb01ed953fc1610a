"""Short runs of --objective classify, as several test modules make them."""

from pathlib import Path
from typing import Any

STEPS = 3


def run(model: Path, data: Path, out: Path, **more: Any) -> Path:
    """A run in fp32, of STEPS steps unless said; `out` again."""
    from nybble.options.verbs import load_config
    from nybble.training.session import train

    options = {"model": str(model), "data": str(data), "out": str(out), "objective": "classify", "max_steps": STEPS}
    options |= {"rows_per_step": 8, "micro_batch_size": 4, "rank": 4, "lr": 1e-2, "eval_every": 3, "save_every": 1}
    options |= {"compute_dtype": "fp32", "keep_checkpoints": 9, "validation_fraction": 0.2}
    train(load_config(None, options | more))
    return out


def final(out: Path) -> dict[str, bytes]:
    """What the last checkpoint of such a run holds."""
    last = out / "checkpoints" / f"step-{STEPS}"
    return {path.name: path.read_bytes() for path in last.iterdir() if path.suffix == ".safetensors"}
