"""A GGUF file's own blocks streamed from it: the same bits as in memory, experts and both ends included."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import make_folder as make_folder
from tiny_families import tokens as tokens
from tiny_gguf import TYPES, WIDE_ENOUGH, mixed_file, write_model
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.errors import ModelError
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.layers.streamed import StreamedExperts, StreamedLinear
from nybble.memory.store import open_store
from nybble.sources.gguf import GgufSource
from nybble.sources.load import load_model
from nybble.sources.open import open_model


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe"])
def test_streamed_blocks_give_the_same_bits(make_folder: Callable, tmp_path: Path, tokens: Tensor, family: str) -> None:
    source = open_model(str(mixed_file(make_folder, tmp_path / "m.gguf", family))).as_stored()
    assert source.is_streamable
    found = [losses_and_gradients(source, tokens, resident) for resident in (None, 0, 1)]
    assert len(found[0]) > 10 and all(float(each.norm()) > 0 for each in found[0])
    for streamed in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], streamed, strict=True))


def losses_and_gradients(source: GgufSource, tokens: Tensor, resident: int | None) -> list[Tensor]:
    """Of two passes; the whole base is in memory where `resident` is None."""
    store = None if resident is None else open_store(source, resident)
    names = () if store is None else source.streamed_layers
    model = load_model(
        source, source.layer_formats, torch.bfloat16, stream_linears_of=names, stream_ends=store is not None
    )
    streamed = [module for module in model.modules() if isinstance(module, StreamedLinear | StreamedExperts)]
    assert len(streamed) == len(names)
    targets = "all-linear,experts" if source.experts else "all-linear"
    generator = torch.Generator().manual_seed(2)
    for adapter in attach_adapters(model, resolve_targets(model, targets), rank=3, alpha=6.0, seed=1).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.02, generator=generator)
    causal_lm = CausalLM.of(model, store=store)
    mask = torch.ones(tokens.shape[1], dtype=torch.bool)
    batch = causal_lm.collate([EncodedExample(row.int(), mask, "row") for row in tokens])
    losses = []
    for _ in range(2):
        loss = causal_lm.loss(batch)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)]


def test_a_matrix_of_another_shape_than_the_config_asks_for_is_refused(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("qwen3_moe", **WIDE_ENOUGH, moe_intermediate_size=256)
    model.config.head_dim = 32  # as the file says then
    source = open_model(str(write_model(tmp_path / "m.gguf", model, "qwen3moe", own_blocks=TYPES))).as_stored()
    with pytest.raises(ModelError, match=r"has the shape \[64, 256\](.|\n)*asks for \[128, 256\]"):
        open_store(source, 0)
