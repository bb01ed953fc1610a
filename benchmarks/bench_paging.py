"""Measures what paging costs where nothing is short: steps with the base streamed, and with the optimizer paged.

    python benchmarks/bench_paging.py [--shape smollm2-135m] [--tokens 512] [--rounds 7] [--folder DIR]

One process holds the same model twice, resident and streamed from its folder with no block resident (its files are in
the page cache after the first round), and takes forward and backward passes of one row in turn; then AdamW updates of
as many parameters in turn, with its state in memory and in a file. Medians, and the ratio's quartiles over the rounds.
Both must give the same bits, or nothing is reported.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nybble.formats.quantized_tensor import QuantSpec
from nybble.layers.backbone import BlockBackbone
from nybble.layers.convert import attach_adapters, quantizable_linears, resolve_targets
from nybble.layers.loss_head import LossHead
from nybble.layers.precision import resolve_compute_dtype
from nybble.memory.costs import ModelShape, end_bytes
from nybble.memory.planner import STREAMED_ENDS_BYTES
from nybble.memory.store import open_store
from nybble.models.load import load_model
from nybble.models.skeleton import build_skeleton
from nybble.models.source import open_source
from nybble.models.synth import synthesize
from nybble.training.optimizer import AdamW

Pass = Callable[[], float]


def micro_batch(folder: Path, tokens: int, streamed: bool) -> Pass:
    """A forward and backward pass that returns its loss."""
    source = open_source(str(folder))
    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    store = open_store(source, quantizable_linears(build_skeleton(source.config)), 0) if streamed else None
    names = () if store is None else store.names
    ends = streamed and end_bytes(ModelShape.from_config(source.config.to_dict())) >= STREAMED_ENDS_BYTES
    model = load_model(source, source.quant_spec, dtype, stream_linears_of=names, stream_ends=ends)
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=16, alpha=32)
    backbone, head = BlockBackbone(model, "nothing", store), LossHead.of(model)
    ids, places = torch.arange(tokens).remainder(250)[None] + 3, torch.arange(tokens)
    borders = torch.tensor([0, tokens], dtype=torch.int32)

    def run() -> float:
        loss = head.loss(backbone.states(ids, places[None], places, borders), ids[0], tokens)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return run


def update(shapes: list[torch.Size], folder: Path, paged: bool) -> Pass:
    """An optimizer step that returns the first parameter's sum."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.999, weight_decay=0.0)
    if paged:
        optimizer.page_out(folder)

    def run() -> float:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step(1e-3, grad_scale=1.0)
        return parameters[0].sum().item()

    return run


def compare(name: str, plain: Pass, other: Pass, rounds: int) -> tuple[float, float]:
    """Median seconds of both, after printing them and their ratio; one uncounted round first."""
    seconds: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        taken, results = [], []
        for run in (plain, other):
            started = time.perf_counter()
            results.append(run())
            taken.append(time.perf_counter() - started)
        assert results[0] == results[1], f"{name}: {results}"
        if number:
            seconds.append((taken[0], taken[1]))
    low, middle, high = statistics.quantiles([b / a for a, b in seconds], n=4)
    first, second = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"{name}: {first:.4f} s, {second:.4f} s, ratio {middle:.3f} ({low:.3f} to {high:.3f})")
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the model is kept between calls")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)) / given.shape
        if not folder.exists():
            synthesize(given.shape, QuantSpec(), folder)
        resident, streamed = (micro_batch(folder, given.tokens, streamed) for streamed in (False, True))
        pass_s, _ = compare("pass, resident and streamed", resident, streamed, given.rounds)
        model = build_skeleton(open_source(str(folder)).config)
        attach_adapters(model, resolve_targets(model, "all-linear"), rank=16, alpha=32)
        shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
        plain, paged = (update(shapes, Path(temporary), paged) for paged in (False, True))
        plain_s, paged_s = compare("update, in memory and paged", plain, paged, given.rounds)
        print(f"step of one micro-batch, paged over not: {(pass_s + paged_s) / (pass_s + plain_s):.3f}")


if __name__ == "__main__":
    main()
