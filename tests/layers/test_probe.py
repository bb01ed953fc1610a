"""Training's loss and gradients against each model's own forward and autograd, and what the probe says of models."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_gradients import ROWS, examples, own_loss_and_gradients, relative, trained_loss_and_gradients
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.errors import ModelError
from nybble.layers.backbone import FusedForward, Why, why_not_forward
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
from nybble.layers.loss_head import LossHead
from nybble.layers.mixers import compute_mixers
from nybble.layers.own_head import OwnHead, loss_head
from nybble.layers.probe import ASKED, LENGTHS, Probe
from nybble.layers.rotary import RowRotary, length_of_change, rotate_rows_alone, row_lengths
from nybble.sizes import SHAPE_RULES

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LONG = {"rope_type": "longrope", "long_factor": [5.0] * 4, "short_factor": [1.0] * 4, "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.5, "residual_multiplier": 0.6},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.5, "attn_logit_softcapping": 1.5, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 4.0},
    "nanochat": {"final_logit_softcapping": 2.0},
    "minicpm3": {
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "scale_emb": 3.0, "dim_model_base": 8, "scale_depth": 1.3, "num_key_value_heads": 4,
    },
    "falcon_h1": {"lm_head_multiplier": 0.35, "embedding_multiplier": 2.0, "mamba_d_ssm": 32} | MAMBA,
    "mixtral": {"num_local_experts": 3, "output_router_logits": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "dynamic": {
        "family": "llama", "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "longrope": {
        "family": "phi3", "original_max_position_embeddings": 12,
        "rope_parameters": LONG | {"original_max_position_embeddings": 12},
    },
}  # fmt: skip
ALL_EXPERTS = {"mixtral": {"num_experts_per_tok": 3}}  # else a rounding more or less sends a token to another
PADDED = {"bloom", "gpt_oss"}  # as transformers has them, packed rows see each other
# Of the rows that are asked about, two are longer than 12 tokens, where the last two families turn by other angles.


def tiny_model(name: str, dtype: torch.dtype = torch.float32, adapters: bool = True, **more: Any) -> Any:
    """A random model whose norms are not all ones, with adapters that are not zero."""
    options = SMALL | FAMILIES.get(name, {}) | more
    torch.manual_seed(0)
    config = AutoConfig.for_model(options.pop("family", name), **options)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name and parameter.ndim == 1:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    if adapters:
        names = [n for n in quantizable_linears(model) if "mamba" not in n]
        for each in attach_adapters(model, names, rank=2, alpha=4.0, seed=1).values():
            nn.init.normal_(each.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_on_is_the_models_own_loss_packed_and_not(name):
    model, rows = tiny_model(name), examples()
    loss, gradients = own_loss_and_gradients(model, rows)
    for packing in (True, False):
        causal_lm = CausalLM.of(model, keep="everything", packing=packing)
        assert causal_lm.packed == (packing and name not in PADDED), causal_lm.name
        ours, our_gradients = trained_loss_and_gradients(causal_lm, rows)
        assert ours == pytest.approx(loss, rel=2e-6)
        assert relative(our_gradients, gradients) <= 2e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_that_is_chosen_is_the_same_in_bf16(name):
    model, rows = tiny_model(name, torch.bfloat16, **ALL_EXPERTS.get(name, {})), examples()
    loss, gradients = own_loss_and_gradients(model, rows)
    causal_lm = CausalLM.of(model, keep="everything")
    assert causal_lm.packed == (name not in PADDED) and isinstance(causal_lm.head, LossHead), causal_lm.name
    ours, our_gradients = trained_loss_and_gradients(causal_lm, rows)
    assert ours == pytest.approx(loss, rel=1e-2)
    assert relative(our_gradients, gradients) <= 0.07


@pytest.mark.parametrize(
    ("name", "scale", "cap"), [("granite", 1 / 3, None), ("minicpm3", 0.25, None), ("nanochat", 1.0, 2.0)]
)
def test_scale_and_cap_are_measured(name, scale, cap):
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        head = loss_head(tiny_model(name, dtype, adapters=False))
        assert isinstance(head, LossHead) and head.scale == pytest.approx(scale, rel=near)
        assert head.softcap == (cap and pytest.approx(cap, rel=near))


def test_a_key_of_the_config_that_the_model_does_not_read_changes_nothing():
    model = tiny_model("llama", logit_scale=0.25, logits_scaling=4.0, final_logit_softcapping=1.0)
    head = loss_head(model)
    assert isinstance(head, LossHead) and head.scale == 1.0 and head.softcap is None


class OddHead(nn.Module):
    """A head that is no product with a matrix."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.weight = linear, linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.linear(x.abs()).sin()


@pytest.mark.parametrize("chunk_bytes", [2**25, 1])
def test_a_head_that_is_not_linear_computes_through_the_models_own_forward(monkeypatch, chunk_bytes):
    monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], chunk_bytes=chunk_bytes))
    model, rows = tiny_model("llama"), examples((90, 30))
    model.lm_head = OddHead(model.lm_head)
    loss, gradients = own_loss_and_gradients(model, rows)
    causal_lm = CausalLM.of(model, keep="everything")
    assert isinstance(causal_lm.head, OwnHead) and causal_lm.verdict.own_head and "own head" in causal_lm.name
    assert why_not_forward(model).why is Why.HEAD
    ours, our_gradients = trained_loss_and_gradients(causal_lm, rows)
    assert ours == pytest.approx(loss, rel=2e-6) and relative(our_gradients, gradients) <= 2e-5
    hidden = torch.randn(70, 32)
    targets = torch.randint(131, (70,))
    losses = F.cross_entropy(model.lm_head(hidden), targets, reduction="none")
    torch.testing.assert_close(causal_lm.head.token_losses(hidden, targets), losses)
    weights, states = torch.randn(70), hidden.requires_grad_()
    expected = F.cross_entropy(model.lm_head(states), targets, reduction="none") @ weights / 3
    (own_gradient,) = torch.autograd.grad(expected, states)
    ours = causal_lm.head.loss(states, targets, 3.0, weights)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, states)[0], own_gradient)
    torch.testing.assert_close(causal_lm.head.token_losses(hidden, targets, weights), losses.detach() * weights)
    empty = torch.randn(0, 32, requires_grad=True)
    causal_lm.head.loss(empty, targets[:0], 3.0).backward()
    assert empty.grad.shape == (0, 32)


def test_an_adapter_on_the_head_is_trained():
    model, rows = tiny_model("llama"), examples()
    attach_adapters(model, ["lm_head"], rank=2, alpha=4.0)
    nn.init.normal_(model.lm_head.lora_B, std=0.1)
    for each in adapters_of(model).values():
        each.requires_grad_(True)
        each.base.requires_grad_(False)
    loss, gradients = own_loss_and_gradients(model, rows)
    ours, our_gradients = trained_loss_and_gradients(CausalLM.of(model, keep="everything"), rows)
    assert ours == pytest.approx(loss, rel=2e-6) and relative(our_gradients, gradients) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_encoder_is_refused_though_its_loss_agrees(family, dtype):
    with pytest.raises(ModelError, match=r"no decoder.*seen the tokens after"):
        CausalLM.of(tiny_model(family, dtype, pad_token_id=0))


def test_where_no_way_agrees_the_part_is_named():
    model = tiny_model("gpt_neox")
    original = model.forward

    def forward(input_ids, labels=None, **kwargs):  # its logits depend on more than its states
        output = original(input_ids=input_ids, **kwargs)
        bias = torch.arange(input_ids.shape[1])[:, None] * torch.linspace(-1, 1, 131)
        output.logits = output.logits + bias
        if labels is not None:
            output.loss = F.cross_entropy(output.logits[0, :-1], labels[0, 1:])
        return output

    model.forward = forward
    with pytest.raises(ModelError, match=r"on its own loss: the head differs by"):
        CausalLM.of(model, keep="everything")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bloom", "falcon_h1", "granite"])
def test_one_huge_channel_of_the_last_norm_hides_nothing(name, dtype):
    model = tiny_model(name, dtype)
    norms = [m for n, m in model.named_modules() if n.endswith(("ln_f", "final_layernorm", "model.norm"))]
    norms[0].weight.data[3] = 40.0
    causal_lm = CausalLM.of(model, keep="everything")
    assert causal_lm.verdict.layout == ("padded" if name in PADDED else "packed")


@pytest.mark.parametrize("name", ["falcon_h1", "dynamic", "longrope"])
def test_the_probe_leaves_everything_as_it_was(name):
    model = tiny_model(name)
    rotate_rows_alone(model)
    compute_mixers(model)
    model.train()
    first = next(iter(adapters_of(model).values()))
    first.lora_A.grad = torch.full_like(first.lora_A, 0.5)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.detach().clone() for n, t in tensors.items()}
    modules = [(n, type(m), m.training) for n, m in model.named_modules()]
    random = torch.get_rng_state()
    CausalLM.of(model, keep="everything")
    assert torch.equal(torch.get_rng_state(), random)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == modules
    assert not model.get_input_embeddings()._forward_hooks
    for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert torch.equal(t, before[n]), n
        assert t.grad is None or t is first.lora_A
    assert torch.equal(first.lora_A.grad, torch.full_like(first.lora_A, 0.5))


def test_rows_are_told_apart_by_their_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [3, 4, 5, 6, 7, 0, 0]])
    assert row_lengths(positions).tolist() == [[3, 3, 3, 2, 2, 1, 1], [8, 8, 8, 8, 8, 1, 1]]


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_angles_are_those_of_each_row_in_a_fresh_model(name):
    model = tiny_model(name, adapters=False)
    fresh = copy.deepcopy(model.base_model.rotary_emb)
    rotate_rows_alone(model)
    rotate_rows_alone(model)
    rotary = model.base_model.rotary_emb
    assert isinstance(rotary, RowRotary) and not isinstance(rotary.rotary, RowRotary)
    assert length_of_change(model) == 12
    x = torch.empty(0)
    packed = torch.cat([torch.arange(n) for n in ROWS])[None]
    alone = [copy.deepcopy(fresh)(x, torch.arange(n)[None]) for n in ROWS]
    for _ in range(2):  # what was asked before changes nothing
        for got, expected in zip(rotary(x, packed), zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=0, atol=0)
    # That each row has its own angles matters: those of one call for all differ.
    assert not torch.allclose(copy.deepcopy(fresh)(x, packed)[0], rotary(x, packed)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_decoder_blocks_turn_each_row_by_its_own_length(name):
    model = tiny_model(name)
    causal_lm = CausalLM.of(model)
    assert isinstance(causal_lm.backbone, FusedForward)


def test_blocks_that_differ_give_way_to_the_generic_path(monkeypatch):
    model = tiny_model("dynamic")
    original = FusedForward.hidden
    monkeypatch.setattr(FusedForward, "hidden", lambda self, *a, **k: 1.1 * original(self, *a, **k))
    causal_lm = CausalLM.of(model)
    assert causal_lm.verdict.path == "generic" and causal_lm.verdict.reason.why is Why.DIFFERENCE


def test_an_own_loss_that_is_not_of_the_next_token_is_refused():
    model = tiny_model("gpt_neox")
    original = model.forward

    def forward(input_ids, labels=None, **kwargs):
        output = original(input_ids=input_ids, labels=labels, **kwargs)
        output.loss = output.loss * 1.5
        return output

    model.forward = forward
    with pytest.raises(ModelError, match="next token"):
        Probe(model)


def test_a_way_that_fails_in_the_models_own_code_is_refused_in_words() -> None:
    """xLSTM in bf16 takes the probe's document alone and fails over several."""
    model = tiny_model("nanochat")
    first = model.model.layers[0]

    def fails_over_several(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[1] > LENGTHS[ASKED]:
            raise RuntimeError("expected m1 and m2 to have the same dtype")

    first.register_forward_pre_hook(fails_over_several)
    with pytest.raises(ModelError, match=r"fails over packed rows of \[.*same dtype"):
        CausalLM.of(model)


def test_a_fault_of_decoder_blocks_is_not_told_as_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise TypeError("a fault of ours")

    monkeypatch.setattr(FusedForward, "hidden", fails)
    with pytest.raises(TypeError, match="a fault of ours"):
        CausalLM.of(tiny_model("dynamic"))  # whose angles can change, so that its blocks are probed too
