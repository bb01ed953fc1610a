"""Layers that carry a state from token to token: state space models, gated delta nets, short convolutions.

What they have beside their linear layers (a convolution over few tokens, decay rates, biases of step sizes) is small
and stays as it is. So do the linear layers that steer the state: those that give each head, or each channel, how fast
it forgets and how much of a token it takes in. An error there is raised to a power of the number of tokens, and their
matrices are some hundredths of the layer's.

Padded rows need nothing: a state knows only what came before it, and padding comes behind (`data/packing.py`). Rows
side by side need kernels that know where a row begins. transformers has them of other packages, on a GPU, and else a
fallback in PyTorch that does not: there rows are padded.
"""

import functools
import importlib.util
import inspect
import re
import sys
from typing import Any

import torch
from torch import nn

from nybble.data.packing import Batch

DECAY = "A_log"  # the parameter that a mixer with a learnt decay has
# Of such a mixer, the linears that decay, step size and what the state takes in come of: Mamba and Jamba; Qwen3-Next
# and Qwen3.5; OLMo hybrid and Kimi.
STEERING = {"x_proj", "dt_proj", "in_proj_ba", "in_proj_a", "in_proj_b", "a_proj", "b_proj", "f_a_proj", "f_b_proj"}
KERNEL = re.compile(r"^@use_kernel_func_from_hub_with_fallback\(\"\w+\", \"(\w+)\"", re.MULTILINE)


def recurrent_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the model's modules that carry a state, by name: with a learnt decay, or a convolution of each channel
    by itself.
    """
    return {name: module for name, module in model.named_modules() if _decays(module) or _convolves(module)}


def _decays(module: nn.Module) -> bool:
    return DECAY in dict(module.named_parameters(recurse=False))


def _convolves(module: nn.Module) -> bool:
    children = module.children()
    return any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1 for child in children)


def steering_linears(model: nn.Module) -> set[str]:
    """Names of the linears that decays and step sizes come of."""
    return {
        f"{name}.{child}"
        for name, module in recurrent_mixers(model).items()
        if _decays(module)
        for child, _ in module.named_children()
        if child in STEERING
    }


def kernel_packages(model: nn.Module) -> dict[str, bool]:
    """Packages whose kernels transformers runs for the model's recurrences where it finds them -> whether it does."""
    classes: list[Any] = [type(mixer) for mixer in recurrent_mixers(model).values()]
    named = (package for own_class in classes for package in _packages_of(own_class))
    return {package: importlib.util.find_spec(package) is not None for package in dict.fromkeys(named)}


@functools.cache
def _packages_of(own_class: Any) -> tuple[str, ...]:
    """Those that the file of a class of transformers names as the source of its kernels."""
    module = sys.modules[own_class.__module__]
    return tuple(dict.fromkeys(KERNEL.findall(inspect.getsource(module))))


def knows_borders(model: nn.Module) -> bool:
    """Whether what computes the model's recurrences can be told where rows begin: all of its packages are there."""
    packages = kernel_packages(model)
    return bool(packages) and all(packages.values())


def row_borders(batch: Batch) -> dict[str, Any]:
    """Where the rows of a packed batch begin and end, under the names that transformers hands on to kernels."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff()
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    longest = batch.max_document_length
    return {
        "seq_idx": numbers.repeat_interleave(lengths, output_size=batch.input_ids.shape[1])[None],  # (1, T)
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
