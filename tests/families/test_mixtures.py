"""Mixtures of experts through nybble's decoder blocks against transformers' own layers.

A new one is one line of `MIXTURES` in tests/family_models.py.
"""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from family_models import (
    MIXTURES,
    VOCABULARY,
    by_blocks,
    by_transformers,
    dense_model,
    in_bf16,
    packed_batch,
    relative_error,
    storages,
    tuned_model,
    written_out,
)
from tiny import tune
from tiny_families import save_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.backbone import FusedForward, Why, why_not_blocks, why_not_forward
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.memory.store import open_store
from nybble.planning.block_costs import kept_bytes
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.quantization.folder import quantize_folder
from nybble.quantization.walk import ModuleWalk, start_walk
from nybble.sizes import SHAPE_RULES, filled_numbers, filled_rows
from nybble.sources.load import load_model
from nybble.sources.open import open_model


@functools.cache
def transformers_own(name: str) -> tuple[PreTrainedModel, tuple[Tensor, float, Tensor]]:
    model = tuned_model(name)
    return model, by_transformers(model, packed_batch())


@pytest.mark.parametrize("keep", ["nothing", "attention", "everything"])
@pytest.mark.parametrize("name", MIXTURES)
def test_states_loss_and_gradients_are_the_models_own(kernels: str, name: str, keep: str) -> None:
    model, (expected_states, expected_loss, expected) = transformers_own(name)
    states, loss, gradients = by_blocks(model, packed_batch(), keep)
    assert relative_error(states, expected_states) <= 3e-6
    assert loss == pytest.approx(expected_loss, rel=3e-6)
    assert relative_error(gradients, expected) <= 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_the_loss_is_that_of_dense_weights_with_each_experts_delta(name: str) -> None:
    model, (_, loss, _) = transformers_own(name)
    dense, batch = written_out(model), packed_batch()
    with torch.no_grad():
        logits = [dense(input_ids=ids[None]).logits[0] for ids in batch.input_ids[0].split(batch.document_lengths)]
    expected = F.cross_entropy(torch.cat(logits)[batch.supervised_positions], batch.supervised_targets)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_blocks_keep_no_more_than_plans_count(name: str) -> None:
    """Experts' rows are filled up, each expert's by less than a multiple, which plans count whole."""
    model = transformers_own(name)[0]
    blocks, lengths = FusedForward(model, "everything"), (37, 90, 65)
    x, rows, _ = blocks.embed(packed_batch(lengths))
    found = []
    for block in blocks.blocks:
        x = block(x, rows, "everything")
        kept = {
            storage.data_ptr(): storage.nbytes() for storage in storages([x.grad_fn.kept, x.grad_fn.saved_tensors[0]])
        }
        found.append(sum(kept.values()))
    batches = MicroBatches(len(x), 0, 0, 1, 0, 0, 0)
    run = RunShape(
        shape_of(dense_model(name)), batches, 0, 3, 4, QuantSpec(), "blocks", "everything", SHAPE_RULES["cpu"]
    )
    assert 0.8 <= max(found) / kept_bytes(run) <= 1


@pytest.mark.parametrize("name", MIXTURES)
def test_training_takes_the_blocks_and_rows_side_by_side_are_what_each_is_alone(name: str) -> None:
    causal_lm = CausalLM.of(transformers_own(name)[0])
    assert causal_lm.verdict.path == "blocks"
    ids = [torch.arange(5, 5 + n, dtype=torch.int32) for n in (9, 1, 12)]
    rows = [EncodedExample(each, torch.ones(len(each), dtype=torch.bool), "row") for each in ids]
    together = causal_lm.token_losses(collate(rows, causal_lm.packed))
    alone = torch.cat([causal_lm.token_losses(collate([row], causal_lm.packed)) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_attention_alone_adapted_and_experts_in_16_bits(name: str) -> None:
    """Experts are transformers' parameters; no gradient is made for adapters that are not there."""
    model = tune(dense_model(name), "attention")
    batch = packed_batch()
    states, loss, gradients = by_blocks(model, batch, "nothing")
    expected_states, expected_loss, expected = by_transformers(model, batch)
    assert relative_error(states, expected_states) <= 3e-6 and loss == pytest.approx(expected_loss, rel=3e-6)
    assert relative_error(gradients, expected) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_bf16_is_no_worse_than_the_models_own(name: str) -> None:
    ours, theirs = torch.zeros(2), torch.zeros(2)
    for seed in range(4):
        narrow, wide = in_bf16(tuned_model(name, seed))
        batch = packed_batch()
        exact_states, _, exact = by_transformers(wide, batch)
        for errors, (states, _, gradients) in (
            (ours, by_blocks(narrow, batch, "nothing")),
            (theirs, by_transformers(narrow, batch)),
        ):
            errors += torch.tensor([relative_error(states, exact_states), relative_error(gradients, exact)])
    assert (ours <= 1.1 * theirs).all(), (ours, theirs)


@pytest.mark.parametrize("name", ["qwen2_moe", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_streamed_base_changes_no_bit(name: str, tmp_path: Path) -> None:
    dense_model(name).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    quantize_folder(open_model(str(tmp_path / "dense")), BaseFormats(), tmp_path / "base", rounding="absmax")
    source, batch, results = open_model(str(tmp_path / "base")), packed_batch(), []
    for resident in (None, 1):
        store = None if resident is None else open_store(source, resident)
        names = () if store is None else [*source.linears, *source.experts]
        model = load_model(source, source.layer_formats, torch.bfloat16, stream_linears_of=names)
        attach_adapters(model, resolve_targets(model, "all-linear,experts"), rank=3, alpha=6.0, seed=1)
        causal_lm = CausalLM.of(model, store=store)
        assert causal_lm.verdict.path == "blocks"
        loss = causal_lm.loss(batch)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss.item(), torch.cat([gradients[name].flatten() for name in sorted(gradients)])))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_answers_and_calibration_go_through_the_models_own_modules() -> None:
    model = dense_model("mixtral")
    reason = why_not_forward(model)
    assert reason is not None and reason.why is Why.EXPERTS
    windows = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    assert isinstance(start_walk(model, windows, exact=False, blocks=model.base_model.layers), ModuleWalk)


@pytest.mark.parametrize(("name", "option"), [("olmoe", "clip_qkv"), ("mixtral", "router_jitter_noise")])
def test_what_a_config_asks_for_beyond_its_family_is_named(name: str, option: str) -> None:
    model = dense_model(name)
    setattr(model.config, option, 0.5)
    reason = why_not_blocks(model, packing=True, dropout=False)
    assert reason is not None and reason.why is Why.OPTION and option in str(reason)


def test_experts_rows_are_filled_up_to_few_numbers() -> None:
    """Of no more rows than an eighth or a tile more, and of no more numbers than plans count."""
    for most in (1, 16, 255, 257, 512, 2048, 5000):
        filled = [filled_rows(count) for count in range(1, most + 1)]
        assert all(count <= rows < count + max(16, count / 8) for count, rows in enumerate(filled, start=1))
        assert len(set(filled)) <= filled_numbers(most) <= len(set(filled)) + 8
    assert filled_rows(0) == 0
