"""Each family through nybble's decoder blocks against transformers' own layers, in training, answers and calibration.

A new family is one line of `CONFIGS` in tests/family_models.py.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
from family_models import (
    ALWAYS,
    CONFIGS,
    GROWING,
    MIXTURES,
    SAMPLED,
    SAMPLED_MIXTURES,
    VOCABULARY,
    adapted_in,
    by_blocks,
    by_transformers,
    dense_model,
    gradients_of,
    in_bf16,
    packed_batch,
    relative_error,
    storages,
    transformers_own,
    tuned_model,
    written_out,
)
from tiny_families import save_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nybble.calibration.statistics import InputStatistics
from nybble.families import FAMILIES
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.generation.decoding import CachedDecoder, decoder_ops
from nybble.generation.generate import Sampling, generate
from nybble.layers.backbone import FusedForward, Why, why_not_blocks, why_not_forward
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, quantizable_linears, resolve_targets
from nybble.memory.store import open_store
from nybble.planning.block_costs import kept_bytes
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.quantization.folder import quantize_folder
from nybble.quantization.walk import ModuleWalk, PackedWalk, start_walk
from nybble.quantization.watch import watched
from nybble.sizes import SHAPE_RULES
from nybble.sources.load import load_model
from nybble.sources.open import open_model

pytestmark = pytest.mark.usefixtures("poisoned_slabs")


def test_every_family_is_in_the_table() -> None:
    configs = CONFIGS | MIXTURES
    assert {name.partition(",")[0] for name in configs} == FAMILIES.keys()
    assert all(config.model_type == name.partition(",")[0] for name, config in configs.items())
    assert all(family.model_type == name for name, family in FAMILIES.items())
    assert MIXTURES.keys() == {name for name, family in FAMILIES.items() if family.mixture is not None}


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["nothing", "attention", "everything"])
@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_states_loss_and_gradients_are_the_models_own(kernels: str, name: str, keep: str) -> None:
    model, (expected_states, expected_loss, expected) = transformers_own(name)
    states, loss, gradients = by_blocks(model, packed_batch(), keep)
    assert relative_error(states, expected_states) <= 3e-6
    assert loss == pytest.approx(expected_loss, rel=3e-6)
    assert relative_error(gradients, expected) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_keep_what_plans_count(name: str) -> None:
    model = transformers_own(name)[0]
    blocks, batch = FusedForward(model, "everything"), packed_batch()
    x, rows, beside = blocks.embed(batch)
    found = {}
    for block in blocks.blocks:
        x = block(x, rows, "everything", beside)
        kept = [x.grad_fn.kept, x.grad_fn.saved_tensors[0]]
        found |= {storage.data_ptr(): storage.nbytes() for storage in storages(kept)}
    batches = MicroBatches(len(x), 0, 0, 1, 0, 0, 0)
    run = RunShape(
        shape_of(dense_model(name)), batches, 0, 3, 4, QuantSpec(), "blocks", "everything", SHAPE_RULES["cpu"]
    )
    assert -(-sum(found.values()) // len(blocks.blocks)) == kept_bytes(run)


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_training_takes_the_blocks(name: str) -> None:
    assert CausalLM.of(transformers_own(name)[0]).verdict.path == "blocks"


@pytest.mark.parametrize("name", [*SAMPLED, *SAMPLED_MIXTURES])
def test_bf16_is_no_worse_than_the_models_own(name: str) -> None:
    """States and gradients of some draws together: one of so small a model says little. Tokens pass all experts of a
    mixture, else a rounding more or less sends one elsewhere, which says nothing.
    """
    ours, theirs = torch.zeros(2), torch.zeros(2)
    for seed in range(4 if name in (*ALWAYS, *MIXTURES) else 16):
        narrow, wide = in_bf16(tuned_model(name, seed, all_experts=True))
        batch = packed_batch()
        exact_states, _, exact = by_transformers(wide, batch)
        for errors, (states, _, gradients) in (
            (ours, by_blocks(narrow, batch, "nothing")),
            (theirs, by_transformers(narrow, batch)),
        ):
            errors += torch.tensor([relative_error(states, exact_states), relative_error(gradients, exact)])
    assert (ours <= torch.tensor([1.05, 1.1]) * theirs).all(), (ours, theirs)


# ---- answers -------------------------------------------------------------------------------------

PROMPTS = [[5, 17, 40, 3, 88, 21, 60], [9], [70, 2, 2, 31, 90, 14, 55, 6, 77, 41, 12, 8, 33]]


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@functools.cache  # backends share them
def transformers_answers(name: str) -> list[list[int]]:
    dense = written_out(transformers_own(name)[0])
    answers = [greedy(dense, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in answers}) == len(PROMPTS), "the answers must tell the prompts apart"
    return answers


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_are_the_models_own(kernels: str, name: str) -> None:
    """A few texts at once, and more than are multiplied with packed weights."""
    model, _ = transformers_own(name)
    assert why_not_forward(model, ops=decoder_ops) is None
    expected = transformers_answers(name)
    for times in (1, 4):
        answers = generate(model, PROMPTS * times, stop_ids=(), max_new_tokens=12, sampling=Sampling())
        assert answers == expected * times


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_in_bf16_are_no_worse_than_the_models_own(name: str) -> None:
    narrow, wide = in_bf16(tuned_model(name))
    text, count = PROMPTS[2] + PROMPTS[0], len(PROMPTS[0])
    with torch.no_grad():
        exact, theirs = (model(torch.tensor([text])).logits[0, -count - 1 : -1] for model in (wide, narrow))
    decoder = CachedDecoder(narrow)
    ours = [decoder.start([PROMPTS[2]], count), *(decoder.step(torch.tensor([token])) for token in text[-count:-1])]
    assert relative_error(torch.cat(ours), exact) <= 1.3 * relative_error(theirs, exact) < 0.1


# ---- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_calibrations_walk_sees_what_the_models_own_layers_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, statistics and states, while each group is moved before the next is asked for."""
    monkeypatch.setattr("nybble.quantization.walk.STATES_DTYPE", torch.float32)
    windows = torch.randint(VOCABULARY, (5, 23), generator=torch.Generator().manual_seed(1))
    ours, own = dense_model(name), dense_model(name)
    walk = start_walk(ours, windows, exact=False, blocks=ours.base_model.layers)
    assert isinstance(walk, PackedWalk)
    if name == "gemma4_text":
        assert_as_in_a_whole_pass(walk, ours, own, windows)
        return
    other = ModuleWalk(own, windows, exact=False, blocks=own.base_model.layers)
    for index, (layer, own_layer) in enumerate(zip(ours.base_model.layers, own.base_model.layers, strict=True)):
        groups = [(names, statistics.finish()) for names, statistics in walk.groups(index, layer)]
        found = {name: statistics for names, statistics in groups for name in names}
        for names, statistics in other.groups(index, own_layer):
            expected = statistics.finish()
            for each in names:
                allowed = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(found.pop(each), expected, rtol=1e-4, atol=allowed)
        assert not found
        assert relative_error(walk.states, other.states.flatten(0, 1)) <= 1e-5


def assert_as_in_a_whole_pass(walk: PackedWalk, model: PreTrainedModel, own: PreTrainedModel, windows: Tensor) -> None:
    """Of layers that are given more than states, which the other walk does not take: against one pass of the model."""
    linears = {name: own.get_submodule(name) for name in quantizable_linears(own)}
    expected: dict[str, InputStatistics] = {}

    def see(name: str, linear: nn.Module, x: Tensor, y: Tensor) -> None:
        expected[name] = InputStatistics(x.shape[-1])
        expected[name].add(x.flatten(0, -2))

    with watched(linears, see):
        states = own(windows, output_hidden_states=True).hidden_states[-1]
    for index, layer in enumerate(model.base_model.layers):
        for names, statistics in walk.groups(index, layer):
            found = statistics.finish()
            for each in names:
                wanted = expected.pop(f"model.layers.{index}.{each}").finish()
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not expected
    assert relative_error(model.base_model.norm(walk.states), states.flatten(0, 1)) <= 1e-5


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SAMPLED, *SAMPLED_MIXTURES])
def test_a_streamed_base_changes_no_bit(name: str, tmp_path: Path) -> None:
    dense_model(name).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    quantize_folder(open_model(str(tmp_path / "dense")), BaseFormats(), tmp_path / "base", rounding="absmax")
    source, batch, results = open_model(str(tmp_path / "base")), packed_batch(), []
    for resident in (None, 1):
        store = None if resident is None else open_store(source, resident)
        names = () if store is None else [*source.linears, *source.experts]
        model = load_model(source, source.layer_formats, torch.bfloat16, stream_linears_of=names)
        attach_adapters(model, resolve_targets(model, adapted_in(name)), rank=3, alpha=6.0, seed=1)
        causal_lm = CausalLM.of(model, store=store)
        assert causal_lm.verdict.path == "blocks"
        loss = causal_lm.loss(batch)
        loss.backward()
        results.append((loss.item(), gradients_of(model)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


# ---- what a family does not cover ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "value", "why"),
    [
        ("llama", "hidden_act", "gelu", Why.ACTIVATION),
        ("qwen3", "hidden_act", "gelu_pytorch_tanh", Why.ACTIVATION),
        ("gemma2", "hidden_activation", "gelu", Why.ACTIVATION),
        ("gemma2", "use_bidirectional_attention", True, Why.OPTION),
        ("gemma3_text", "use_bidirectional_attention", True, Why.OPTION),
        ("gemma4_text", "use_bidirectional_attention", "all", Why.OPTION),
        ("gemma4_text", "enable_moe_block", True, Why.OPTION),
        ("mistral", "sliding_window", 0, Why.OPTION),  # what transformers makes of these, it has to say
        ("gemma2", "sliding_window", -1, Why.OPTION),
        ("qwen2", "sliding_window", None, Why.OPTION),
        ("qwen3", "layer_types", ["full_attention", "chunked_attention", "full_attention"], Why.OPTION),
        ("phi3", "rope_parameters", GROWING | {"partial_rotary_factor": 2.0}, Why.OPTION),
    ],
)
def test_what_a_config_asks_for_beyond_its_family_is_named(name: str, option: str, value: object, why: Why) -> None:
    model = dense_model(name)
    setattr(model.config, option, value)
    reason = why_not_forward(model)
    named = {"layer_types": "chunked_attention", "rope_parameters": "partial_rotary_factor = 2.0"}.get(option, option)
    assert reason is not None and reason.why is why and str(value if why is Why.ACTIVATION else named) in str(reason)


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_of_states_is_not_left_out_in_silence(name: str) -> None:
    model = dense_model(name)
    for option in ("attention_dropout", *FAMILIES[model.config.model_type].dropouts):
        setattr(model.config, option, 0.1)
        reason = why_not_blocks(model, packing=True, dropout=False)
        assert reason is not None and option in str(reason)
        setattr(model.config, option, 0.0)
    model.config.attention_dropout = 0.1
    assert why_not_forward(model, ops=decoder_ops) is None, "answers drop nothing"


def test_layers_beyond_their_family_are_named() -> None:
    model = dense_model("gemma3_text")
    model.model.layers[1].self_attn.v_norm = nn.LayerNorm(18)
    model.model.layers[2].mlp_norm = model.model.layers[2].__dict__["_modules"].pop("post_feedforward_layernorm")
    reason = why_not_forward(model)
    assert reason is not None and reason.why is Why.MODULES
    assert "self_attn.v_norm, no post_feedforward_layernorm, mlp_norm" in str(reason)


def test_biases_of_attention_are_covered() -> None:
    """As Gemma's configs may ask for them."""
    config = copy.deepcopy(CONFIGS["gemma3_text"])
    config.attention_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 0.1)
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=3, alpha=6.0, seed=1)
    batch = packed_batch()
    states, _, gradients = by_blocks(model, batch, "nothing")
    expected_states, _, expected = by_transformers(model, batch)
    assert relative_error(states, expected_states) <= 3e-6 and relative_error(gradients, expected) <= 1e-5
