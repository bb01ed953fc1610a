"""Experts in four bits, against transformers' own experts over the weights that the four bits stand for."""

import json

import pytest
import torch
from mixtures import FAMILIES, dense_twin, make_mixture

from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.errors import ModelError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import dequantize
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.layers.expert_products import ExpertsProduct
from nybble.layers.quantized_experts import ExpertShape, QuantizedExperts
from nybble.quantization.folder import quantize_folder
from nybble.sources.folder import FolderSource
from nybble.sources.load import load_model

NF4 = BaseFormats(QuantSpec())
DEFAULT = ("mixtral", "gpt_oss", "deepseek_v3")  # plain; biases, and matrices the other way round; shared experts


def every_family(function):
    each = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("model_type", each)(function)


@every_family
def test_a_mixture_in_four_bits_is_the_model_with_what_the_bits_stand_for(model_type, tmp_path):
    make_mixture(model_type, tmp_path)
    source = FolderSource(tmp_path, model_type)
    model = load_model(source, NF4, torch.float32)
    quantized = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(quantized) == len(source.experts) >= 2
    twin = dense_twin(model, tmp_path)
    ids = torch.randint(5, 250, (2, 11), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 11, model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    found = []
    for each in (model, twin):
        states = each.get_input_embeddings()(ids).detach().requires_grad_()
        logits = each(inputs_embeds=states, use_cache=False).logits
        (logits * weights).sum().backward()
        found.append((logits.detach(), states.grad))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@every_family
def test_rows_side_by_side_are_what_each_is_alone_and_a_folder_gives_the_same_bits(model_type, tmp_path):
    make_mixture(model_type, tmp_path / "base", torch.bfloat16)
    source = FolderSource(tmp_path / "base", model_type)
    model = load_model(source, NF4, torch.float32)
    quantize_folder(source, NF4, tmp_path / "nf4")
    stored = FolderSource(tmp_path / "nf4", "nf4")
    assert stored.is_streamable and stored.quant_spec == QuantSpec()
    again = load_model(stored, NF4, torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    dense = stored.read_dense(next(iter(stored.experts)), torch.float32)
    assert dense.shape == stored.placements[next(iter(stored.experts))].shape and dense.any()

    attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=4.0)
    causal_lm = CausalLM.of(model)  # compares packed rows with each alone, loss and gradients
    ids = [torch.arange(5, 5 + n, dtype=torch.int32) for n in (9, 5, 12)]
    rows = [EncodedExample(each, torch.ones(len(each), dtype=torch.bool), "row") for each in ids]
    together = causal_lm.token_losses(collate(rows, causal_lm.packed))
    alone = torch.cat([causal_lm.token_losses(collate([row], causal_lm.packed)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("said", [3, 5])
def test_another_number_of_experts_than_the_config_has_is_refused(said, quantized, tmp_path):
    make_mixture("mixtral", folder := tmp_path / "base", torch.bfloat16)
    if quantized:
        quantize_folder(FolderSource(folder, "base"), NF4, folder := tmp_path / "nf4")
        (folder / "nybble-manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": said}))
    source = FolderSource(folder, "base")
    with pytest.raises(ModelError, match=f"(?s)4 experts are stored for model.*asks for {said}"):
        source.read_expert(next(iter(source.experts)), 0)


def test_bytes_of_a_loaded_mixture(tmp_path):
    """1.02 x 4.13 bits a weight at most, once layers are as large as real ones."""
    shape = ExpertShape(8, 1024, 2048)
    experts = QuantizedExperts(shape, QuantSpec(), torch.bfloat16)
    kept = sum(parameter.nbytes for parameter in experts.parameters())
    assert kept <= 1.02 * 4.13 / 8 * shape.elements


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "nf3", "nf2"])
def test_products_of_every_format_against_the_formula(format):
    """Odd sizes, experts without a row, rows of no expert, an adapter; gradients by autograd over dense matrices."""
    generator = torch.Generator().manual_seed(0)
    spec, shape, counts = QuantSpec(format, block_size=32), ExpertShape(4, 33, 17), [3, 0, 5, 1]
    experts = QuantizedExperts(shape, spec, torch.float32)
    from nybble.kernels.ops.four_bit import quantize

    for index in range(4):
        experts.load_expert(index, quantize(torch.randn(17, 33, generator=generator), spec))
    a = torch.randn(4, 3, 33, generator=generator, requires_grad=True)
    b = torch.randn(4, 17, 3, generator=generator, requires_grad=True)
    x = torch.randn(11, 33, generator=generator, requires_grad=True)
    weights = torch.randn(11, 17, generator=generator)
    y = ExpertsProduct.apply(x, counts, experts, a, b, 0.5)
    ours = torch.autograd.grad((y * weights).sum(), (x, a, b))
    dense = torch.stack([dequantize(experts.matrix(index), torch.float32) for index in range(4)])
    of_row = torch.tensor([0] * 3 + [2] * 5 + [3])
    full = dense + 0.5 * b @ a
    theirs_y = torch.cat([torch.einsum("noi,ni->no", full[of_row], x[:9]), torch.zeros(2, 17)])
    theirs = torch.autograd.grad((theirs_y * weights).sum(), (x, a, b))
    assert torch.allclose(y, theirs_y, atol=1e-4)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other, atol=1e-4)
