"""What a run computes at once and keeps, chosen from predicted memory; shown before, compared after.

The same arithmetic will rank strategies (paging, streaming); today it chooses between what blocks keep.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from rich.console import Console
from rich.table import Table

from nybble.config import TrainConfig
from nybble.data.prepare import PreparedData
from nybble.formats.quantized_tensor import QuantSpec
from nybble.layers.backbone import why_not_blocks
from nybble.layers.decoder_block import Keep
from nybble.layers.loss_head import CHUNK_BYTES
from nybble.memory.costs import ModelShape, TrainingShape, predict
from nybble.memory.measure import PeakMemory, available_bytes
from nybble.training.base import QualityChoice
from nybble.training.display import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MICRO_BATCH_TOKENS = 2048  # what one micro-batch aims at when its size is not given


@dataclass(frozen=True)
class RunPlan:
    """The choices of a run and what they should cost.

    Args:
        keep: what each block keeps for its backward pass.
        micro_batch_size: rows computed at once.
        predicted: bytes by component, above what the process itself takes, and their peak under "peak".
    """

    keep: Keep
    micro_batch_size: int
    predicted: dict[str, int]


def plan_run(
    config: TrainConfig,
    spec: QuantSpec | None,
    model: "PreTrainedModel",
    data: PreparedData,
    dtype: torch.dtype,
    device: torch.device,
) -> RunPlan:
    """Choose for a loaded model with its adapters; what the config says is not chosen."""
    longest = sorted((len(row) for row in data.train), reverse=True)
    size = config.micro_batch_size or max(1, min(config.rows_per_step, MICRO_BATCH_TOKENS // longest[0]))
    supervised = sorted((row.supervised_tokens for row in data.train), reverse=True)
    shape = ModelShape.from_config(model.config.get_text_config().to_dict())
    path = "generic" if not config.packing or why_not_blocks(model) else "blocks"

    def cost(keep: Keep) -> dict[str, int]:
        training = TrainingShape(
            tokens=sum(longest[:size]),
            supervised_tokens=sum(supervised[:size]),
            adapter_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            rank=config.rank,
            compute_bytes=dtype.itemsize,
            spec=spec,
            path=path,
            keep=keep,
            chunk_bytes=CHUNK_BYTES,
            mixed_bits=config.mixed,
        )
        return predict(shape, training)

    costs = {keep: cost(keep) for keep in get_args(Keep)}
    keep = config.keep if config.keep != "auto" else _most_that_fits(costs, available_bytes(device) // 2)
    return RunPlan(keep, size, costs[keep])


def _most_that_fits(costs: dict[Keep, dict[str, int]], budget: int) -> Keep:
    """The fastest choice within `budget` bytes; the smallest where none is."""
    for keep in ("everything", "attention"):
        if costs[keep]["peak"] <= budget:
            return keep
    return "nothing"


def show_plan(console: Console, plan: RunPlan) -> None:
    """The predicted memory by component."""
    table = Table(title="predicted memory, above the process's own", title_justify="left")
    table.add_column("component")
    table.add_column("bytes", justify="right")
    for name, num_bytes in plan.predicted.items():
        if num_bytes:
            table.add_row(name, format_bytes(num_bytes), style="bold" if name == "peak" else None)
    console.print(table)


def show_measured(console: Console, plan: RunPlan, memory: PeakMemory) -> None:
    """Predicted against measured peak."""
    console.print(
        f"peak memory: {format_bytes(memory.peak_bytes - memory.start_bytes)} measured, "
        f"{format_bytes(plan.predicted['peak'])} predicted, above the process's own {format_bytes(memory.start_bytes)}",
        highlight=False,
    )


def write_plan(path: Path, plan: RunPlan, backbone: str, quality: QualityChoice | None, memory: PeakMemory) -> None:
    """`plan.json`: what was chosen and predicted, and what was measured."""
    components = {name: num_bytes for name, num_bytes in plan.predicted.items() if name != "peak"}
    chosen = {
        "path": backbone,
        "keep": plan.keep,
        "micro_batch_size": plan.micro_batch_size,
        "quality": None if quality is None else asdict(quality),
        "peak_bytes": plan.predicted["peak"],
        "components": components,
    }
    measured = {"peak_bytes": memory.peak_bytes, "start_bytes": memory.start_bytes}
    path.write_text(json.dumps({"chosen": chosen, "measured": measured}, indent=2) + "\n", encoding="utf-8")
