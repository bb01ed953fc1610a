"""Adapters on embedding and head, and on patterns of layers: gradients, files and merges as PEFT has them."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack
from nybble.errors import ConfigError, RunError
from nybble.generation.decoding import CachedDecoder
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.layers.own_head import loss_head
from nybble.runs.adapter_files import StoredAdapter, read_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter

SHAPE = {
    "vocab_size": 150,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TARGETS = ["q_proj", "lm_head", "embed_tokens"]


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()


def gemma() -> nn.Module:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8, final_logit_softcapping=2.0)
    return Gemma3ForCausalLM(config).eval()


def adapted(model: nn.Module, targets: list[str] | str = TARGETS) -> dict[str, nn.Module]:
    adapters = attach_adapters(model, resolve_targets(model, targets), rank=3, alpha=6.0)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_A, std=0.3)
        nn.init.normal_(adapter.lora_B, std=0.3)
    return adapters


def in_peft(base: nn.Module, adapters: dict[str, nn.Module], folder: Path) -> nn.Module:
    """PEFT's model with the same adapters, trainable, from the files that nybble writes."""
    folder.mkdir()
    holder = copy.deepcopy(base)
    attached = attach_adapters(holder, list(adapters), rank=3, alpha=6.0)
    for name, adapter in attached.items():
        adapter.load_state_dict(adapters[name].state_dict())
    write_adapter(holder, folder, adapter_config(holder, "base"))
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """nybble's, of one row, all tokens but the first supervised."""
    row = EncodedExample(ids[0].int(), torch.ones(ids.shape[1], dtype=torch.bool), "row")
    return CausalLM.of(model).loss(pack([row]))


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gemma], ids=["llama", "tied", "gemma"])
def test_loss_and_gradients_equal_pefts(make, tmp_path: Path) -> None:
    base = make()
    ids = torch.randint(0, 150, (1, 90), generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(base)
    adapters = adapted(model)
    assert {name.rpartition(".")[2] for name in adapters} == set(TARGETS)
    theirs = in_peft(base, adapters, tmp_path / "adapter")
    ours = loss_of(model, ids)
    ours.backward()
    expected = theirs(input_ids=ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * len(adapters)
    for name, adapter in adapters.items():
        for leaf, gradient in (("A", adapter.lora_A.grad), ("B", adapter.lora_B.grad)):
            (key,) = [key for key in gradients if f".{name}.lora_" in key and f"_{leaf}." in key]
            assert gradients[key].norm() > 0
            torch.testing.assert_close(gradient, gradients[key], rtol=1e-4, atol=1e-6)


def test_reads_back_what_it_wrote_and_what_peft_wrote(tmp_path: Path) -> None:
    base, ids = llama(), torch.arange(20)[None]
    model = copy.deepcopy(base)
    theirs = in_peft(base, adapted(model), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(ids).logits
        for folder in ("ours", "theirs"):
            again = copy.deepcopy(base)
            read_adapter(again, tmp_path / folder)
            torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_dropout_on_the_head_drops_inputs_of_its_adapter_alone() -> None:
    model = llama().train()
    (head,) = attach_adapters(model, ["lm_head"], rank=3, alpha=6.0, dropout=0.5).values()
    nn.init.normal_(head.lora_B)
    states, targets = torch.randn(7, 32, requires_grad=True), torch.arange(7)
    torch.manual_seed(3)
    loss_head(model).loss(states, targets, 7).backward()
    ours = (states.grad.clone(), head.lora_A.grad.clone(), head.lora_B.grad.clone())
    states.grad = head.lora_A.grad = head.lora_B.grad = None
    torch.manual_seed(3)
    torch.nn.functional.cross_entropy(head(states), targets).backward()
    for mine, autograd in zip(ours, (states.grad, head.lora_A.grad, head.lora_B.grad), strict=True):
        torch.testing.assert_close(mine, autograd, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_generating_computes_with_them() -> None:
    model = llama().requires_grad_(False)
    adapted(model)
    decoder = CachedDecoder(model)
    first = decoder.start([[3, 5, 7], [4, 9, 2]], 4)
    torch.testing.assert_close(first, model(torch.tensor([[3, 5, 7], [4, 9, 2]])).logits[:, -1], rtol=1e-4, atol=1e-5)
    second = decoder.step(torch.tensor([11, 12]))
    ids = torch.tensor([[3, 5, 7, 11], [4, 9, 2, 12]])
    torch.testing.assert_close(second, model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        (r".*layers\.1\.self_attn\.[qv]_proj", [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]),
        ("layers.*.mlp.down_proj", [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]),
        ("layers.[0]*.mlp.d*_proj", ["model.layers.0.mlp.down_proj"]),
        ("lm_head", ["lm_head"]),
        ("embed_tokens,o_proj", [f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)] + ["model.embed_tokens"]),
    ],
)
def test_names_and_patterns(wanted: str, expected: list[str]) -> None:
    with torch.device("meta"):
        model = llama()
    assert resolve_targets(model, wanted) == expected
    assert not {"lm_head", "model.embed_tokens"} & set(resolve_targets(model, "all-linear"))


@pytest.mark.parametrize("wanted", ["layers.7.*", "(q_proj", "q_pro", "*_norm"])
def test_a_pattern_that_matches_nothing_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match="target_modules names"):
        resolve_targets(llama(), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},  # without magnitudes
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"peft_type": "IA3"},
        {"an_option_of_next_year": 3},
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    in_peft(base, adapted(model), tmp_path / "a").save_pretrained(tmp_path / "b")
    StoredAdapter(tmp_path / "b")
    file = tmp_path / "b" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RunError, match=next(iter(change))):
        StoredAdapter(tmp_path / "b")


def test_an_adapter_beside_another_embedding_is_refused(tmp_path: Path) -> None:
    base = llama()
    theirs = in_peft(base, adapted(copy.deepcopy(base)), tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    base.model.embed_tokens.weight.data[3] += 1
    with pytest.raises(RunError, match=r"another model\.embed_tokens\.weight"):
        read_adapter(base, tmp_path / "b")
