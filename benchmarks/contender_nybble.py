"""nybble as a contender: a process that takes one training step, or answers one prompt, a request.

    python contender_nybble.py '{"work": "train", "base": ..., "adapter": ..., "steps": ..., "keep": "everything"}'

Training runs nybble's own loop. What decides when a step begins is its sampler, and what reports it is its listener;
both are replaced here by ones that talk to the parent. The time of a step is from the request to the report, batching
and optimizer included.
"""

import nybble.openmp  # noqa: F401, I001  before torch: how its threads wait
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import Channel, versions
from inputs import IGNORE, read_steps
from safetensors.torch import save_file

from nybble.events import Event, Listener
from nybble.options.verbs import TrainConfig
from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.data.sampler import StepSampler
from nybble.generation.generate import generate
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of
from nybble.runs.adapter_files import read_adapter
from nybble.layers.precision import resolve_compute_dtype
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.options.option import build_options
from nybble.training.checkpoint import Checkpoints
from nybble.training.evaluations import Evaluations
from nybble.training.events import Step
from nybble.training.loop import train_loop
from nybble.training.objective import SupervisedFineTuning
from nybble.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEVER = 10**9  # steps


class AskedSampler(StepSampler):
    """Rows of the step that the parent asks for."""

    def __init__(self, channel: Channel, clock: "Clock", num_rows: int, rows_per_step: int):
        super().__init__(num_rows, rows_per_step, seed=0)
        self._channel, self._clock = channel, clock

    def next_step(self) -> list[int]:
        first = self._channel.receive()["step"] * self.rows_per_step
        self._clock.started = time.perf_counter()
        return list(range(first, first + self.rows_per_step))


class Clock:
    started = 0.0


def reporter(channel: Channel, clock: Clock) -> Listener:
    """Tells the parent how long a step took."""

    def report(event: Event) -> None:
        if isinstance(event, Step):
            channel.send(seconds=time.perf_counter() - clock.started, loss=event.loss)

    return report


def load(settings: dict[str, Any]) -> tuple["PreTrainedModel", float]:
    """The base in four bits, or as it is (bits: 16), and the seconds that it took to load."""
    import transformers.modeling_utils  # noqa: F401  imported here, so that the time of importing it is not counted

    started = time.perf_counter()
    source = open_model(settings["base"])
    formats = BaseFormats() if settings.get("bits", 4) == 4 else None
    model = load_model(source, formats, resolve_compute_dtype("auto", torch.device("cpu")))
    return model, time.perf_counter() - started


def train(settings: dict[str, Any], channel: Channel) -> None:
    model, load_s = load(settings)
    read_adapter(model, Path(settings["adapter"]))
    steps = [[as_example(row) for row in rows] for rows in read_steps(Path(settings["steps"]))]
    causal_lm = CausalLM.of(model, keep=settings["keep"])
    rows, clock = [row for step in steps for row in step], Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {"model": settings["base"], "data": settings["steps"], "out": folder}
        config = build_options(TrainConfig, options)
        first = first_step(causal_lm, steps[0], settings.get("gradients"))
        channel.send(load_s=load_s, versions=versions("nybble", "torch", "transformers"), path=causal_lm.name, **first)
        train_loop(
            causal_lm,
            SupervisedFineTuning(),
            rows,
            Evaluations((), NEVER),
            config,
            sampler=AskedSampler(channel, clock, len(rows), len(steps[0])),
            total_steps=NEVER,
            micro_batch_size=len(steps[0]),
            run=RunFolder(Path(folder)),
            adapter_config={},
            report=reporter(channel, clock),
            events_bytes=lambda: 0,
            checkpoints=Checkpoints(Path(folder), save_every=str(NEVER), keep=1, config="", about={}, settled={}),
        )


def first_step(model: CausalLM, rows: list[EncodedExample], gradients: str | None) -> dict[str, float]:
    """The loss before any training; the gradients of each B go to the file `gradients`."""
    if gradients is None:
        return {}
    loss = model.train().loss(collate(rows, model.packed))
    loss.backward()
    adapters = adapters_of(model.module)
    save_file({name: adapter.lora_B.grad for name, adapter in adapters.items()}, gradients)
    model.module.zero_grad(set_to_none=True)
    return {"loss": loss.item()}


def as_example(row: dict[str, list[int]]) -> EncodedExample:
    supervised = torch.tensor(row["labels"]) != IGNORE
    return EncodedExample(torch.tensor(row["input_ids"], dtype=torch.int32), supervised, origin="row")


def answer(settings: dict[str, Any], channel: Channel) -> None:
    model, load_s = load(settings)
    channel.send(load_s=load_s, versions=versions("nybble", "torch", "transformers"))
    while True:
        request = channel.receive()
        started = time.perf_counter()
        (ids,) = generate(model, [request["prompt"]], stop_ids=(), max_new_tokens=request["new_tokens"])
        channel.send(seconds=time.perf_counter() - started, ids=ids)


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    {"train": train, "answer": answer}[chosen["work"]](chosen, Channel())
