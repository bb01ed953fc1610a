"""A GGUF file's own blocks as the base: the same values and gradients as widened, in the file's own bytes."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from tiny import make_data, tune
from tiny_families import MIXTURES
from tiny_gguf import IN_FILES, TYPES, WIDE_ENOUGH, mixed_file, write_model
from torch import Tensor
from transformers import PreTrainedModel
from typed import typed

from nybble.errors import FormatError
from nybble.formats.gguf import DENSE_ENDS
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import adapters_of
from nybble.layers.quantized_experts import QuantizedExperts, expert_shapes
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.runs.adapter_files import WEIGHTS_NAME
from nybble.runs.open_run import load_frozen, load_tuned, open_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel

ROWS = [{"prompt": f"ab {n}", "completion": f" a ab {2 * n}"} for n in range(30)]


@pytest.fixture
def llama_file(make_folder: Callable, tmp_path: Path) -> Path:
    return mixed_file(make_folder, tmp_path / "m.gguf")


def gradients(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """Of adapters that are alike for every model."""
    targets = "all-linear,experts" if expert_shapes(model) else "all-linear"
    adapters, generator = adapters_of(tune(model, targets)), torch.Generator().manual_seed(0)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2, generator=generator)
    loss = model(tokens, labels=tokens).loss
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


ALIKE = ("smollm3", "granite", "ministral3", "gemma2", "gemma3_text")  # in their linear layers


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in IN_FILES]
)
def test_logits_and_gradients_are_those_of_the_widened_model(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, family: str
) -> None:
    file = mixed_file(make_folder, tmp_path / "m.gguf", family)
    source = open_model(str(file))
    stored = source.as_stored()
    ours = load_model(stored, BaseFormats(), torch.float32)
    widened = load_model(source, None, torch.float32)
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)}
    experts = {name: module for name, module in ours.named_modules() if isinstance(module, QuantizedExperts)}
    formats = {module.spec.format.upper() for module in (*linears.values(), *experts.values())}
    assert formats <= set(TYPES.values()) and (family != "llama" or formats == set(TYPES.values()))
    assert all(torch.equal(module.dequantize(), widened.get_submodule(name).weight) for name, module in linears.items())
    assert len(experts) == 2 * len(source.blocks) * (family in MIXTURES)
    for name, module in experts.items():
        assert torch.equal(module.widened(2, torch.float32), widened.get_parameter(name)[2])
    kept = sum(module.packed.numel() + module.scales.numel() for module in linears.values())
    kept += sum(parameter.nbytes for module in experts.values() for parameter in module.parameters())
    in_blocks = [tensor for tensor in gguf.GGUFReader(file).tensors if tensor.tensor_type > 1]
    assert kept == sum(tensor.n_bytes for tensor in in_blocks if tensor.name not in DENSE_ENDS)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, widened(tokens).logits, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(ours, tokens), gradients(widened, tokens), strict=True)
    assert all(float(a.norm()) > 0 and float((a - b).norm()) <= 1e-5 * float(a.norm()) for a, b in pairs)
    assert stored.fingerprint() == source.fingerprint() and "fits this file in llama.cpp" in stored.notes[0]


def test_rows_are_in_transformers_order_block_by_block(llama_file: Path) -> None:
    source = open_model(str(llama_file))
    layer = "model.layers.1.self_attn.q_proj"
    packed = source.as_stored().read_linear(layer).packed
    assert packed.shape == (256, 144)
    raw = next(t for t in gguf.GGUFReader(llama_file).tensors if t.name == "blk.1.attn_q.weight").data
    heads = torch.from_numpy(raw.copy()).view(4, 32, 2, 144)  # (heads, pairs, halves, bytes)
    assert torch.equal(packed, heads.transpose(1, 2).reshape(256, 144))


def test_blocks_that_are_not_computed_with_are_named(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("qwen3", num_hidden_layers=1)
    five = write_model(tmp_path / "five.gguf", model, "qwen3", "Q5_1")
    with pytest.raises(FormatError, match=r"q_proj in Q5_1, .*(\n|.)*Q4_0, Q8_0.*(\n|.)*format nf4"):
        open_model(str(five)).as_stored()
    half = write_model(tmp_path / "half.gguf", model, "qwen3", "F16")
    with pytest.raises(FormatError, match="no few bits of its own"):
        open_model(str(half)).as_stored()


def test_experts_whose_gate_and_up_are_in_different_blocks_are_named(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("qwen3_moe", num_hidden_layers=1, **WIDE_ENOUGH, moe_intermediate_size=256)
    types = TYPES | {"experts.up_proj": "Q5_K"}
    file = write_model(tmp_path / "m.gguf", model, "qwen3moe", own_blocks=types)
    with pytest.raises(FormatError, match=r"experts\.gate_up_proj in Q4_K and Q5_K, .*(\n|.)*gate and up of experts"):
        open_model(str(file)).as_stored()


def test_a_folder_in_16_bits_has_no_bits_of_its_own(make_folder: Callable) -> None:
    folder, _ = make_folder(num_hidden_layers=1)
    source: StoredModel = open_model(str(folder))
    with pytest.raises(FormatError, match="no few bits of its own"):
        source.as_stored()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_is_the_same_run_streamed_from_the_file(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    mixed_file(make_folder, tmp_path / "m.gguf", family)
    monkeypatch.chdir(tmp_path)
    make_data(Path("d.jsonl"), ROWS)
    options = ["--max-steps", "2", "--rows-per-step", "4", "--template", "none"]
    options += ["--target-modules", "all-linear,experts"] if family in MIXTURES else []
    for stream in ("never", "always"):
        run = ["train", "--model", "m.gguf", "--format", "stored", "--data", "d.jsonl", "--out", stream]
        shown = typed([*run, "--stream-base", stream, *options])
        assert shown.exit_code == 0, shown.output
    files = [Path(stream, "adapter", WEIGHTS_NAME).read_bytes() for stream in ("never", "always")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", IN_FILES)
def test_the_adapter_fits_the_very_file_in_llama_cpp(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    mixed_file(make_folder, tmp_path / "m.gguf", family)
    monkeypatch.chdir(tmp_path)
    make_data(Path("d.jsonl"), ROWS)
    options = ["--max-steps", "12", "--rows-per-step", "8", "--template", "none", "--lr", "0.01"]
    options += ["--target-modules", "all-linear,experts"] if family in MIXTURES else []
    run = ["train", "--model", "m.gguf", "--format", "stored", "--data", "d.jsonl", "--out", "run"]
    shown = typed([*run, *options])
    assert shown.exit_code == 0, shown.output
    exported = typed(["export", "--run", "run", "--to", "gguf-lora", "--out", "lora"])
    assert exported.exit_code == 0, exported.output
    opened, row = open_run(Path("run")), tokens[0].tolist()
    with torch.no_grad():
        tuned = load_tuned(opened, torch.float32, torch.device("cpu"))(tokens[:1]).logits[0]
        base = load_frozen(opened, torch.float32, torch.device("cpu"))(tokens[:1]).logits[0]
    model = llama_cpp.Llama("m.gguf", n_ctx=64, logits_all=True, verbose=False, lora_path="lora/adapter.gguf")
    model.eval(row)
    theirs = torch.tensor(model.scores[: len(row)])
    # llama.cpp rounds the inputs of each product to 8 bits, which moves the logits by far less than the adapter does
    assert divergence(tuned, theirs) < 0.01 * divergence(tuned, base)


def divergence(p: Tensor, q: Tensor) -> float:
    logs = p.log_softmax(-1), q.log_softmax(-1)
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
