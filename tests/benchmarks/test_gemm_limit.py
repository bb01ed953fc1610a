"""The limit counts every frozen product of a step, no more and no less."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the benchmarks read /proc")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bench_gemm_limit import MODELS, Product, Products, documents, frozen_products  # noqa: E402

from nybble.layers.convert import quantizable_linears  # noqa: E402
from nybble.sources.skeleton import build_skeleton  # noqa: E402


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_model(name):
    """Against the model that transformers builds: 2 T a weight forward, and backward but for the first q, k, v."""
    config, tokens = MODELS[name], 512
    model = build_skeleton(config)
    linears = {name: model.get_submodule(name).weight.numel() for name in quantizable_linears(model)}
    first = sum(n for name, n in linears.items() if ".layers.0.self_attn." in name and "o_proj" not in name)
    head = model.get_output_embeddings().weight.numel()
    expected = 2 * tokens * (2 * sum(linears.values()) - first + 2 * head)
    assert sum(2 * p.rows * p.inner * p.columns for p in frozen_products(config, tokens)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_run_on_their_operands(dtype):
    config = type(MODELS["135M"])(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    products = Products(config, 8, dtype)
    products()
    x, weight, out = products.operands[Product(8, 32, 64, forward=True)]
    assert (out.float() - x.float() @ weight.float()).abs().max() < 0.1
    assert weight.T.is_contiguous(), "a forward product reads the weight as it is stored, [out, in]"


def test_documents_cover_the_tokens():
    batch = documents(1024, 100)
    assert batch.num_tokens == 1024 and batch.supervised_tokens == len(batch.supervised_positions)
