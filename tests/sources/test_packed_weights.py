"""Folders in the few bits of other programs: the values that they stand for, and what is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_folders import AWQ_CONFIG, FLOAT8, INT4, PACKED_CASES, PackedCase, compressed, gptq_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nybble.errors import FormatError, ModelError
from nybble.formats.packed_methods import METHODS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.sources.load import load_model
from nybble.sources.open import open_model

ROOT = Path(__file__).parents[2]
LAYERS = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}
Edit = Callable[[dict[str, Tensor]], object]


def pack(
    folder: Path, case: PackedCase, change: Edit = lambda tensors: None, own_file: bool = False
) -> dict[str, Tensor]:
    """Store LAYERS as a case has it; the weights that they stand for."""
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for layer, shape in LAYERS.items():
        del tensors[f"{layer}.weight"]
        parts, weights[layer] = case.make(*shape)
        tensors |= {f"{layer}{end}": tensor.contiguous() for end, tensor in parts.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if own_file:
        own = {key: value for key, value in case.config.items() if key != "quant_method"}
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": own}))
    else:
        config["quantization_config"] = dict(case.config)
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("name", PACKED_CASES)
def test_weights_are_those_that_the_codes_stand_for(make_folder, name: str) -> None:
    folder, model = make_folder()
    weights = pack(folder, PACKED_CASES[name], own_file=name == "NVFP4, ModelOpt")
    source = open_model(str(folder))
    for layer, weight in weights.items():
        read = source.read_linear(layer)
        assert isinstance(read, Tensor)
        assert torch.equal(read.float(), weight) or torch.allclose(read.float(), weight, rtol=2e-7, atol=0)
    plain = "model.layers.0.mlp.down_proj"
    assert torch.equal(source.read_linear(plain), model.get_submodule(plain).weight)
    assert source.quant_spec is None and "widened, one at a time" in source.notes[0]


def test_they_go_into_the_chosen_format(make_folder) -> None:
    folder, _ = make_folder(dtype=torch.float16)
    weights = pack(folder, PACKED_CASES["GPTQ 4 bits"], lambda t: t.update(zero_bias(0.0)))
    model = load_model(open_model(str(folder)), BaseFormats(QuantSpec("nf4")), torch.float32)
    for layer, weight in weights.items():
        linear = model.get_submodule(layer)
        assert isinstance(linear, QuantizedLinear) and linear.spec == QuantSpec("nf4")
        assert float((linear.dequantize() - weight).norm() / weight.norm()) < 0.2


def zero_bias(value: float) -> dict[str, Tensor]:
    """A bias of a layer that has none, as AutoGPTQ writes it."""
    return {"model.layers.0.self_attn.q_proj.bias": torch.full((64,), value, dtype=torch.float16)}


def test_a_bias_of_a_layer_that_has_none_must_be_zero(make_folder) -> None:
    folder, _ = make_folder()
    pack(folder, PACKED_CASES["GPTQ 4 bits"], lambda t: t.update(zero_bias(0.5)))
    with pytest.raises(ModelError, match=r"not in the model: model\.layers\.0\.self_attn\.q_proj\.bias"):
        _ = open_model(str(folder)).placements


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=3,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(115, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    assert len(expected) == 2
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (tmp_path / "config.json").write_text(json.dumps(written))
    source = open_model(str(tmp_path))
    for name, weight in expected.items():
        assert torch.equal(source.read_parameter(name), weight), name
        assert torch.equal(source.read_expert(name, 1), weight[1].T), "one alone"


def without(end: str) -> Edit:
    return lambda tensors: tensors.pop(f"{next(iter(LAYERS))}{end}")


def cut(end: str) -> Edit:
    name = f"{next(iter(LAYERS))}{end}"
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


def put(end: str, value: Tensor) -> Edit:
    return lambda tensors: tensors.update({f"{next(iter(LAYERS))}{end}": value})


INT4_CASE, GPTQ_CASE = PACKED_CASES["compressed int4"], PACKED_CASES["GPTQ 4 bits"]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("GPTQ 4 bits", without(".scales"), r"q_proj\.scales is missing"),
        ("GPTQ 4 bits", without(".qweight"), r"q_proj\.qweight is missing, beside .*q_proj\."),
        ("GPTQ 4 bits", cut(".qweight"), r"Rows of 56 are not divided by groups of 32"),
        ("GPTQ 4 bits", cut(".qzeros"), r"q_proj\.qzeros has the shape \[1, 8\]"),
        ("GPTQ 4 bits", put(".g_idx", torch.full((64,), 2, dtype=torch.int32)), r"q_proj\.g_idx holds groups 2 to 2"),
        ("GPTQ 3 bits, ordered", without(".g_idx"), r"q_proj\.g_idx is missing"),
        ("AWQ", cut(".scales"), r"q_proj\.scales has the shape \[1, 64\]"),
        ("bitsandbytes 8 bits", without(".SCB"), r"q_proj\.SCB is missing"),
        ("bitsandbytes 8 bits", put(".weight_format", torch.tensor(2, dtype=torch.uint8)), r"weight_format is 2"),
        ("fp8, 48 x 40", without(".weight_scale_inv"), r"q_proj\.weight_scale_inv is missing"),
        ("fp8, 48 x 40", cut(".weight_scale_inv"), r"asks? for \[2, 2\]"),
        ("fp8, 48 x 40", put(".weight", torch.zeros(64, 64)), r"q_proj\.weight is F32, beside .*weight_scale_inv"),
        ("fp8, one scale", put(".weight_scale_inv", torch.ones(3)), r"weight_scale_inv has the shape \[3\]"),
        ("compressed int4", put(".weight_shape", torch.tensor([64, 63])), r"weight_shape says \[64, 63\]"),
        ("compressed int4", put(".weight_scale", torch.ones(64, 2, dtype=torch.int8)), r"weight_scale is I8"),
        ("compressed NVFP4", without(".weight_global_scale"), r"q_proj\.weight_global_scale is missing"),
    ],
)  # fmt: skip
def test_damaged_parts_are_named(make_folder, name: str, change: Edit, says: str) -> None:
    folder, _ = make_folder()
    pack(folder, PACKED_CASES[name], change)
    with pytest.raises(FormatError, match=says):
        open_model(str(folder)).read_linear(next(iter(LAYERS)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (gptq_config(4, 32, checkpoint_format="marlin"), r"checkpoint_format = 'marlin'"),
        (gptq_config(5, 32), r"bits = 5"),
        (gptq_config(4, 0), r"group_size = 0"),
        (gptq_config(4, 32, dynamic={"+:.*": {"bits": 8}}), r"dynamic = "),
        (gptq_config(4, 32, hadamard=True), r"hadamard = True, which is not understood"),
        (AWQ_CONFIG | {"version": "gemv"}, r"version = 'gemv'"),
        (AWQ_CONFIG | {"zero_point": False}, r"zero_point = False"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size = \[128\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, r"quant_algo = 'NVFP4_AWQ'"),
        ({"quant_method": "aqlm"}, r"quantised by 'aqlm'"),
        (compressed("pack-quantized", **INT4 | {"num_bits": 3}), r"int of 3 bits.* as 'pack-quantized'"),
        (compressed("marlin-24", **INT4), r"as 'marlin-24'"),
        (compressed("float-quantized", **FLOAT8, strategy="token"), r"strategy='token'"),
        (compressed("pack-quantized", **INT4) | {"quantization_status": "frozen"}, r"quantization_status = 'frozen'"),
        (compressed("pack-quantized", **INT4) | {"transform_config": {"config_groups": {}}}, r"transform_config"),
        (compressed("pack-quantized", **INT4) | {"ignore": ["re:("]}, r"expression 're:\('"),
        (compressed("pack-quantized", **INT4, bias=1), r"config_groups\.group_0\.weights .* bias = 1, which is not"),
        (gptq_config(4, 32), r"says gptq, and no weight is stored so"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_configs_that_are_not_understood(make_folder, config: dict[str, Any], says: str) -> None:
    folder, _ = make_folder()
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(FormatError, match=says):
        open_model(str(folder))


def test_what_the_config_keeps_in_16_bits_is_in_16_bits(make_folder) -> None:
    folder, _ = make_folder()
    config = dict(INT4_CASE.config) | {"ignore": ["lm_head", "re:.*q_proj$"]}
    pack(folder, PackedCase(config, INT4_CASE.make))
    with pytest.raises(FormatError, match=r"q_proj is stored in few bits, and .* keeps it in 16 \('re:\.\*q_proj\$'\)"):
        open_model(str(folder))


def test_groups_of_a_config_have_layouts_of_their_own(make_folder) -> None:
    folder, _ = make_folder()
    config = compressed("pack-quantized", **INT4)
    eight = compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)["config_groups"]
    config["config_groups"]["group_1"] = eight["group_0"] | {"targets": ["re:.*down_proj$"]}
    cases = {64: integers_of("compressed int4"), 128: integers_of("compressed int8, rows")}
    weights = pack(folder, PackedCase(config, lambda rows, columns: cases[columns](rows, columns)))
    source = open_model(str(folder))
    assert all(torch.equal(source.read_linear(layer).float(), weight) for layer, weight in weights.items())


def integers_of(name: str) -> Callable[[int, int], Any]:
    return PACKED_CASES[name].make


@pytest.mark.parametrize("name", [name for name in PACKED_CASES if name.startswith("compressed")])
def test_compressed_tensors_widens_to_the_same(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    case = PACKED_CASES[name]
    scheme = QuantizationConfig.model_validate(case.config).config_groups["group_0"]
    parts, weight = case.make(64, 128)
    compressor = BaseCompressor.get_value_from_registry(case.config["format"])
    stored = {end[1:]: tensor for end, tensor in parts.items() if end != ".input_scale"}
    theirs = compressor.decompress(stored, scheme)["weight"]
    assert torch.allclose(theirs.float(), weight, rtol=2.0**-8 if theirs.dtype == torch.bfloat16 else 1e-6, atol=0)


def test_the_table_of_inputs_names_every_method() -> None:
    rows = [line for line in (ROOT / "docs" / "bases.md").read_text().splitlines() if line.startswith("| `")]
    named = {row.split("`")[1] for row in rows}
    tested = {str(case.config["quant_method"]) for case in PACKED_CASES.values()} | {"mxfp4"}
    assert named == METHODS.keys() == tested
