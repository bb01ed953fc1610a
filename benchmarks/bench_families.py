"""Compares decoder blocks with transformers' own modules on widths of published models: time and memory of a step.

    python benchmarks/bench_families.py [--quick] [--only Phi-4]

A few layers of each shape, random weights in nf4, adapters of rank 16 on every linear layer, the vocabulary cut so that
the head does not outweigh so few layers. Both ways run in the dtype that `--compute-dtype auto` stands for here, take
the same packed documents, every token supervised, and keep the same for their backward pass: the inputs of layers, or
everything. Each contender is a process of its own; a measurement is a loss and its backward pass. Memory is the most
that the process held during it above what it held with the model loaded (RssAnon).

Before anything is measured, losses and the gradients of each B must agree.
"""

import nybble.openmp  # noqa: F401, I001  before torch: how its threads wait
import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_gemm_limit import RandomModel, documents
from common import ROOT, Channel, Contender, Spread, Table, Turns, about_machine, options, report, wait_for_quiet
from common import versions as versions_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3TextConfig, GraniteConfig, Phi3Config, PretrainedConfig, SmolLM3Config

from nybble.families import FAMILIES
from nybble.formats.quant_spec import BaseFormats
from nybble.kernels.backends.cpp import library
from nybble.kernels.heap import kept_heap, trim_heap
from nybble.layers.backbone import ModuleForward
from nybble.layers.batch_model import Verdict
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
from nybble.layers.own_head import loss_head
from nybble.layers.precision import resolve_compute_dtype
from nybble.memory.measure import PeakMemory
from nybble.sources.load import load_model

VOCABULARY = 8192
BLOCKS, MODULES = "decoder blocks", "transformers' modules"
KEEPS = ("nothing", "everything")
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.08}  # of gradients, relative
_ENDS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Shape:
    """A model of so many layers, and the tokens of a step."""

    config: PretrainedConfig
    tokens: int


SHAPES = {
    "Gemma 3 1B": Shape(
        Gemma3TextConfig(
            hidden_size=1152, intermediate_size=6912, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, **_ENDS,
        ),
        2048,
    ),
    "SmolLM3 3B": Shape(
        SmolLM3Config(
            hidden_size=2048, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=16,
            num_key_value_heads=4, **_ENDS,
        ),
        2048,
    ),
    "Granite 3 2B": Shape(
        GraniteConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32,
            num_key_value_heads=8, embedding_multiplier=12.0, residual_multiplier=0.22,
            attention_multiplier=0.015625, logits_scaling=8.0, **_ENDS,
        ),
        2048,
    ),
    "Phi-4": Shape(
        Phi3Config(
            hidden_size=5120, intermediate_size=17920, num_hidden_layers=2, num_attention_heads=40,
            num_key_value_heads=10, **_ENDS,
        ),
        1024,
    ),
}  # fmt: skip


class NormedModel(RandomModel):
    """Random weights, those that norms multiply with around one."""

    def read(self, name: str) -> Tensor:
        drawn = super().read(name)
        return drawn + 1 - FAMILIES[self.config.model_type].norm_offset if drawn.dim() == 1 else drawn


# ---- a contender ---------------------------------------------------------------------------------


def contend(settings: dict[str, Any], channel: Channel) -> None:
    """Loads a model and takes a loss and its backward pass at each request."""
    torch.manual_seed(0)
    cpu, shape = torch.device("cpu"), SHAPES[settings["shape"]]
    dtype = resolve_compute_dtype("auto", cpu)
    module = load_model(NormedModel(settings["shape"], shape.config), BaseFormats(), dtype)
    attach_adapters(module, quantizable_linears(module), rank=16, alpha=32)
    module.train()
    batch = documents(shape.tokens, VOCABULARY)
    trim_heap()
    with PeakMemory(cpu) as before:
        pass
    model = CausalLM.of(module, keep=settings["keep"])
    assert model.verdict.path == "blocks", model.name
    if settings["way"] == MODULES:
        modules = ModuleForward(module, "packed", checkpointing=settings["keep"] == "nothing")
        model = CausalLM(module, modules, loss_head(module), Verdict("generic", "packed"))
    with kept_heap(True, slabs=model.verdict.path == "blocks"):  # as training does
        loss = model.loss(batch)
        loss.backward()
        gradients = {name: adapter.lora_B.grad for name, adapter in adapters_of(module).items()}
        save_file({name: grad.contiguous() for name, grad in gradients.items()}, settings["gradients"])
        channel.send(loss=loss.item(), dtype=str(dtype), versions=versions_of("nybble", "torch", "transformers"))
        while True:
            channel.receive()
            with PeakMemory(cpu, interval_s=0.005) as memory:
                started = time.perf_counter()
                model.loss(batch).backward()
                seconds = time.perf_counter() - started
            channel.send(seconds=seconds, bytes=memory.peak_bytes - before.peak_bytes)


# ---- measuring -----------------------------------------------------------------------------------


def start(shape: str, way: str, keep: str, arguments: argparse.Namespace, scratch: Path) -> Contender:
    name = f"{way}, keeping {keep}"
    path = scratch / f"{name}.safetensors"
    settings = {"shape": shape, "way": way, "keep": keep, "gradients": str(path)}
    command = [sys.executable, __file__, "--contend"]
    return Contender(name, command, settings, arguments.threads, scratch / f"{name}.log")


def check(contenders: dict[str, Contender], scratch: Path) -> float:
    """The largest difference of a contender's gradients from the first one's, relative.

    Raises:
        SystemExit: losses or gradients differ by more than rounding does.
    """
    losses = {name: contender.hello["loss"] for name, contender in contenders.items()}
    found = {name: load_file(scratch / f"{name}.safetensors") for name in contenders}
    flat = {name: torch.cat([grads[key].flatten() for key in sorted(grads)]) for name, grads in found.items()}
    first, *others = flat.values()
    largest = max(float((other - first).norm() / first.norm()) for other in others)
    dtype = next(iter(contenders.values())).hello["dtype"]
    allowed = LARGEST_DIFFERENCE[getattr(torch, dtype.removeprefix("torch."))]
    if max(losses.values()) - min(losses.values()) > 0.01 or not largest < allowed:
        raise SystemExit(f"losses {losses}, gradients {largest:.2%} apart")
    return largest


def compare(
    shape: str, rounds: int, arguments: argparse.Namespace, scratch: Path
) -> tuple[list[list[str]], dict[str, Any], dict[str, Any]]:
    """Rows of the table, what is to be recorded of it, and every sample."""
    scratch.mkdir(parents=True, exist_ok=True)
    started = [start(shape, way, keep, arguments, scratch) for keep in KEEPS for way in (MODULES, BLOCKS)]
    contenders = {contender.name: contender for contender in started}
    about = {"gradients apart": check(contenders, scratch)}
    turns = Turns(arguments.wait)
    for contender in started:
        contender.ask()
    for _ in range(rounds):
        turns.ask(started)
    for contender in started:
        contender.close()
    tokens, rows = SHAPES[shape].tokens, []
    for keep in KEEPS:
        names = {way: f"{way}, keeping {keep}" for way in (MODULES, BLOCKS)}
        speeds = {way: Spread.of([tokens / s for s in turns.seconds(name)]) for way, name in names.items()}
        held = {way: Spread.of([each[name]["bytes"] / 1e6 for each in turns.rounds]) for way, name in names.items()}
        rows.append([
            f"{shape}, keeping {keep}", *(speeds[way].show(0) for way in names),
            turns.ratio(names[MODULES], names[BLOCKS]).show(), *(f"{held[way].median:.0f}" for way in names),
            f"{held[BLOCKS].median / held[MODULES].median:.2f}",
        ])  # fmt: skip
    return rows, about | turns.load(), turns.record()


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--only", choices=SHAPES, help="one of the shapes")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench", help="for gradients and logs")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "compute dtype": str(resolve_compute_dtype("auto", torch.device("cpu"))).removeprefix("torch."),
        "kernels": library.describe()["isa"],
        "versions": versions_of("nybble", "torch", "transformers"),
    }
    shapes, rows, samples = [arguments.only] if arguments.only else list(SHAPES), [], {}
    for shape in shapes:
        found, about[f"load, {shape}"], samples[shape] = compare(shape, rounds, arguments, arguments.scratch / shape)
        rows += found
    described = ", ".join(f"{name} {SHAPES[name].config.num_hidden_layers} layers" for name in shapes)
    caption = f"{described}; packed documents of 256 tokens, 2,048 a step, of Phi-4 1,024; loss and backward pass."
    columns = [
        "shape", f"tokens/s, {MODULES}", f"tokens/s, {BLOCKS}", "times as fast", f"MB, {MODULES}", f"MB, {BLOCKS}",
        "share of the memory",
    ]  # fmt: skip
    name = "families" if len(shapes) > 1 else f"families-{shapes[0].lower().replace(' ', '-')}"
    report(
        arguments, name, "Decoder blocks against transformers' modules", about, [Table(caption, columns, rows)], samples
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contend"]:
        contend(json.loads(sys.argv[2]), Channel())
    else:
        main()
