"""Mixtures of experts through nybble's decoder blocks against transformers' own layers.

A new one is one line of `MIXTURES` in tests/family_models.py.
"""

import pytest
import torch
import torch.nn.functional as F
from family_models import (
    MIXTURES,
    VOCABULARY,
    by_blocks,
    by_transformers,
    dense_model,
    packed_batch,
    relative_error,
    storages,
    transformers_own,
    written_out,
)
from tiny import tune

from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.formats.quant_spec import QuantSpec
from nybble.layers.backbone import FusedForward, Why, why_not_blocks, why_not_forward
from nybble.layers.causal_lm import CausalLM
from nybble.planning.block_costs import kept_bytes
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.quantization.walk import ModuleWalk, start_walk
from nybble.sizes import SHAPE_RULES, filled_numbers, filled_rows

pytestmark = pytest.mark.usefixtures("poisoned_slabs")


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
def test_rows_side_by_side_are_what_each_is_alone(name: str) -> None:
    causal_lm = CausalLM.of(transformers_own(name)[0])
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
