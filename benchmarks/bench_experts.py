"""Compares the training step of a streamed mixture of experts with what it cannot do without.

    python benchmarks/bench_experts.py [--shape qwen3-30b-a3b-8-layers] [--tokens 2048] [--resident 0] [--keep nothing]
                                       [--folder DIR] [--cold] [--quick]

The floor is the sum of three, each measured alone and in turn with the step:

    products        the frozen products, of each expert those of the tokens that it got in the step: forward, and the
                    gradient of each input, but of q, k and v in the first block; the head. Weights and states are there
                    already, in the dtype that the step computes in.
    dequantising    of each touched expert, and of attention, once forward and once backward
    reading         of each block that is not resident, once forward and once backward

Nothing computed again, no attention, norms, router, sorting, adapters, softmax or optimizer is in it. The step reads
while it computes, so that its reading may cost nothing; the floor has it all the same. The base is random
(`nybble synth`), the adapters lie on all linear layers, as is the default, and every token is supervised.

With --cpu-time on one thread, processor seconds are compared, as on a machine that others use too.

Ends stay in memory. With --cold the folder's pages are dropped from the system's file cache before everything that is
timed; how much of the folder the cache holds before and after each step is part of the record.
"""

import nybble.openmp  # noqa: F401, I001  before torch: how its threads wait
import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from bench_attention import matmul_rate
from bench_gemm_limit import Product, Step, _operands, documents
from common import Spread, Table, Turns, about_machine, options, report, versions, wait_for_quiet
from torch import nn

from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.backends.cpp import library
from nybble.kernels.ops.four_bit import dequantize_into
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, block_names, resolve_targets
from nybble.layers.decoder_block import Keep
from nybble.layers.expert_products import touched
from nybble.layers.precision import resolve_compute_dtype
from nybble.layers.streamed import StreamedExperts, StreamedLinear, expert_name
from nybble.memory.store import FolderBlockStore, open_store
from nybble.quantization.synth import synthesize
from nybble.sources.load import load_model
from nybble.sources.open import open_model

Counts = list[list[int]]  # of each block, rows of each expert


class Floor:
    """What a step of these counts cannot do without.

    Args:
        model: streamed, with its adapters.
        counts: what each block's experts got.
    """

    def __init__(self, model: Any, store: FolderBlockStore, counts: Counts, tokens: int, dtype: torch.dtype):
        self.store, self.dtype = store, dtype
        self.linears = [module for module in model.modules() if isinstance(module, StreamedLinear)]
        self.stacks = [module for module in model.modules() if isinstance(module, StreamedExperts)]
        per_block = len(self.stacks) // len(counts)
        self.of_stack = [(stack, counts[i // per_block]) for i, stack in enumerate(self.stacks)]
        self.products = list(self._products(model, tokens))
        widths = {(p.inner, p.columns, p.forward) for p in self.products}
        wide = {key: _operands(Product(tokens, *key), dtype) for key in widths}
        self.operands = {
            p: (x[: p.rows], weight, out[: p.rows])
            for p in set(self.products)
            for x, weight, out in [wide[p.inner, p.columns, p.forward]]
        }
        largest = max(m.in_features * m.out_features for m in (*self.linears, *self.stacks))
        self.room = torch.empty(largest, dtype=dtype)

    def _products(self, model: Any, tokens: int) -> Iterator[Product]:
        first = block_names(model)[0]
        for linear in self.linears:
            yield Product(tokens, linear.in_features, linear.out_features, forward=True)
            if not (linear.name.startswith(f"{first}.") and linear.name.endswith(("q_proj", "k_proj", "v_proj"))):
                yield Product(tokens, linear.out_features, linear.in_features, forward=False)
        for stack, counts in self.of_stack:
            for count in filter(None, counts):
                yield Product(count, stack.in_features, stack.out_features, forward=True)
                yield Product(count, stack.out_features, stack.in_features, forward=False)
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        yield Product(tokens, hidden, vocabulary, forward=True)
        yield Product(tokens, vocabulary, hidden, forward=False)

    def multiply(self) -> None:
        for product in self.products:
            x, weight, out = self.operands[product]
            torch.mm(x, weight, out=out)

    def flops(self) -> float:
        return float(sum(product.flops() for product in self.products))

    def dequantise(self, blocks: list[dict[str, Any]]) -> None:
        """Twice: of every block what one of them holds, as those of a shape all are."""
        for _ in range(2):
            for linear in self.linears:
                self._write(blocks[0][linear.name.rpartition(".")[2]])
            for stack, counts in self.of_stack:
                matrices = blocks[0][stack.name.rpartition(".")[2]]
                for expert, _ in touched(counts):
                    self._write(matrices[expert])

    def _write(self, matrix: Any) -> None:
        rows, columns = matrix.shape
        dequantize_into(matrix, self.room[: rows * columns].view(rows, columns))

    def read(self, streamed: list[int], buffer: torch.Tensor) -> None:
        for block in (*streamed, *reversed(streamed)):
            self.store._read(block, buffer[: self.store._bytes(block)])


class Cache(NamedTuple):
    """The system's file cache of a folder."""

    files: list[Path]

    def drop(self) -> None:
        for path in self.files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def share(self) -> float:
        """Of the bytes, those that it holds."""
        libc = ctypes.CDLL(None, use_errno=True)
        held = total = 0
        for path in self.files:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
            ):
                pages = -(-len(m) // mmap.PAGESIZE)
                flags = (ctypes.c_ubyte * pages)()
                address = ctypes.addressof(view := ctypes.c_char.from_buffer(m))
                assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(m)), flags) == 0
                held, total = held + sum(flag & 1 for flag in flags), total + pages
                del view
        return held / total


def routed_counts(model: nn.Module, run: Callable[[], None]) -> Counts:
    """Rows of each block's experts in the first pass of `run`."""
    found: dict[int, list[int]] = {}

    def see(module: Any, args: Any, output: Any) -> None:
        found.setdefault(id(module), torch.bincount(output[2].flatten(), minlength=module.num_experts).tolist())

    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    handles = [router.register_forward_hook(see) for router in routers]
    run()
    for handle in handles:
        handle.remove()
    return [found[id(router)] for router in routers]


def timed(
    call: Callable[[], Any], clock: Callable[[], float], before: Callable[[], None], cache: Cache
) -> dict[str, float]:
    before()
    share, wall, started = cache.share(), time.perf_counter(), clock()
    call()
    seconds, wall = clock() - started, time.perf_counter() - wall
    return {"seconds": seconds, "wall": wall, "cached before": share, "cached after": cache.share()}


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--shape", default="qwen3-30b-a3b-8-layers")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--resident", type=int, default=0, help="blocks that stay in memory")
    parser.add_argument("--keep", choices=get_args(Keep), default="nothing")
    parser.add_argument("--folder", type=Path, help="where the model is kept between calls")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, of one thread; others may run")
    parser.add_argument("--cold", action="store_true", help="with an empty file cache before each measurement")
    given = parser.parse_args()
    given.threads = 1 if given.cpu_time else given.threads
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)) / given.shape
        if not folder.exists():
            synthesize(given.shape, QuantSpec(), folder)
        measure(given, folder)


def measure(given: Any, folder: Path) -> None:
    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    source = open_model(str(folder))
    store = open_store(source, given.resident)
    model = load_model(source, source.layer_formats, dtype, stream_linears_of=[*source.linears, *source.experts])
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=16, alpha=32)
    causal_lm = CausalLM.of(model.train(), keep=given.keep, store=store)
    step, batch = Step(model), documents(given.tokens, model.config.vocab_size)
    run = partial(step, causal_lm, batch)
    counts = routed_counts(model, run)
    floor = Floor(model, store, counts, given.tokens, dtype)

    first = block_names(model)[0]
    store.begin(will_return=False)
    one: dict[str, Any] = {}
    for module in (*floor.linears, *floor.stacks):
        if module.name.startswith(f"{first}."):
            experts = isinstance(module, StreamedExperts)
            found = [store.fetch(expert_name(module.name, i)) for i in range(module.num_experts)] if experts else None
            one[module.name.rpartition(".")[2]] = found or store.fetch(module.name)
    one = {name: _copied(each) for name, each in one.items()}
    streamed = [i for i in range(len(counts)) if i not in store._resident]
    buffer = torch.empty(max(map(store._bytes, range(len(counts)))), dtype=torch.uint8)

    cache = Cache(sorted(folder.glob("*.safetensors")))
    before = cache.drop if given.cold else lambda: None
    others = wait_for_quiet(given.wait)
    about = about_machine(given.threads) | {
        "others_share_of_a_core_before": others,
        "compute dtype": str(dtype).removeprefix("torch."),
        "GFLOP/s of a 2048^3 product in it": matmul_rate(dtype, time.perf_counter) / 1e9,
        "kernels": library.describe()["isa"],
        "versions": versions("nybble", "torch", "transformers"),
        "through": causal_lm.name,
        "compared": "processor seconds" if given.cpu_time else "seconds",
        "file cache": "emptied before each measurement" if given.cold else "as measurements leave it",
        "experts of a block that got tokens": Spread.of([sum(map(bool, each)) for each in counts]).show(0),
        "rows of an expert, all blocks": Spread.of([count for each in counts for count in each if count]).show(0),
    }
    calls: dict[str, Callable[[], Any]] = {
        "products": floor.multiply,
        "dequantising": partial(floor.dequantise, [one]),
        "reading": partial(floor.read, streamed, buffer),
        "step": run,
    }
    for call in calls.values():
        call()
    clock = time.process_time if given.cpu_time else time.perf_counter
    turns = Turns(given.wait)
    for _ in range(2 if given.quick else given.rounds):
        turns.take(
            {n: partial(timed, call, clock, before, cache) for n, call in calls.items()},
            lambda: {"": time.process_time()},
        )
    print_record(given, turns, floor, about)


def _copied(each: Any) -> Any:
    from dataclasses import replace

    if isinstance(each, list):
        return [_copied(one) for one in each]
    return replace(each, packed=each.packed.clone(), scales=each.scales.clone())


def print_record(given: Any, turns: Turns, floor: Floor, about: dict[str, Any]) -> None:
    parts = ("products", "dequantising", "reading")
    seconds = {name: turns.seconds(name) for name in (*parts, "step")}
    whole = [sum(each) for each in zip(*(seconds[name] for name in parts), strict=True)]
    computed = [a + b for a, b in zip(seconds["products"], seconds["dequantising"], strict=True)]
    rows = [[name, Spread.of(seconds[name]).show(3), ""] for name in parts]
    rows.append(["floor: their sum", Spread.of(whole).show(3), "1"])
    ratio = Spread.of([a / b for a, b in zip(seconds["step"], whole, strict=True)])
    rows.append(["step", Spread.of(seconds["step"]).show(3), ratio.show()])
    bare = Spread.of([a / b for a, b in zip(seconds["step"], computed, strict=True)])
    rows.append(["step over products and dequantising alone", "", bare.show()])
    steps = [turns.rounds[i]["step"] for i in turns.quiet_rounds()]
    about |= {
        "GFLOP/s of the products": floor.flops() / Spread.of(seconds["products"]).median / 1e9,
        "share of the folder in the file cache before a step": Spread.of([s["cached before"] for s in steps]).show(),
        "after it": Spread.of([s["cached after"] for s in steps]).show(),
        "load": turns.load(),
    }
    what = f"{given.shape}, {given.tokens} tokens, {given.resident} blocks resident, keeping {given.keep}"
    tables = [Table(what, ["", "seconds", "times the floor"], rows)]
    report(
        given,
        f"experts-{given.shape}",
        "A step of a streamed mixture of experts over its floor",
        about,
        tables,
        turns.record(),
    )


if __name__ == "__main__":
    main()
