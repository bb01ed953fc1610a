"""Decoder layers that compute through nybble's blocks inside a transformers model, against the model's own layers."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import SAMPLED, VOCABULARY, dense_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import nybble
from nybble.bridge.accelerate import AcceleratedLayer
from nybble.bridge.masked_rows import read_mask
from nybble.errors import ModelError
from nybble.layers.convert import quantizable_linears

IDS = torch.randint(VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(2))
RIGHT = torch.ones_like(IDS).index_put((torch.tensor([1, 1, 2]), torch.tensor([12, 13, 13])), torch.tensor(0))
LEFT = RIGHT.flip(1)
UNPADDED = torch.ones_like(IDS)


def adapted(name: str = "llama", **options: Any) -> Any:
    """In nf4, with PEFT's adapters that do something; its twin keeps the model's own layers."""
    model = nybble.quantize_(dense_model(name))
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=quantizable_linears(model), **options)
    model = get_peft_model(model, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    return model


def step(model: Any, mask: Tensor = UNPADDED, **keywords: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, the logits of tokens, and gradients of a training step."""
    model.train()
    model.zero_grad()
    labels = IDS.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)  # padding predicts no first token
    out = model(input_ids=IDS, attention_mask=mask, labels=labels, use_cache=False, **keywords)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return out.loss.detach(), out.logits[mask == 1].detach(), grads


def assert_agree(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    for one, other in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert got[2].keys() == expected[2].keys()
    for name, grad in got[2].items():
        far = (grad - expected[2][name]).norm() / expected[2][name].norm()
        assert far < 10 * tolerance, (name, far)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    for odd in (nn.Linear(2, 2), None):
        with pytest.raises(ModelError, match="cannot be accelerated"):
            nybble.accelerate(odd)


@pytest.fixture
def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which layers went through a block, one entry a call."""
    calls: list[str] = []
    own = AcceleratedLayer._through_block

    def counted(self: Any, *args: Any, **keywords: Any) -> Tensor:
        calls.append(type(self).__name__)
        return own(self, *args, **keywords)

    monkeypatch.setattr(AcceleratedLayer, "_through_block", counted)
    return calls


@pytest.mark.parametrize("name", SAMPLED)
def test_steps_of_each_family_are_those_of_its_own_layers(name: str, blocks_run: list[str]) -> None:
    model = adapted(name)
    expected = step(model, RIGHT)
    if name.startswith(("ministral3", "gemma4")):
        with pytest.raises(ModelError, match=r"queries grow|read more than states"):
            nybble.accelerate(model)
        return
    nybble.accelerate(model)
    assert_agree(step(model, RIGHT), expected)
    assert len(blocks_run) == 3


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str
)
@pytest.mark.parametrize("mask", [UNPADDED, RIGHT, LEFT], ids=["unpadded", "right", "left"])
def test_kinds_of_adapters_and_of_padding(options: dict[str, Any], mask: Tensor, blocks_run: list[str]) -> None:
    model = adapted(**options)
    twin = copy.deepcopy(model)
    done = nybble.accelerate(model)
    assert_agree(step(model, mask), step(twin, mask))
    assert len(blocks_run) == 3 and not done.reasons


def test_a_base_that_is_in_no_few_bits(blocks_run: list[str]) -> None:
    model = dense_model("llama")
    model = get_peft_model(model, LoraConfig(r=3, target_modules=quantizable_linears(model), init_lora_weights=False))
    expected = step(model, RIGHT)
    nybble.accelerate(model)
    assert_agree(step(model, RIGHT), expected)
    assert len(blocks_run) == 3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_documents_side_by_side(implementation: str, blocks_run: list[str]) -> None:
    model = adapted()
    model.base_model.model.set_attn_implementation(implementation)
    places = torch.tensor([[*range(5), *range(9)]] * 3)

    def run() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        model.train()
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS, position_ids=places, use_cache=False)
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return out.loss.detach(), out.logits.detach(), grads

    expected = run()
    nybble.accelerate(model)
    assert_agree(run(), expected)
    assert len(blocks_run) == 3


def test_documents_whose_borders_come_for_flash_attention(blocks_run: list[str]) -> None:
    model = adapted().train()
    places = torch.tensor([[*range(5), *range(9)]])
    expected = model(IDS[:1], position_ids=places, use_cache=False).logits
    nybble.accelerate(model)
    model.base_model.model.config._attn_implementation = "flash_attention_2"  # no mask is made for it
    lengths = {"cu_seq_lens_q": torch.tensor([0, 5, 14]), "max_length_q": 9}
    got = model(IDS[:1], position_ids=places, use_cache=False, **lengths).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(blocks_run) == 3


def test_with_the_adapter_and_without_it_in_turns() -> None:
    """As preferences ask: between a forward pass and its backward pass another one without the adapter."""
    model = adapted(use_dora=True)
    twin = copy.deepcopy(model)
    done = nybble.accelerate(model)
    _, _, alone = step(model, RIGHT)
    made = [layer._blocks[0][1] for layer in done.layers]
    model.zero_grad()
    labels = IDS.masked_fill((RIGHT == 0) | (RIGHT.cumsum(1) == 1), -100)
    given = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, "use_cache": False}
    out = model(**given)
    with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():
        torch.testing.assert_close(model(**given).loss, twin(**given).loss, rtol=1e-4, atol=1e-4)
        assert abs(twin(**given).loss - out.loss) > 1e-2
    out.loss.backward()
    assert all(torch.equal(p.grad, alone[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert all(block is layer._blocks[1][1] for block, layer in zip(made, done.layers, strict=True)), (
        "none is made anew"
    )


def test_a_reference_that_is_another_adapter(blocks_run: list[str]) -> None:
    """As DPOTrainer has it where the model comes with an adapter: a frozen copy takes its place for a pass."""
    model = adapted()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    nybble.accelerate(model)
    _, _, alone = step(model)
    model.zero_grad()
    given = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    out = model(**given | {"labels": IDS.masked_fill(UNPADDED.cumsum(1) == 1, -100)})
    for each in (model, twin):
        each.set_adapter("ref")
    with torch.no_grad():
        torch.testing.assert_close(model(**given).loss, twin(**given).loss, rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    out.loss.backward()
    assert all(torch.equal(p.grad, alone[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert len(blocks_run) == 9


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_gradient_checkpointing(use_reentrant: bool, blocks_run: list[str]) -> None:
    model = adapted()
    expected = step(model, RIGHT)
    nybble.accelerate(model)
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_agree(step(model, RIGHT), expected)
    assert len(blocks_run) == 3, "a block recomputes by itself and is not called again"


def test_what_a_block_keeps_under_checkpointing_is_its_input() -> None:
    model = adapted()
    nybble.accelerate(model)
    kept: dict[bool, int] = {}
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        x = torch.randn(1, 14, 64, requires_grad=True)
        angles = tuple(torch.randn(1, 14, 16) for _ in range(2))
        y = model.base_model.model.model.layers[1].train()(x, position_embeddings=angles)
        node = y.grad_fn
        while not hasattr(node, "kept"):
            node = node.next_functions[0][0]
        kept[checkpointed] = node.kept is not None
    assert kept == {False: True, True: False}


def test_training_evaluating_answering_and_training_gives_the_same_gradients() -> None:
    model = adapted()
    nybble.accelerate(model)
    first = step(model)[2]
    with torch.no_grad():
        for training in (True, False):  # TRL's GRPOTrainer samples in training mode
            model.train(training)
            model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
            model(IDS, use_cache=False)
    second = step(model)[2]
    assert all(torch.equal(grad, second[name]) for name, grad in first.items())


def test_before_or_after_adapters_and_undone(blocks_run: list[str], tmp_path: Path) -> None:
    base = nybble.quantize_(dense_model("llama"))
    done = nybble.accelerate(base)
    names = set(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    expected = step(model)
    assert len(blocks_run) == 3 and isinstance(base.model.layers[0], LlamaDecoderLayer)
    model.save_pretrained(tmp_path)
    assert nybble.accelerate(model).layers is base.model.layers, "what is accelerated stays"
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    done.undo()
    assert type(base.model.layers[0]) is LlamaDecoderLayer and not hasattr(base.model.layers[0], "accelerated_by")
    blocks_run.clear()
    assert_agree(step(model), expected)
    assert not blocks_run and names == {
        name.replace(".base_layer", "") for name in base.state_dict() if "lora" not in name
    }


def test_an_optimizer_that_counts_no_versions_is_seen() -> None:
    model = adapted()
    nybble.accelerate(model)
    before = step(model)[1]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)  # through .data autograd's counter stays
    twin = copy.deepcopy(model)
    nybble.accelerate(twin).undo()
    after, expected = step(model), step(twin)
    assert not torch.allclose(after[1], before)
    assert_agree(after, expected)


def test_what_blocks_do_not_know_goes_through_the_layers_own_code(blocks_run: list[str]) -> None:
    model = adapted(lora_dropout=0.4)
    twin = copy.deepcopy(model)
    done = nybble.accelerate(model)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="because of the adapter's dropout"):
        got = step(model)
    torch.manual_seed(3)
    assert_agree(got, step(twin), 1e-6)
    assert not blocks_run and len(done.reasons) == 1
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not blocks_run, "a cache is filled"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter(), torch.no_grad():
            got_base = model(IDS, use_cache=False).logits
            with twin.disable_adapter():
                torch.testing.assert_close(got_base, twin(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert len(blocks_run) == 3


def test_dropout_within_layers_goes_through_their_own_code(blocks_run: list[str]) -> None:
    model = adapted("phi")
    nybble.accelerate(model)
    model.base_model.model.config.resid_pdrop = 0.5
    with pytest.warns(UserWarning, match="because of resid_pdrop"):
        step(model)
    assert not blocks_run


def test_a_norm_that_is_trained_too_is_not_forgotten(blocks_run: list[str]) -> None:
    model = adapted()
    nybble.accelerate(model)
    norm = model.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"input_layernorm.weight is trained too"):
        step(model)
    assert norm.grad is not None and norm.grad.norm() > 0 and len(blocks_run) == 2


def test_models_that_blocks_do_not_know_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes))
    with pytest.raises(ModelError, match="experts in nybble's own training"):
        nybble.accelerate(mixture)


def causal(real: list[int], window: int = 0) -> Tensor:
    place, real_places = torch.arange(len(real)), torch.tensor(real, dtype=torch.bool)
    seen = (place[:, None] >= place) & real_places & real_places[:, None]
    return (seen & (place[:, None] - place < window) if window else seen)[None, None]


def test_masks_are_read_or_recognised_as_another() -> None:
    cpu = torch.device("cpu")
    rows = read_mask(None, 2, 4, 0, cpu)
    assert rows.tokens is None and rows.cu_seqlens.tolist() == [0, 4, 8] and rows.max_length == 4
    rows = read_mask(torch.cat([causal([0, 1, 1, 1]), causal([1, 1, 0, 0])]), 2, 4, 0, cpu)
    assert rows.tokens.tolist() == [1, 2, 3, 4, 5] and rows.cu_seqlens.tolist() == [0, 3, 5]
    as_numbers = torch.zeros(1, 1, 4, 4).masked_fill(~causal([1, 1, 1, 0]), torch.finfo(torch.float32).min)
    assert read_mask(as_numbers, 1, 4, 0, cpu).cu_seqlens.tolist() == [0, 3]
    assert read_mask(causal([1, 1, 1, 1], window=2), 1, 4, 2, cpu).cu_seqlens.tolist() == [0, 4]
    both_ways, with_a_hole = torch.ones(1, 1, 4, 4, dtype=torch.bool), causal([1, 0, 1, 1])
    for other in (both_ways, with_a_hole, causal([1, 1, 1, 1], window=2), torch.ones(1, 1, 4, 6)):
        assert read_mask(other, 1, 4, 0, cpu) is None
