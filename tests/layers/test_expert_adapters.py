"""Adapters on every expert, against PEFT's adapters on the parameters of transformers' own experts."""

import pytest
import torch
from mixtures import FAMILIES, dense_twin, make_mixture
from peft import PeftModel
from tiny import tune
from tiny_models import tiny_model

from nybble.errors import ConfigError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.convert import adapters_of, attach_adapters, check_adaptable, resolve_targets
from nybble.layers.lora_experts import LoraExperts
from nybble.runs.adapter_files import StoredAdapter, read_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.sources.folder import FolderSource
from nybble.sources.load import load_model

pytestmark = pytest.mark.usefixtures("poisoned_slabs")

NF4 = BaseFormats(QuantSpec())
DEFAULT = ("qwen2_moe", "gpt_oss", "deepseek_v3")  # shared experts; biases, matrices turned; dense names beside experts
IDS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "model_type", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_logits_and_gradients_are_pefts(model_type, tmp_path):
    make_mixture(model_type, tmp_path / "base")
    source = FolderSource(tmp_path / "base", "base")
    model = tune(load_model(source, NF4, torch.float32), "all-linear,experts", rank_pattern={"experts.down_proj": 2})
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(model, folder, adapter_config(model, "base"))
    peft = PeftModel.from_pretrained(dense_twin(model, tmp_path / "base"), folder, is_trainable=True).eval()
    weights = torch.randn(2, 9, model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    ours, theirs = (each(input_ids=IDS, use_cache=False).logits for each in (model, peft))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    for logits in (ours, theirs):
        (logits * weights).sum().backward()

    stored, gradients = StoredAdapter(folder), {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    for name, adapter in adapters_of(model).items():
        a, b = (gradients[f"base_model.model.{stored.stored_as(name)}.lora_{leaf}.default.weight"] for leaf in "AB")
        if isinstance(adapter, LoraExperts):
            a, b = a.view(adapter.num_experts, adapter.rank, -1), b.view(len(b), adapter.rank, -1).permute(2, 0, 1)
            a, b = (b.mT, a.mT) if adapter.base.turned_in_peft else (a, b)
        for own, other in ((adapter.lora_A.grad, a), (adapter.lora_B.grad, b)):
            assert float((own - other).norm()) <= 1e-5 * max(1.0, float(other.norm())), name

    again = load_model(source, NF4, torch.float32)
    read_adapter(again, folder)
    assert torch.equal(again(input_ids=IDS, use_cache=False).logits, ours)
    dense = load_model(source, None, torch.float32)  # 16-bit LoRA: modules of dense matrices beside the adapters
    own = dense(input_ids=IDS, use_cache=False).logits
    attach_adapters(dense, stored.names, **stored.settings)
    assert torch.allclose(dense(input_ids=IDS, use_cache=False).logits, own, atol=1e-4)


def test_which_experts_get_adapters_and_what_they_cannot_have(tmp_path):
    make_mixture("qwen2_moe", tmp_path)
    model = FolderSource(tmp_path, "base").skeleton
    linears, experts = resolve_targets(model, "all-linear"), resolve_targets(model, "experts")
    assert len(experts) == 4 and not set(linears) & set(experts)
    assert resolve_targets(model, "all-linear,experts") == [*linears, *experts]
    assert resolve_targets(model, "experts.down_proj") == experts[1::2]
    for option in ({"dora": True}, {"dropout": 0.1}, {"init": "pissa"}, {"probed": True}):
        with pytest.raises(ConfigError, match=r"(?s) is .*experts.*plain LoRA"):
            check_adaptable(model, experts, **option)
    with pytest.raises(ConfigError, match="names 'experts', which is no linear layer"):
        resolve_targets(tiny_model("llama"), "experts")
