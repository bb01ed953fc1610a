"""Loading against transformers: the same numbers, nothing unloaded, nothing unused, nothing wrong unnoticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from nybble.errors import ConfigError, FormatError, ModelError
from nybble.events import Event, Progress
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.convert import describe_untouched, quantizable_linears, resolve_targets
from nybble.layers.dense import CastEmbedding
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.sources.load import load_model
from nybble.sources.open import open_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def load(folder: Path, spec: QuantSpec | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_model(open_model(str(folder)), spec and BaseFormats(spec), dtype)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_equals_transformers(make_folder, tokens: Tensor, family: str, tied: bool) -> None:
    folder, _ = make_folder(family, torch.bfloat16, tie_word_embeddings=tied)
    ours = load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(logits(ours, tokens), logits(theirs, tokens))
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_four_bit_model_equals_transformers_on_the_dequantized_weights(make_folder, tokens: Tensor, family: str):
    folder, _ = make_folder(family, torch.bfloat16)
    spec = QuantSpec()
    ours = load(folder, spec)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    replaced = 0
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = theirs.get_submodule(name).weight
            matrix = weight.detach().T if family == "gpt2" else weight.detach()  # [out, in]
            q = quantize(matrix.bfloat16(), spec)
            assert torch.equal(module.packed, q.packed)
            assert torch.equal(module.scales, q.scales)
            dense = dequantize(q, torch.float32)
            weight.data = dense.T.contiguous() if family == "gpt2" else dense
            replaced += 1
    assert replaced == {"gpt2": 8}.get(family, 14)
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [None, "llama3", "yarn", "linear", "dynamic"])
def test_computed_buffers_equal_transformers(make_folder, rope: str | None) -> None:
    overrides = {}
    if rope is not None:
        scaling = {"rope_theta": 10000.0, "rope_type": rope, "factor": 4.0, "original_max_position_embeddings": 32}
        if rope == "llama3":
            scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        overrides["rope_parameters"] = scaling
    folder, original = make_folder("llama", torch.bfloat16, **overrides)
    ours = load(folder, QuantSpec(), torch.bfloat16)
    expected = dict(original.named_buffers())
    # What goes by a row's length is asked through nybble's RowRotary, which holds transformers' own.
    computed = {name.replace(".rotary_emb.rotary.", ".rotary_emb."): buffer for name, buffer in ours.named_buffers()}
    assert computed.keys() == expected.keys()
    for name, buffer in computed.items():
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, AutoModelForCausalLM.from_config(ours.config).get_buffer(name))


def test_a_sharded_folder_loads_as_a_whole_one(make_folder, tokens: Tensor) -> None:
    whole, _ = make_folder("llama")
    sharded, _ = make_folder("llama", shard="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(sharded), tokens), logits(load(whole), tokens))


def test_dtypes_by_role(make_folder) -> None:
    folder, _ = make_folder("qwen2", torch.bfloat16)
    fp32 = load(folder, QuantSpec(), torch.float32)
    assert isinstance(fp32.model.embed_tokens, CastEmbedding)
    assert fp32.model.embed_tokens.weight.dtype == fp32.lm_head.weight.dtype == torch.bfloat16
    assert fp32.model.norm.weight.dtype == torch.float32
    assert fp32.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    bf16 = load(folder, QuantSpec(), torch.bfloat16)
    assert type(bf16.model.embed_tokens) is nn.Embedding
    half, _ = make_folder("llama", torch.float16)
    assert load(half, QuantSpec(), torch.float32).lm_head.weight.dtype == torch.float16


def test_the_attention_is_sdpa(make_folder) -> None:
    assert load(make_folder()[0]).config._attn_implementation == "sdpa"


def test_the_makers_generation_config_is_taken(make_folder) -> None:
    folder, _ = make_folder()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "temperature": 0.6}))
    assert load(folder).generation_config.eos_token_id == [1, 7]


def test_progress_sees_every_tensor(make_folder) -> None:
    folder, model = make_folder()
    seen: list[Event] = []
    load_model(open_model(str(folder)), BaseFormats(), torch.float32, report=seen.append)
    total = len(model.state_dict())
    assert seen == [Progress("loading", done, total) for done in range(total + 1)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_of_the_bare_backbone_gets_its_prefix(make_folder, tokens: Tensor, family: str) -> None:
    folder, model = make_folder(family, tie_word_embeddings=True)
    expected = logits(load(folder), tokens)
    prefix = model.base_model_prefix + "."

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit(folder, strip)
    assert torch.equal(logits(load(folder), tokens), expected)


def test_leftovers_of_old_versions_are_ignored(make_folder, tokens: Tensor) -> None:
    folder, _ = make_folder("gpt2")
    expected = logits(load(folder), tokens)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).bool()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["transformer.h.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(folder, add)
    assert torch.equal(logits(load(folder), tokens), expected)


def test_a_tied_head_may_be_stored_when_it_is_alike(make_folder, tokens: Tensor) -> None:
    folder, _ = make_folder(tie_word_embeddings=True)
    expected = logits(load(folder), tokens)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(load(folder), tokens), expected)
    edit(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match="different tensors for parameters that its config ties"):
        load(folder)


def test_a_tied_pair_may_be_stored_as_the_head_alone(make_folder, tokens: Tensor) -> None:
    folder, _ = make_folder(tie_word_embeddings=True)
    expected = logits(load(folder), tokens)
    edit(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(load(folder), tokens), expected)


@pytest.mark.parametrize("spec", [None, QuantSpec()])
def test_what_does_not_fit_is_named(make_folder, spec: QuantSpec | None) -> None:
    folder, _ = make_folder()
    edit(folder, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": t.pop("model.layers.1.mlp.up_proj.weight")}))
    with pytest.raises(ModelError) as caught:
        load(folder, spec)
    assert "Stored and not in the model: model.layers.9.mlp.up_proj.weight" in str(caught.value)
    assert "In the model and not stored: model.layers.1.mlp.up_proj.weight" in str(caught.value)


def test_an_untied_head_must_be_stored(make_folder) -> None:
    folder, _ = make_folder(tie_word_embeddings=False)
    edit(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"not stored: lm_head\.weight"):
        load(folder)


def test_a_wrong_shape_is_named(make_folder) -> None:
    folder, _ = make_folder()
    name = "model.layers.0.mlp.up_proj.weight"  # the transpose is wrong too where the layer is a Linear
    edit(folder, lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(ModelError, match=rf"{name} has the shape \[64, 128\](.|\n)*\[128, 64\]"):
        load(folder, QuantSpec())


def with_config(folder: Path, **values: object) -> Path:
    """A config.json that says something else."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("rows", [159, 161])
def test_an_embedding_of_another_size_is_no_damaged_file(make_folder, rows: int) -> None:
    """Nothing is read of rows that the file does not have: behind them lies another tensor, or nothing."""
    folder, _ = make_folder(tie_word_embeddings=True)
    source = open_model(str(with_config(folder, vocab_size=rows)))
    with pytest.raises(ModelError, match=rf"embed_tokens\.weight has the shape \[160, 64\](.|\n)*\[{rows}, 64\]"):
        source.embedding_rows([rows - 1])


@pytest.mark.parametrize("chosen", [0, 5])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_more_experts_a_token_than_there_are_are_refused(make_folder, family: str, chosen: int) -> None:
    folder, _ = make_folder(family)
    with pytest.raises(ModelError, match=rf"num_experts_per_tok = {chosen}, and num_(local_)?experts = 4"):
        load(with_config(folder, num_experts_per_tok=chosen))


def test_sizes_that_no_weight_bears_out_are_refused(make_folder) -> None:
    """Before memory is taken for them."""
    folder, _ = make_folder("qwen3")
    with pytest.raises(ModelError, match=r"inv_freq would have the shape \[1073741824\]"):
        load(with_config(folder, head_dim=2**31))
    folder, _ = make_folder()
    with pytest.raises(ModelError, match=r"embed_tokens\.weight would have the shape \[160, 0\]"):
        load(with_config(folder, hidden_size=0))


def test_what_transformers_says_of_a_config_is_told_whole(make_folder) -> None:
    folder, _ = make_folder()
    with pytest.raises(ModelError, match=r"'hidden_size': .*expected int, got str"):
        load(with_config(folder, hidden_size="64"))
    with pytest.raises(ModelError, match="'wow' is not known"):
        load(with_config(folder, hidden_size=64, hidden_act="wow"))


def test_weights_of_64_bits_are_rounded_and_truth_values_refused(make_folder) -> None:
    folder, model = make_folder()
    edit(folder, lambda t: t.update({name: tensor.double() for name, tensor in t.items()}))
    layer = "model.layers.1.mlp.up_proj"
    read, quantized = open_model(str(folder)).read_linear(layer), load(folder, QuantSpec()).get_submodule(layer)
    assert torch.equal(read, model.get_submodule(layer).weight) and isinstance(quantized, QuantizedLinear)
    edit(folder, lambda t: t.update({f"{layer}.weight": torch.ones(128, 64, dtype=torch.bool)}))
    with pytest.raises(FormatError, match=r"stores model\.layers\.1\.mlp\.up_proj\.weight as integers \(BOOL\)"):
        load(folder)


def test_a_damaged_generation_config_is_named(make_folder) -> None:
    folder, _ = make_folder()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"does not take .*generation_config\.json"):
        open_model(str(folder)).load_generation_config()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(make_folder, value: float, name: str) -> None:
    folder, _ = make_folder(dtype=torch.bfloat16)
    edit(folder, lambda t: t[name].view(-1)[5:7].fill_(value))
    with pytest.raises(ModelError, match=f"{name} holds 2 values that are not finite"):
        load(folder, QuantSpec())


def test_an_architecture_without_language_model_is_refused(make_folder) -> None:
    folder, _ = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ModelError, match="'vit'"):
        load(folder)


def test_what_the_makers_keep_in_fp32_stays_so(tmp_path: Path) -> None:
    """A router's bias decides which experts a token goes to; rounded, it sends some to others."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    dims = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "vocab_size": 160}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, **heads, **dims, **experts, first_k_dense_replace=0))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = model.get_buffer(name).normal_()
    assert not torch.equal(bias, bias.bfloat16().float())
    model.save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    loaded = load_model(source, BaseFormats(), torch.bfloat16)
    assert torch.equal(loaded.get_buffer(name), bias)
    assert loaded.get_parameter("model.norm.weight").dtype == torch.bfloat16
    assert source.written(name).dtype == torch.float32


def test_a_layer_that_the_makers_keep_in_fp32_goes_into_no_bits_and_is_named(make_folder) -> None:
    _, model = make_folder("llama")
    model._keep_in_fp32_modules_strict = ["layers.0.mlp.up_proj"]
    assert "model.layers.0.mlp.up_proj" not in quantizable_linears(model)
    assert "model.layers.1.mlp.up_proj" in quantizable_linears(model)
    (said,) = describe_untouched(model)
    assert "up_proj" in said and "fp32" in said
    with pytest.raises(ConfigError, match="fp32"):
        resolve_targets(model, ["layers.0.mlp.up_proj"])
