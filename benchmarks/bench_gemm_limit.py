"""Compares nybble's training step with the time of its matrix products alone.

    python benchmarks/bench_gemm_limit.py [--quick] [--only 135M]

The limit is the sum of the step's frozen products through torch.mm, on operands that are there already: forward
and the gradient of each input, except of q, k and v in the first block, which nothing below needs; the head too. Layers
of one shape share their operands, which makes the limit a little shorter than a model's own weights would. Not in it:
dequantisation, attention, norms, RoPE, SwiGLU, the softmax, the adapters, the optimizer. Step and limit take turns in
one process; the ratio is of pairs.

Both compute in the dtype that `--compute-dtype auto` stands for here: bf16 where the processor multiplies it, or fp32.

    keep     step over limit by what blocks keep; 1024 tokens in documents of 256, each token supervised
    growth   step time from 256 to 4096 tokens in documents of 256, so that attention grows no faster than the rest
"""

import nybble.openmp  # noqa: F401, I001  before torch: how its threads wait
import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from bench_attention import matmul_rate
from common import Spread, Table, Turns, about_machine, options, report, versions, wait_for_quiet
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nybble.data.packing import Batch
from nybble.formats.quant_spec import BaseFormats
from nybble.kernels.backends.cpp import library
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, quantizable_linears
from nybble.layers.decoder_block import Keep
from nybble.layers.precision import resolve_compute_dtype
from nybble.sources.load import load_model
from nybble.sources.stored_model import StoredModel
from nybble.training.optimizer import AdamW

DOCUMENT, TOKENS = 256, 1024
GROWTH = (256, 512, 1024, 2048, 4096)
MODELS = {
    "135M": LlamaConfig(  # SmolLM2-135M
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "1B": LlamaConfig(  # Llama-3.2-1B but for the vocabulary
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=8192, tie_word_embeddings=True,
    ),
}  # fmt: skip


class RandomModel(StoredModel):
    """A model of random weights, made one tensor at a time; it has no tokenizer."""

    dense_dtype = torch.bfloat16

    def __init__(self, name: str, config: PretrainedConfig):
        self.name, self.config = name, config

    def tensor_names(self) -> list[str]:
        return [name for name, _ in self.skeleton.named_parameters()]

    def read(self, name: str) -> Tensor:
        return torch.randn(self.skeleton.get_parameter(name).shape, dtype=torch.bfloat16) * 0.02

    def fingerprint(self) -> str:
        raise NotImplementedError

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        raise NotImplementedError


# ---- the step ------------------------------------------------------------------------------------


def documents(tokens: int, vocabulary: int) -> Batch:
    """Random tokens in documents of 256, packed, every position supervised."""
    ids = torch.randint(0, vocabulary, (1, tokens))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(DOCUMENT).repeat(tokens // DOCUMENT)[None],
        targets=torch.randint(0, vocabulary, (1, tokens)),
        cu_seqlens=torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32),
        attention_mask=None,
        rows=("random",) * (tokens // DOCUMENT),
        document_lengths=(DOCUMENT,) * (tokens // DOCUMENT),
        supervised_tokens=tokens,
    )


class Step:
    """What `train_loop` does between collating a batch and reporting the step."""

    def __init__(self, model: PreTrainedModel):
        self.optimizer = AdamW(
            [p for p in model.parameters() if p.requires_grad], beta1=0.9, beta2=0.999, weight_decay=0.0
        )

    def __call__(self, model: CausalLM, batch: Batch) -> None:
        model.loss(batch).backward()
        self.optimizer.step(2e-4, grad_scale=min(1.0, 0.3 / float(self.optimizer.gradient_norm())))


# ---- the limit -----------------------------------------------------------------------------------


class Product(NamedTuple):
    """x · Wᵀ (forward) or dy · W, with W stored [out, in] as a model has it."""

    rows: int
    inner: int
    columns: int
    forward: bool

    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


def frozen_products(config: LlamaConfig, tokens: int) -> Iterator[Product]:
    """Every product with a frozen weight in one step."""
    hidden, width = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    attention_inputs = [(hidden, hidden), (hidden, kv), (hidden, kv)]  # (in, out) of q, k, v
    others = [(hidden, hidden), (hidden, width), (hidden, width), (width, hidden)]  # o, gate, up, down
    for layer in range(config.num_hidden_layers):
        for inputs, outputs in attention_inputs + others:
            yield Product(tokens, inputs, outputs, forward=True)
        for inputs, outputs in (attention_inputs if layer else []) + others:
            yield Product(tokens, outputs, inputs, forward=False)
    yield Product(tokens, hidden, config.vocab_size, forward=True)
    yield Product(tokens, config.vocab_size, hidden, forward=False)


class Products:
    """The frozen products of one step, on operands made beforehand."""

    def __init__(self, config: LlamaConfig, tokens: int, dtype: torch.dtype):
        self.products = list(frozen_products(config, tokens))
        self.operands = {product: _operands(product, dtype) for product in set(self.products)}

    def __call__(self) -> None:
        for product in self.products:
            x, weight, out = self.operands[product]
            torch.mm(x, weight, out=out)

    def flops(self) -> float:
        return float(sum(product.flops() for product in self.products))


def _operands(product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Left operand, right operand, result."""
    rows, inner, columns, forward = product
    weight = torch.randn((columns, inner) if forward else (inner, columns)).to(dtype)
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, columns, dtype=dtype)
    return x, weight.T if forward else weight, out


# ---- measuring -----------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> dict[str, float]:
    started = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - started}


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int, patience_s: float) -> Turns:
    """Every call once a round, after a round that does not count."""
    turns = Turns(patience_s)
    for call in calls.values():
        call()
    for _ in range(rounds):
        turns.take({name: partial(timed, call) for name, call in calls.items()}, lambda: {"": time.process_time()})
    return turns


def compare_keeps(
    name: str, model: PreTrainedModel, dtype: torch.dtype, rounds: int, patience_s: float
) -> tuple[list[list[str]], Turns]:
    config, step = MODELS[name], Step(model)
    products, batch = Products(config, TOKENS, dtype), documents(TOKENS, config.vocab_size)
    models = {keep: CausalLM.of(model, keep=keep) for keep in get_args(Keep)}
    calls: dict[str, Callable[[], Any]] = {"products": products}
    calls |= {keep: partial(step, causal_lm, batch) for keep, causal_lm in models.items()}
    turns = take_turns(calls, rounds, patience_s)
    limit = Spread.of(turns.seconds("products"))
    rate = products.flops() / limit.median / 1e9
    rows = [[f"{name}: products alone", limit.show(3), "1", f"{rate:.0f}"]]
    for keep in models:
        own = Spread.of(turns.seconds(keep))
        rows.append([
            f"{name}: keeping {keep}", own.show(3), turns.ratio(keep, "products").show(),
            f"{products.flops() / own.median / 1e9:.0f}",
        ])  # fmt: skip
    return rows, turns


def compare_lengths(name: str, model: PreTrainedModel, rounds: int, patience_s: float) -> tuple[list[list[str]], Turns]:
    config, step = MODELS[name], Step(model)
    causal_lm = CausalLM.of(model, keep="everything")
    batches = {tokens: documents(tokens, config.vocab_size) for tokens in GROWTH}
    calls = {str(tokens): partial(step, causal_lm, batch) for tokens, batch in batches.items()}
    turns = take_turns(calls, rounds, patience_s)
    shortest = str(GROWTH[0])
    rows = []
    for tokens in GROWTH:
        own = Spread.of(turns.seconds(str(tokens)))
        growth = turns.ratio(str(tokens), shortest).median / (tokens / GROWTH[0])
        rows.append([f"{tokens}", own.show(3), f"{own.median / tokens * 1e3:.3f}", f"{growth:.2f}"])
    return rows, turns


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    arguments: argparse.Namespace = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    models = [arguments.only] if arguments.only else list(MODELS)
    loaded = {}
    for name in models:
        model = load_model(RandomModel(name, MODELS[name]), BaseFormats(), dtype)
        attach_adapters(model, quantizable_linears(model), rank=16, alpha=32)
        loaded[name] = model.train()

    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "compute dtype": str(dtype).removeprefix("torch."),
        "GFLOP/s of a 2048^3 product in it": matmul_rate(dtype, time.perf_counter) / 1e9,
        "torch threads": torch.get_num_threads(),
        "kernels": library.describe()["isa"],
        "versions": versions("nybble", "torch", "transformers"),
    }
    kept: list[list[str]] = []
    samples: dict[str, Any] = {}
    for name, model in loaded.items():
        rows, turns = compare_keeps(name, model, dtype, rounds if name == "135M" else -(-rounds // 3), arguments.wait)
        kept += rows
        samples[f"{name} keep"], about[f"load, {name}"] = turns.record(), turns.load()
    columns = ["step", "seconds", "times the products", "GFLOP/s of products"]
    tables = [Table(f"{TOKENS} tokens in documents of {DOCUMENT}, every token supervised.", columns, kept)]
    if "135M" in loaded:
        rows, turns = compare_lengths("135M", loaded["135M"], rounds, arguments.wait)
        samples["135M growth"], about["load, growth"] = turns.record(), turns.load()
        columns = ["tokens", "seconds", "ms a token", f"times linear growth from {GROWTH[0]}"]
        tables.append(Table(f"135M, keeping everything, documents of {DOCUMENT}.", columns, rows))
    name = "gemm-limit" if len(models) > 1 else f"gemm-limit-{models[0]}"
    report(arguments, name, "A training step over its matrix products alone", about, tables, samples)


if __name__ == "__main__":
    main()
