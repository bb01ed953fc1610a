"""A model without weights: its modules and names on the meta device, where a tensor takes no memory."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble.errors import ModelError, first_line, foreign_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_skeleton(config: "PretrainedConfig", dtype: torch.dtype = torch.bfloat16) -> "PreTrainedModel":
    """The causal language model that `config` describes, every parameter and buffer on the meta device.

    Attention runs through PyTorch's scaled_dot_product_attention where the architecture allows it.

    Raises:
        ModelError: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    def cannot_be_built(error: Exception) -> ModelError:
        return ModelError(
            f"The model type {config.model_type!r} cannot be built as a causal language model: {first_line(error)}",
            "Allowed: the decoder architectures of the installed transformers; a model's own code is never run.",
            "Choose another model, or update transformers.",
        )

    with foreign_errors(cannot_be_built), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def dense_end_weights(model: "PreTrainedModel") -> set[str]:
    """Names of the parameters that stay in 16 bits: those of the input embeddings and of the output head."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if any(module is end for end in ends)
        for leaf, _ in module.named_parameters(recurse=False)
    }


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out] (GPT-2's Conv1D) and not as [out, in]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
