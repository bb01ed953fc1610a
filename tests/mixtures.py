"""Tiny mixtures of experts of transformers with weights that matter, and what their four bits stand for."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "architectures"))

from tiny import byte_tokenizer
from tiny_models import tiny_model

# each of a kind: plain; with a shared expert; with latent attention and dense layers; biases, matrices turned; ..
FAMILIES = (
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe", "gpt_oss"),
    *("llama4_text", "longcat_flash"),
)


def make_mixture(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write one as transformers does, experts one by one where its checkpoints have them so, with a tokenizer."""
    model = tiny_model(model_type)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.ndim == 1 and "norm" in name else 0.0
        parameter.data = (mean + 0.2 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def dense_twin(model: Any, folder: Path) -> Any:
    """transformers' own model of the folder, fp32, with the weights that the model's four bits stand for."""
    from transformers import AutoModelForCausalLM

    from nybble.kernels.ops.four_bit import dequantize
    from nybble.layers.quantized_experts import QuantizedExperts, expert_shapes
    from nybble.layers.quantized_linear import QuantizedLinear

    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    twin = twin.requires_grad_(False).eval()
    for ours, theirs in (
        (model.get_input_embeddings(), twin.get_input_embeddings()),
        (model.get_output_embeddings(), twin.get_output_embeddings()),
    ):
        theirs.weight = nn.Parameter(ours.weight.detach().float(), requires_grad=False)
    transposed = {name: shape.transposed for name, shape in expert_shapes(twin).items()}
    for name, module in model.named_modules():
        owner, _, leaf = name.removesuffix(".base").rpartition(".")
        if isinstance(module, QuantizedLinear):
            twin.get_submodule(f"{owner}.{leaf}").weight.data = module.dequantize(torch.float32)
        if isinstance(module, QuantizedExperts):
            parent = twin.get_submodule(owner)
            for index, matrix in enumerate(getattr(parent, leaf).data):
                dense = dequantize(module.matrix(index), torch.float32)
                matrix.copy_(dense.T if transposed[f"{owner}.{leaf}"] else dense)
    return twin
