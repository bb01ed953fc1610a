"""Decoder blocks against transformers' own layers and autograd: states, gradients, packing, every `keep`, whole steps.

Under each backend of the kernels that runs here.
"""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny import SMALL, put_into_four_bits, tune
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nybble.data.examples import EncodedExample
from nybble.data.packing import IGNORE, Batch, pack, pack_tokens
from nybble.layers.backbone import FusedForward, ModuleForward
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of
from nybble.layers.own_head import loss_head
from nybble.training.optimizer import AdamW

pytestmark = pytest.mark.usefixtures("poisoned_slabs")


def rope(kind: str, **extra: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **extra}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama tied, biased": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SMALL, head_dim=32),
    "llama, one kv head": LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "linear rope": LlamaConfig(**SMALL, **rope("linear", factor=2.0)),
    "dynamic rope": LlamaConfig(**SMALL, **rope("dynamic", factor=2.0)),
    "llama3 rope": LlamaConfig(**SMALL, **rope("llama3", **LLAMA3)),
    "yarn rope": LlamaConfig(**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral, window": MistralConfig(**SMALL, sliding_window=5),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2, window in one layer": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}
DOCUMENTS = (7, 1, 20, 13)


def tuned_model(name: str, targets: str = "all-linear") -> nn.Module:
    """A small four-bit model whose adapters are no longer zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in parameter_name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    put_into_four_bits(model)
    return tune(model, targets)


def packed_batch(lengths: tuple[int, ...]) -> Batch:
    torch.manual_seed(3)
    batch = pack_tokens(torch.randint(96, (sum(lengths),)).split(lengths))
    return dataclasses.replace(batch, targets=torch.where(torch.rand(1, sum(lengths)) < 0.7, 0, IGNORE))


def loss_and_gradients(model: nn.Module, forward, batch: Batch):
    model.zero_grad()
    states = forward.hidden(batch, batch.supervised_positions)
    targets = torch.arange(len(states)) % 96
    logits = states @ model.get_output_embeddings().weight.T
    loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return states.detach(), loss.item(), gradients


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def exact_twin(model: nn.Module) -> nn.Module:
    """The same model in fp64, its four-bit weights written out."""
    twin = copy.deepcopy(model)
    for adapter in adapters_of(twin).values():
        linear = nn.Linear(adapter.in_features, adapter.out_features, bias=adapter.base.bias is not None)
        linear.weight = nn.Parameter(adapter.base.dequantize(), requires_grad=False)
        if adapter.base.bias is not None:
            linear.bias = adapter.base.bias
        adapter.base = linear
    return twin.double()


def generic(model: nn.Module) -> ModuleForward:
    return ModuleForward(model, "packed", checkpointing=False)


@functools.cache  # backends and what is kept share it
def transformers_own(name: str):
    """A model, its states, loss and gradients through transformers' layers, and the gradients in fp64."""
    model, batch = tuned_model(name), packed_batch(DOCUMENTS)
    twin = exact_twin(model)
    return model, *loss_and_gradients(model, generic(model), batch), loss_and_gradients(twin, generic(twin), batch)[2]


@pytest.mark.parametrize("keep", ["nothing", "attention", "everything"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_loss_and_gradients_equal_transformers_in_fp32(kernels, name, keep):
    model, expected_states, expected_loss, expected, exact = transformers_own(name)
    states, loss, gradients = loss_and_gradients(model, FusedForward(model, keep), packed_batch(DOCUMENTS))
    assert relative_error(states, expected_states) <= 1e-5
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) == 2 * 2 * 7
    assert relative_error(flat(gradients), flat(expected)) <= 1e-5
    for parameter, gradient in gradients.items():
        # A gradient of near-zero norm is noise to 1e-5 in transformers' own fp32 too: then compare with the exact one.
        if relative_error(gradient, expected[parameter]) > 1e-5:
            own_error = relative_error(expected[parameter], exact[parameter])
            assert relative_error(gradient, exact[parameter]) <= max(1e-5, 2 * own_error), parameter


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("targets", ["attention", "o_proj,up_proj", "k_proj", "down_proj"])
def test_blocks_with_few_adapters(kernels, targets):
    model = tuned_model("llama", targets)
    batch = packed_batch((9, 4))
    _, _, expected = loss_and_gradients(model, generic(model), batch)
    _, _, gradients = loss_and_gradients(model, FusedForward(model, "nothing"), batch)
    for parameter, gradient in gradients.items():
        assert relative_error(gradient, expected[parameter]) <= 1e-5, parameter


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_loss_and_gradients_equal_unpacked_ones(kernels, name):
    model = tuned_model(name)
    forward, head = FusedForward(model, "nothing"), loss_head(model)
    batch = packed_batch(DOCUMENTS)
    positions = batch.supervised_positions
    _, loss, gradients = loss_and_gradients(model, forward, batch)
    targets = torch.arange(len(positions)) % 96

    model.zero_grad()
    total, start = 0.0, 0
    for length in DOCUMENTS:
        inside = (positions >= start) & (positions < start + length)
        alone = pack_tokens([batch.input_ids[0, start : start + length]])
        part = head.loss(forward.hidden(alone, positions[inside] - start), targets[inside], len(targets))
        part.backward()
        total, start = total + part.item(), start + length
    assert total == pytest.approx(loss, rel=1e-5)
    for parameter, gradient in gradients.items():
        assert relative_error(model.get_parameter(parameter).grad, gradient) <= 1e-5, parameter


@functools.cache
def bf16_case(name: str, seed: int):
    """A model in bf16, its exact gradients, and how far transformers' own in bf16 are from them."""
    narrow = tuned_model(name)
    torch.manual_seed(100 + seed)
    for parameter in narrow.parameters():
        if parameter.is_floating_point():
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    wide = copy.deepcopy(narrow)
    for parameter in wide.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    batch = packed_batch(DOCUMENTS)
    _, _, expected = loss_and_gradients(wide, generic(wide), batch)
    return narrow, expected, total_error(loss_and_gradients(narrow, generic(narrow), batch)[2], expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_bf16_is_no_worse_than_transformers_own_bf16(kernels, name):
    ours = theirs = 0.0
    for seed in range(4):  # one draw of so small a model says little
        narrow, expected, error = bf16_case(name, seed)
        theirs += error
        block = FusedForward(narrow, "nothing")
        ours += total_error(loss_and_gradients(narrow, block, packed_batch(DOCUMENTS))[2], expected)
    assert ours <= 1.05 * theirs  # four draws of so small a model scatter by a few per cent


def total_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return sum(relative_error(gradients[name], expected[name]) for name in expected) / len(expected)


NUM_STEPS, LEARNING_RATE = 4, 5e-3
SETTINGS = {"weight_decay": 0.1, "eps": 1e-4}  # so large an eps that no sign of a gradient near zero decides a step


def step_documents(step: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(step)
    return [
        EncodedExample(
            torch.randint(96, (length,), generator=generator, dtype=torch.int32),
            torch.rand(length, generator=generator) < 0.6,
            f"{step}:{length}",
        )
        for length in DOCUMENTS
    ]


def trained_by_nybble(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapters after some steps of two micro-batches, each through packed decoder blocks."""
    causal_lm = CausalLM.of(model, keep="attention")
    names, adapters = zip(*trainable(model).items(), strict=True)
    optimizer = AdamW(adapters, beta1=0.9, beta2=0.99, **SETTINGS)
    for step in range(NUM_STEPS):
        documents = step_documents(step)
        batches = [pack(documents[:2]), pack(documents[2:])]
        for batch in batches:
            causal_lm.loss(batch, sum(batch.supervised_tokens for batch in batches)).backward()
        optimizer.step(LEARNING_RATE, grad_scale=min(1.0, 1.0 / float(optimizer.gradient_norm())))
    return {name: adapter.detach().clone() for name, adapter in zip(names, adapters, strict=True)}


def trained_by_transformers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same steps through transformers' own forward, one document after the other, with torch's AdamW."""
    adapters = trainable(model)
    optimizer = torch.optim.AdamW(adapters.values(), LEARNING_RATE, betas=(0.9, 0.99), **SETTINGS)
    for step in range(NUM_STEPS):
        documents = step_documents(step)
        supervised = sum(int(document.supervised[1:].sum()) for document in documents)
        for document in documents:
            logits = model(input_ids=document.input_ids.long()[None]).logits[0, :-1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(logits, document.input_ids[1:].long(), reduction="none")
            (losses[document.supervised[1:]].sum() / supervised).backward()
        nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: adapter.detach() for name, adapter in adapters.items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@functools.cache
def trained_exactly(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adapters before and after the steps, in fp64."""
    twin = exact_twin(tuned_model(name))
    before = {name: adapter.detach().clone() for name, adapter in trainable(twin).items()}
    return before, trained_by_transformers(twin)


def in_bf16(model: nn.Module) -> nn.Module:
    """The model with its frozen parameters in bf16."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def moved(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    return flat({name: adapter.double() - before[name] for name, adapter in after.items()})


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_whole_steps_move_the_adapters_as_transformers_and_torchs_adamw_do(kernels, name):
    before, exact = trained_exactly(name)
    after = trained_by_nybble(tuned_model(name))
    assert relative_error(moved(after, before), moved(exact, before)) <= 3e-5


@functools.cache
def bf16_error_of_transformers(name: str) -> float:
    before, exact = trained_exactly(name)
    return relative_error(moved(trained_by_transformers(in_bf16(tuned_model(name))), before), moved(exact, before))


def test_whole_steps_in_bf16_are_no_further_from_exact_ones_than_transformers_own(kernels):
    ours = theirs = 0.0
    for name in ("llama", "qwen3"):
        before, exact = trained_exactly(name)
        ours += relative_error(moved(trained_by_nybble(in_bf16(tuned_model(name))), before), moved(exact, before))
        theirs += bf16_error_of_transformers(name)
    assert ours <= 1.1 * theirs


def test_train_eval_train_gives_the_same_gradients_bit_for_bit():
    model = tuned_model("llama")
    forward = FusedForward(model, "everything")
    batch = packed_batch(DOCUMENTS)
    _, _, first = loss_and_gradients(model, forward, batch)
    model.eval()
    with torch.no_grad():
        forward.hidden(batch, batch.supervised_positions)
        model(input_ids=batch.input_ids)
    model.train()
    _, _, second = loss_and_gradients(model, forward, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_that_keep_everything_beside_others_that_do_not_change_no_bit():
    model, batch = tuned_model("llama"), packed_batch(DOCUMENTS)
    _, _, expected = loss_and_gradients(model, FusedForward(model, "nothing"), batch)
    forward = FusedForward(model, "nothing", whole_blocks=1)
    assert forward.keeps == ["nothing", "everything"]
    _, _, gradients = loss_and_gradients(model, forward, batch)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_copies_of_the_adapters_follow_the_masters():
    model = tuned_model("llama")
    forward, batch = FusedForward(model, "nothing"), packed_batch(DOCUMENTS)
    before = forward.hidden(batch, batch.supervised_positions)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_B.mul_(2)
    after = forward.hidden(batch, batch.supervised_positions)
    assert relative_error(after, before) > 1e-3
    assert torch.equal(after, FusedForward(model, "nothing").hidden(batch, batch.supervised_positions))


def test_what_blocks_do_not_know_runs_on_the_generic_path_and_says_why():
    model = tuned_model("llama")
    assert isinstance(CausalLM.of(model).backbone, FusedForward)
    unpacked = CausalLM.of(model, packing=False)
    assert isinstance(unpacked.backbone, ModuleForward) and "not packed" in unpacked.name
    next(iter(adapters_of(model).values())).dropout = 0.1
    assert "dropout" in CausalLM.of(model).name
    model = tuned_model("llama")
    model.config.hidden_act = "gelu"
    assert "gelu" in CausalLM.of(model).name
    model.config.model_type = "gpt_neox"
    assert "gpt_neox" in CausalLM.of(model).name
