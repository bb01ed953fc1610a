"""What the planner reads off a model on the meta device, against the bytes of that model as it is really loaded."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from tiny import make_data
from tiny_encoders import make_encoder
from transformers import AutoConfig, AutoModelForCausalLM

import nybble
from nybble.errors import ModelError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.convert import quantizable_linears
from nybble.planning.base_costs import base_bytes
from nybble.planning.costs import Part, predict
from nybble.planning.run_shape import MicroBatches, ModelShape, RunShape
from nybble.planning.shape import shape_of
from nybble.quantization.folder import quantize_folder
from nybble.quantization.synth import byte_tokenizer
from nybble.sizes import SHAPE_RULES
from nybble.sources.folder import FolderSource
from nybble.sources.inventory import take_inventory
from nybble.sources.load import load_model
from nybble.sources.parts import check_dense_share
from nybble.sources.skeleton import build_skeleton

BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160}
LLAMA = BASE | {"intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {  # names of every kind for the same things, mixtures, biases, learned positions, ends tied and not
    "llama": LLAMA,
    "qwen2": LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 160},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "vocab_size": 160, "max_position_embeddings": 64},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 160, "max_seq_len": 64},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "vocab_size": 160,
             "max_position_embeddings": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "jetmoe": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "kv_channels": 16, "vocab_size": 160,
               "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 160, "state_size": 4},
}  # fmt: skip


def config_of(family: str):
    return AutoConfig.for_model(family, pad_token_id=0, bos_token_id=0, eos_token_id=1, **CONFIGS[family])


def saved(family: str, folder: Path) -> FolderSource:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config_of(family)))
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_model(model.to(torch.bfloat16), str(folder / "model.safetensors"))
    byte_tokenizer().save_pretrained(folder)
    return FolderSource(folder, family)


def held_bytes(model: torch.nn.Module) -> int:
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values())


def planned_bytes(shape: ModelShape, spec: QuantSpec | None, dtype: torch.dtype) -> int:
    batches, rules = MicroBatches(64, 64, 64, 1, 64, 64, 0), SHAPE_RULES["cpu"]
    parts = predict(RunShape(shape, batches, 0, 8, dtype.itemsize, spec, "generic", "nothing", rules))
    return sum(parts.get(part, 0) for part in (Part.BASE, Part.DENSE, Part.ENDS))


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_planned_as_they_are_loaded(family: str, tmp_path: Path) -> None:
    """To the byte, in four bits and in 16, computed with in either dtype."""
    source = saved(family, tmp_path / "model")
    shape = shape_of(source.skeleton)
    for dtype in (torch.bfloat16, torch.float32):
        for spec in (QuantSpec(), None):
            model = load_model(source, spec and BaseFormats(spec), dtype)
            assert planned_bytes(shape, spec, dtype) == held_bytes(model), (dtype, spec)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_counts_once(family: str) -> None:
    model = build_skeleton(config_of(family))
    parts = take_inventory(model)
    assert parts.elements == sum(parameter.numel() for parameter in model.parameters())
    assert (parts.dense_share > 0.5) == (family == "jetmoe")
    assert parts.head == (160, 32 if family == "opt" else 64)


def test_widths_are_those_of_the_layers() -> None:
    widths = {}
    for family in CONFIGS:
        shape = shape_of(build_skeleton(config_of(family)))
        widths[family] = (shape.hidden_size, shape.query_width, shape.key_value_width, shape.intermediate_size)
        assert shape.num_layers == 2
    assert widths["llama"] == (64, 64, 32, 96)
    assert widths["gpt2"] == widths["gpt_neo"] == widths["mpt"] == (64, 64, 64, 256)
    assert widths["opt"] == (64, 64, 64, 96), "wider than its embedding"
    assert widths["mixtral"] == (64, 64, 32, 2 * 96), "of the experts that a token passes"
    assert widths["gpt_oss"] == (64, 64, 32, 2 * 96)


def test_widths_hold_where_joined_projections_stay_in_16_bits() -> None:
    model = build_skeleton(AutoConfig.for_model("phi3", **LLAMA, pad_token_id=None))
    rest = [name for name in quantizable_linears(model) if not name.endswith("qkv_proj")]
    shapes = [shape_of(model), shape_of(model, rest)]
    assert [(shape.query_width, shape.key_value_width) for shape in shapes] == [(64, 32)] * 2


def test_published_mixtures_take_what_they_take() -> None:
    """Mixtral-8x7B has 46.7 B parameters, gpt-oss-120b 116.8 B."""
    for family, parameters in (("mixtral", 46.7e9), ("gpt_oss", 116.8e9)):  # what transformers has as their defaults
        shape = shape_of(build_skeleton(AutoConfig.for_model(family)))
        assert shape.parameters == pytest.approx(parameters, rel=2e-3)
        assert base_bytes(shape, QuantSpec()) == pytest.approx(4.127 / 8 * shape.parts.linear_elements, rel=2e-3)
        assert shape.parts.linear_elements > 0.97 * parameters and shape.parts.dense_share < 0.01


def test_a_model_that_mostly_stays_in_16_bits_is_not_called_four_bit(tmp_path: Path) -> None:
    source = saved("jetmoe", tmp_path / "model")
    said = r"(?s)% of its blocks' weights stay.*_linear.*--format none.*--max-dense-share"
    with pytest.raises(ModelError, match=said) as refused:
        quantize_folder(source, BaseFormats(), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    accepted = float(refused.value.fix.rpartition("--max-dense-share ")[2].rstrip("."))
    check_dense_share(take_inventory(source.skeleton), "jetmoe", accepted)  # what it names is enough
    done = quantize_folder(source, BaseFormats(), tmp_path / "out", max_dense_share=accepted)
    assert any("input_linear" in name for name, _ in done.inventory.dense)


def test_a_model_without_linear_layers_is_refused_so_too(tmp_path: Path) -> None:
    """I-BERT's layers are of a class of its own."""
    data = make_data(tmp_path / "rows.jsonl", [{"text": f"text {n}", "label": str(n % 2)} for n in range(8)])
    model = make_encoder(tmp_path / "model", "ibert")
    with pytest.raises(ModelError, match=r"(?s)100% of its blocks' weights stay.*--max-dense-share"):
        nybble.train(model=model, data=data, out=tmp_path / "out", objective="classify", validation_fraction=0.3)


def test_layers_that_a_folder_keeps_in_16_bits_are_planned_so(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    quantize_folder(source, BaseFormats(), tmp_path / "four")
    four = FolderSource(tmp_path / "four", "four")
    stored = four.in_four_bits
    assert stored is not None and len(stored) == 14 and source.in_four_bits is None
    assert four.is_streamable and not source.is_streamable
    some = {name for name in stored if "down_proj" not in name}
    parts = shape_of(four.skeleton, some).parts
    assert dict(parts.dense) == {"model.layers.*.mlp.down_proj.weight": 2 * 64 * 96}
    assert parts.elements == shape_of(four.skeleton).parts.elements
