"""Models with PEFT's adapters, none of whose matrices is zero."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def adapted(base: Any, config: LoraConfig, seed: int = 0) -> Any:
    """A copy of the base with such adapters."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
