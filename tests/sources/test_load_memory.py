"""Streaming keeps its promise: the peak of anonymous memory while a model is put into four bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import BILLION, WIDE
from transformers import LlamaConfig

from nybble.formats.quant_spec import QuantSpec
from nybble.formats.safetensors import SafetensorsWriter
from nybble.layers.convert import quantizable_linears
from nybble.sources.skeleton import build_skeleton

ALLOWANCE_BYTES = 200_000_000

LOAD = """
import json, sys, time, torch
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import quantize
from nybble.memory.measure import PeakMemory, anonymous_bytes
from nybble.sources.load import load_model
from nybble.sources.skeleton import build_skeleton
from nybble.sources.open import open_model
import transformers.models.llama.modeling_llama

quantize(torch.ones(2, 64), QuantSpec())  # what is imported on first use
source = open_model(sys.argv[1])
build_skeleton(source.config)
start = time.perf_counter()
with PeakMemory(torch.device("cpu"), interval_s=0.002) as memory:
    model = load_model(source, BaseFormats(), torch.bfloat16)
seconds = time.perf_counter() - start
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({
    "peak": memory.peak_bytes - memory.start_bytes,
    "after": anonymous_bytes() - memory.start_bytes,
    "held": held,
    "seconds": seconds,
}))
"""


def write_llama(folder: Path, config: LlamaConfig) -> None:
    """A Llama-shaped folder of seeded random bf16 weights, in shards, one tensor in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    model = build_skeleton(config)
    with SafetensorsWriter(folder, max_shard_bytes=500_000_000) as writer:
        for name, parameter in model.named_parameters():
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
            writer.write(name, tensor.uniform_(-0.02, 0.02, generator=generator))


def measure(folder: Path) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, timeout=500, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def check(folder: Path, config: LlamaConfig, allowance_bytes: int = ALLOWANCE_BYTES) -> dict[str, float]:
    write_llama(folder, config)
    model = build_skeleton(config)
    linears = [model.get_submodule(name).weight.numel() for name in quantizable_linears(model)]
    dense = sum(p.numel() for p in model.parameters()) - sum(linears)
    largest = max(p.numel() for p in model.parameters())
    final_bytes = sum(QuantSpec().bytes(numel) for numel in linears) + 2 * dense
    measured = measure(folder)
    assert measured["held"] == final_bytes
    assert measured["peak"] <= final_bytes + 2 * largest + allowance_bytes, measured
    assert measured["after"] <= final_bytes + allowance_bytes, measured
    return measured


def test_peak_memory_of_a_small_model(tmp_path: Path) -> None:
    """Holding the 16-bit model (190 MB) would go over the limit (170 MB)."""
    narrow = WIDE | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    config = LlamaConfig(**narrow, num_hidden_layers=6, vocab_size=4096, tie_word_embeddings=True)
    check(tmp_path, config, allowance_bytes=100_000_000)


@pytest.mark.slow
def test_peak_memory_of_a_1b_model(tmp_path: Path) -> None:
    print(check(tmp_path, LlamaConfig(**BILLION)))
