"""Adapters of every kind between PEFT, over a base that `nybble.hf` loads, and nybble: the same logits both ways."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nybble
import nybble.hf
from nybble.errors import RunError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.runs.adapter_files import read_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.sources.folder import FolderSource
from nybble.sources.load import load_model

IDS = torch.arange(24).view(2, 12)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "rank_pattern": {"layers.0.+q_proj": 2, "up_proj": 6},
        "alpha_pattern": {"down_proj": 32},
        "use_rslora": True,
    },
    "dora": {"use_dora": True, "rank_pattern": {"k_proj": 2}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "but for some": {"exclude_modules": ["down_proj", "o_proj"]},
    "ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules trained whole": {"modules_to_save": ["lm_head", "norm"]},
    "rows of tokens": {"trainable_token_indices": [3, 7]},
    "rows of both ends": {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    model = nybble.quantize_(AutoModelForCausalLM.from_pretrained(tiny_model))
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.weight.data = end.weight.data.bfloat16().float()  # as a run keeps them
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def adapted(base: Any, kind: str, begun: Path) -> Any:
    """With PEFT's adapter of this kind, as training might leave it."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | KINDS[kind]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    if kind == "eva":
        batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}]
        initialize_lora_eva_weights(model, batches)
    if kind in ("pissa", "olora"):
        model.peft_config["default"].init_lora_weights = True  # as PEFT's documents say, for the conversion below
        model.save_pretrained(begun)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.filterwarnings("ignore:.*rounded to nf4 again")  # pissa and olora leave less in the base
@pytest.mark.parametrize("kind", KINDS)
def test_from_peft_to_nybble_and_back(base: Any, tiny_model: Path, tmp_path: Path, kind: str) -> None:
    converted = {"path_initial_model_for_weight_conversion": tmp_path / "begun"} if kind in ("pissa", "olora") else {}
    adapted(base, kind, tmp_path / "begun").save_pretrained(tmp_path / "theirs", **converted)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs"))
    assert (theirs - logits(base)).norm() > 0.05 * theirs.norm()
    ours = load_model(FolderSource(tiny_model, "base"), BaseFormats(QuantSpec()), torch.float32)
    read_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-4, atol=1e-4)
    (tmp_path / "ours").mkdir()
    write_adapter(ours, tmp_path / "ours", adapter_config(ours, "base"))
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(logits(back), theirs, rtol=1e-4, atol=1e-4)


def test_rows_that_the_config_says_and_the_file_lacks_are_missed(base: Any, tiny_model: Path, tmp_path: Path) -> None:
    adapted(base, "rows of both ends", tmp_path).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (lost,) = [key for key in tensors if "lm_head" in key and "trainable_tokens" in key]
    save_file({key: each for key, each in tensors.items() if key != lost}, tmp_path / "adapter_model.safetensors")
    ours = load_model(FolderSource(tiny_model, "base"), BaseFormats(QuantSpec()), torch.float32)
    with pytest.raises(RunError, match="rows of other tokens"):
        read_adapter(ours, tmp_path)


@pytest.mark.filterwarnings("ignore:.*rounded to nf4 again")
@pytest.mark.parametrize(
    ("options", "words"),
    [({"lora_bias": True}, "lora_bias = True"), ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'")],
    ids=["bias", "pissa"],
)
def test_what_is_more_than_lora_on_the_base_is_refused(
    base: Any, tiny_model: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    ours = load_model(FolderSource(tiny_model, "base"), BaseFormats(QuantSpec()), torch.float32)
    with pytest.raises(RunError, match=words):
        read_adapter(ours, tmp_path)
