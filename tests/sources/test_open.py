"""Opening models: what is taken, and what is refused with which words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nybble.errors import FormatError, ModelError
from nybble.sources.hub import looks_like_hub_id
from nybble.sources.open import open_model
from nybble.sources.processor import load_processor
from nybble.sources.tokenizer import load_tokenizer


def test_a_folder(make_folder) -> None:
    folder, model = make_folder("llama", torch.bfloat16, shard="100KB")
    source = open_model(str(folder))
    assert (source.name, source.quant_spec, source.notes) == (str(folder), None, ())
    assert source.dense_dtype == torch.bfloat16
    assert source.config.model_type == "llama"
    assert source.load_tokenizer()("w5 w9").input_ids == [5, 9]
    assert set(source.tensor_names()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor)
        assert not source.is_quantized(name)


def test_the_tokenizer_can_come_from_elsewhere(make_folder) -> None:
    folder, _ = make_folder()
    other, _ = make_folder("gpt2")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="--tokenizer"):
        open_model(str(folder)).load_tokenizer()
    assert open_model(str(folder), str(other)).load_tokenizer()("w5").input_ids == [5]


def test_the_fingerprint_tells_models_apart_and_stays(make_folder) -> None:
    folder, _ = make_folder()
    first = open_model(str(folder)).fingerprint()
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    assert open_model(str(copy)).fingerprint() == first

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert open_model(str(folder)).fingerprint() != first

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert open_model(str(copy)).fingerprint() != first


# ---- refused -------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model at"):
        open_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"There is no model at missing\.gguf"):
        open_model("missing.gguf")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3}', '{"model_type": "no-such-model"}'])
def test_a_malformed_config(make_folder, text: str) -> None:
    folder, _ = make_folder()
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.ckpt"])
def test_a_pickle_is_refused_unopened(make_folder, name: str) -> None:
    folder, _ = make_folder()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match=rf"pickle \({name}\), which is refused: opening one can run any code"):
        open_model(str(folder))
    with pytest.raises(ModelError, match="is a pickle, which is refused"):
        open_model(str(folder / name))


def test_a_pickle_beside_safetensors_is_left_alone(make_folder) -> None:
    folder, _ = make_folder()
    (folder / "optimizer.pt").write_bytes(b"cos\nsystem\n")
    assert open_model(str(folder)).tensor_names()


def test_no_weights(make_folder) -> None:
    folder, _ = make_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        open_model(str(folder))


def test_a_missing_shard(make_folder) -> None:
    folder, _ = make_folder(shard="100KB")
    shard = sorted(folder.glob("model-00002*"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        open_model(str(folder))


def test_two_sets_of_weights_are_refused(make_folder) -> None:
    """transformers reads the single file, others the shards."""
    folder, _ = make_folder(shard="100KB")
    shutil.copy(make_folder()[0] / "model.safetensors", folder)
    with pytest.raises(ModelError, match=r"model\.safetensors beside model\.safetensors\.index\.json"):
        open_model(str(folder))


@pytest.mark.parametrize("model_type", ["bert", "t5", "qwen2", "gpt2", "gemma2"])
def test_a_tokenizer_that_is_not_there_is_not_made_up(model_type: str, tmp_path: Path) -> None:
    """Of some types transformers gives an empty one, to which every word is unknown."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=r"No tokenizer could be loaded(.|\n)*--tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_files_of_its_own_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert load_tokenizer(str(tmp_path))("a").input_ids == [100, 1]


def test_a_truncated_shard(make_folder) -> None:
    folder, _ = make_folder(shard="100KB")
    shard = sorted(folder.glob("model-00002*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard.name} is truncated"):
        open_model(str(folder))


def test_a_single_safetensors_file(make_folder) -> None:
    folder, _ = make_folder()
    with pytest.raises(ModelError, match=r"a single file(.|\n)*Give the folder"):
        open_model(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
)
def test_other_quantisations_are_named(make_folder, quantization: dict) -> None:
    folder, _ = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(FormatError, match=quantization["quant_method"]):
        open_model(str(folder))


def test_code_of_a_model_is_not_run(make_folder) -> None:
    folder, _ = make_folder()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')")
    with pytest.raises(ModelError, match="never run"):
        open_model(str(folder))
    assert not (folder / "pwned").exists()


def test_a_hub_id_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the hub is looked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"(?s)the hub cannot be reached.*smollm2-135m-instruct"):
        open_model("someone/some-model")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", True),
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("./model", False),
        ("/abs/model", False),
        ("a/b/c", False),
        ("../up", False),
        ("~/model", False),
        ("file.gguf", False),
        ("", False),
    ],
)
def test_what_is_taken_for_a_hub_id(name: str, expected: bool) -> None:
    assert looks_like_hub_id(name) == expected


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_run_where_a_model_is_wanted_is_pointed_to_merging(inside: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"nybble merge --run {tmp_path} --out MODEL"):
        open_model(str(tmp_path / inside))


def test_a_missing_pillow_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.utils.is_vision_available", lambda: False)
    with pytest.raises(ModelError, match="Pillow is not installed") as refused:
        load_processor(str(tmp_path), torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert refused.value.fix == "pip install pillow"
