"""Measures what paging costs where nothing is short: steps with the base streamed, with what blocks keep in a file, and
with the optimizer paged and in 8 bits.

    python benchmarks/bench_paging.py [--shape smollm2-135m] [--tokens 512] [--rounds 7] [--folder DIR] [--quick]

One process holds the same model three times: resident, streamed from its folder with no block resident (its files are
in the page cache after the first round), and with blocks' inputs in a file; it takes forward and backward passes of one
row in turn. Then AdamW updates of as many parameters in turn, with moments in memory and in a file, of 32 and of 8
bits. Medians, and each ratio's quartiles over the rounds. What pages must give the bits of what does not, or nothing is
reported.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import BENCHMARKS, Table, about_machine, report, versions
from torch import nn

from nybble.data.packing import pack_tokens
from nybble.formats.quant_spec import QuantSpec
from nybble.layers.backbone import FusedForward
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.layers.own_head import loss_head
from nybble.layers.precision import resolve_compute_dtype
from nybble.memory.offload import ActivationFile
from nybble.memory.store import open_store
from nybble.planning.base_costs import end_bytes
from nybble.planning.shape import shape_of
from nybble.planning.strategies import STREAMED_ENDS_BYTES
from nybble.quantization.synth import synthesize
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.training.optimizer import AdamW, Bits

Pass = Callable[[], float]


def micro_batch(folder: Path, tokens: int, streamed: bool = False, kept: ActivationFile | None = None) -> Pass:
    """A forward and backward pass that returns its loss."""
    source = open_model(str(folder))
    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    store = open_store(source, 0) if streamed else None
    names = () if store is None else store.names
    ends = streamed and end_bytes(shape_of(source.skeleton)) >= STREAMED_ENDS_BYTES
    model = load_model(source, source.layer_formats, dtype, stream_linears_of=names, stream_ends=ends)
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=16, alpha=32)
    forward, head = FusedForward(model, "nothing", store, kept), loss_head(model)
    ids, places = torch.arange(tokens).remainder(250) + 3, torch.arange(tokens)
    batch = pack_tokens([ids])

    def run() -> float:
        loss = head.loss(forward.hidden(batch, places), ids, tokens)
        loss.backward()
        norm = sum(p.grad.double().abs().sum().item() for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        return loss.item() + norm

    return run


def update(shapes: list[torch.Size], folder: Path | None, bits: Bits = 32) -> Pass:
    """An optimizer step that returns the first parameter's sum; its moments are in a file of `folder`, if given."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.999, weight_decay=0.0, bits=bits)
    if folder is not None:
        optimizer.page_out(folder)

    def run() -> float:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.fill_(0.5)
        optimizer.step(1e-3, grad_scale=1.0)
        return parameters[0].sum().item()

    return run


def compare(passes: dict[str, Pass], rounds: int, same: bool = True) -> dict[str, list[float]]:
    """Seconds of each round, taken in turn; one uncounted round first. `same`: results must be equal to the bit."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        results = []
        for name, run in passes.items():
            started = time.perf_counter()
            results.append(run())
            if number:
                seconds[name].append(time.perf_counter() - started)
        assert not same or len(set(results)) == 1, results
    return seconds


def rows(seconds: dict[str, list[float]]) -> list[list[str]]:
    """Median and the ratio to the first, with its quartiles."""
    first = next(iter(seconds.values()))
    lines = []
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles([b / a for a, b in zip(first, taken, strict=True)], n=4)
        lines.append([name, f"{statistics.median(taken):.4f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the model is kept between calls")
    parser.add_argument("--quick", action="store_true", help="nothing is saved")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results")
    given = parser.parse_args()
    about = {"machine": about_machine(torch.get_num_threads()), "versions": versions("torch", "nybble")}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = (given.folder or scratch) / given.shape
        if not folder.exists():
            synthesize(given.shape, QuantSpec(), folder)
        passes = {
            "resident": micro_batch(folder, given.tokens),
            "base streamed, no block resident": micro_batch(folder, given.tokens, streamed=True),
            "blocks' inputs in a file": micro_batch(folder, given.tokens, kept=ActivationFile(scratch, 10**8)),
        }
        pass_s = compare(passes, given.rounds)
        model = open_model(str(folder)).empty_model(torch.bfloat16)
        attach_adapters(model, resolve_targets(model, "all-linear"), rank=16, alpha=32)
        shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
        wide = compare({"32 bits": update(shapes, None), "32 bits, paged": update(shapes, scratch)}, given.rounds)
        narrow = compare({"8 bits": update(shapes, None, 8), "8 bits, paged": update(shapes, scratch, 8)}, given.rounds)
    resident = statistics.median(pass_s["resident"])
    updates = wide | narrow
    steps = {
        name: (resident + statistics.median(taken)) / (resident + statistics.median(wide["32 bits"]))
        for name, taken in updates.items()
    }
    what = f"{given.shape}, {given.tokens} tokens"
    tables = [
        Table(f"Forward and backward, {what}", ["", "seconds", "ratio"], rows(pass_s)),
        Table(
            f"AdamW over {sum(map(torch.Size.numel, shapes)):,} parameters",
            ["moments", "seconds", "step of one micro-batch, ratio"],
            [
                [name, f"{statistics.median(taken):.4f}", f"{steps[name]:.3f}"]
                for name, taken in (wide | narrow).items()
            ],
        ),
    ]
    report(given, "paging", "What paging costs where nothing is short", about, tables, pass_s | updates)


if __name__ == "__main__":
    main()
