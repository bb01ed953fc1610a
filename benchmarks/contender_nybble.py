"""nybble as a contender: a process that takes one training step, or answers one prompt, a request.

    python contender_nybble.py '{"work": "train", "base": ..., "adapter": ..., "steps": ..., "keep": "everything"}'

Training is a loop of its own on nybble's parts. The time of a step is from the request to the report, batching and
optimizer included.
"""

import nybble  # noqa: I001  before torch: how its threads wait
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Channel, versions
from inputs import IGNORE, read_steps
from safetensors.torch import save_file

from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.data.preference_rows import EncodedPair
from nybble.generation.generate import generate
from nybble.layers.convert import adapters_of
from nybble.runs.adapter_files import read_adapter
from nybble.training.accumulation import forward_backward
from nybble.training.optimizer import AdamW
from nybble.training.preference import DPO

LR, PAIRS_LR, MAX_GRAD_NORM = 2e-4, 2e-5, 0.3  # the peers' too


def load(settings: dict[str, Any]) -> tuple[nybble.Model, float]:
    """The base in four bits, or as it is (bits: 16), and the seconds that it took to load."""
    import transformers.modeling_utils  # noqa: F401  imported here, so that the time of importing it is not counted

    started = time.perf_counter()
    format = "nf4" if settings.get("bits", 4) == 4 else "none"
    model = nybble.load(
        nybble.open_model(settings["base"]), format=format, device="cpu", keep=settings.get("keep", "nothing")
    )
    return model, time.perf_counter() - started


def train(settings: dict[str, Any], channel: Channel) -> None:
    model, load_s = load(settings)
    read_adapter(model.module, Path(settings["adapter"]))
    steps = [[as_example(row) for row in rows] for rows in read_steps(Path(settings["steps"]))]
    path = model.causal_lm.name
    first = first_step(model, steps[0], settings.get("gradients"))
    optimizer = AdamW(model.train().parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)
    channel.send(load_s=load_s, versions=versions("nybble", "torch", "transformers"), path=path, **first)
    while True:
        rows = steps[channel.receive()["step"]]
        started = time.perf_counter()
        loss = model.loss(collate(rows, model.packed))
        loss.backward()
        optimizer.step(LR, grad_scale=min(1.0, MAX_GRAD_NORM / float(optimizer.gradient_norm())))
        channel.send(seconds=time.perf_counter() - started, loss=loss.item())


def first_step(model: nybble.Model, rows: list[EncodedExample], gradients: str | None) -> dict[str, float]:
    """The loss before any training; the gradients of each B go to the file `gradients`."""
    if gradients is None:
        return {}
    loss = model.train().loss(collate(rows, model.packed))
    loss.backward()
    adapters = adapters_of(model.module)
    save_file({name: adapter.lora_B.grad for name, adapter in adapters.items()}, gradients)
    model.module.zero_grad(set_to_none=True)
    return {"loss": loss.item()}


def train_pairs(settings: dict[str, Any], channel: Channel) -> None:
    """DPO, its reference asked in the step."""
    model, load_s = load(settings)
    read_adapter(model.module, Path(settings["adapter"]))
    model.train()
    objective, causal_lm = DPO(settings["beta"]), model.causal_lm
    steps = [[as_pair(row) for row in rows] for rows in read_steps(Path(settings["steps"]))]
    optimizer = AdamW(model.parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)

    def compute(rows: list[EncodedPair]) -> float:
        batch = objective.collate(rows, causal_lm)
        return forward_backward(objective, causal_lm, batch, objective.totals(causal_lm, rows, len(rows))).loss.item()

    first = {}
    if gradients := settings.get("gradients"):
        first = {"loss": compute(steps[0])}
        save_file({name: each.lora_B.grad for name, each in adapters_of(model.module).items()}, gradients)
        optimizer.drop_gradients()
    channel.send(load_s=load_s, versions=versions("nybble", "torch", "transformers"), path=causal_lm.name, **first)
    while True:
        rows = steps[channel.receive()["step"]]
        started = time.perf_counter()
        loss = compute(rows)
        optimizer.step(PAIRS_LR, grad_scale=min(1.0, MAX_GRAD_NORM / float(optimizer.gradient_norm())))
        channel.send(seconds=time.perf_counter() - started, loss=loss)


def as_pair(row: dict[str, list[int]]) -> EncodedPair:
    prompt = row["prompt"]
    sides = []
    for name in ("chosen", "rejected"):
        ids = torch.tensor(prompt + row[name], dtype=torch.int32)
        sides.append(EncodedExample(ids, torch.arange(len(ids)) >= len(prompt), origin="row"))
    return EncodedPair.of(*sides)


def as_example(row: dict[str, list[int]]) -> EncodedExample:
    supervised = torch.tensor(row["labels"]) != IGNORE
    return EncodedExample(torch.tensor(row["input_ids"], dtype=torch.int32), supervised, origin="row")


def answer(settings: dict[str, Any], channel: Channel) -> None:
    model, load_s = load(settings)
    channel.send(load_s=load_s, versions=versions("nybble", "torch", "transformers"))
    while True:
        request = channel.receive()
        started = time.perf_counter()
        (ids,) = generate(model.module, [request["prompt"]], stop_ids=(), max_new_tokens=request["new_tokens"])
        channel.send(seconds=time.perf_counter() - started, ids=ids)


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    {"train": train, "train_pairs": train_pairs, "answer": answer}[chosen["work"]](chosen, Channel())
