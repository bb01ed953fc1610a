"""Short runs as several test modules make them, go on with them and compare them."""

from pathlib import Path
from typing import Any

from nybble.runs.result import RunResult

STEPS = 3  # of `classify`


def classify(model: Path, data: Path, out: Path, **more: Any) -> Path:
    """A run of --objective classify in fp32, of STEPS steps unless said; `out` again."""
    from nybble.options.verbs import load_config
    from nybble.training.session import train

    options = {"model": str(model), "data": str(data), "out": str(out), "objective": "classify", "max_steps": STEPS}
    options |= {"rows_per_step": 8, "micro_batch_size": 4, "rank": 4, "lr": 1e-2, "eval_every": 3, "save_every": 1}
    options |= {"compute_dtype": "fp32", "keep_checkpoints": 9, "validation_fraction": 0.2}
    train(load_config(None, options | more))
    return out


def resume(out: Path, **more: Any) -> RunResult:
    """The run goes on by its own config."""
    from nybble.options.verbs import load_config
    from nybble.training.session import train

    return train(load_config(out / "config.yaml", {"out": str(out), "resume": True, **more}))


def tensors_after(out: Path, step: int) -> dict[str, bytes]:
    """Everything of a finished run that must not depend on how often it stopped: its last checkpoint, after that step,
    and its adapter.
    """
    last = out / "checkpoints" / f"step-{step}"
    kept = {path.name: path.read_bytes() for path in last.iterdir() if path.suffix == ".safetensors"}
    return kept | {"adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes()}
