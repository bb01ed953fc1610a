"""Which parameters of a transformers model go into few bits, and putting one there.

A linear layer stays the `nn.Linear` it is and gets a `QuantizedWeight`; experts stay the parameters that they are, as
`ExpertsWeight`, computed by what nybble has in transformers' registry of experts (`layers/quantized_experts.py`).
"""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nybble.bridge.config import NybbleConfig
from nybble.calibration.search import round_weight
from nybble.errors import ConfigError
from nybble.formats.quantized_stack import QuantizedStack
from nybble.layers.convert import describe_untouched, quantizable_linears
from nybble.layers.dense import is_transposed
from nybble.layers.experts_weight import frozen_experts
from nybble.layers.few_bit_tensor import FewBitTensor
from nybble.layers.lora import linear_features
from nybble.layers.names import matches
from nybble.layers.quantized_experts import expert_shapes
from nybble.layers.quantized_weight import frozen_parameter
from nybble.options.groups import DENSE_SHARE
from nybble.sources.inventory import take_inventory
from nybble.sources.parts import partly_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def few_bit_parameters(model: "PreTrainedModel", config: NybbleConfig, *, is_stored: bool = False) -> list[str]:
    """Names of the parameters that go into few bits; what stays although it is a block's matrix is warned of.

    Args:
        is_stored: skip_modules is a folder's own list, and nothing is said.

    Raises:
        ConfigError: skip_modules names nothing of the model, or all of it.
    """
    linears, experts = quantizable_linears(model), list(expert_shapes(model))
    if not is_stored:
        _check_skipped(config.skip_modules, [*experts, *(name for name, _ in model.named_modules() if name)])
        _say_what_stays(model)
    names = [f"{name}.weight" for name in linears if not _is_skipped(name, config)]
    names += [name for name in experts if not _is_skipped(name, config)]
    if not names:
        raise ConfigError(
            f"No weight of {type(model).__name__} would go into {config.format}.",
            "Linear layers of the blocks and experts do, but for those that skip_modules names.",
        )
    return names


def _is_skipped(name: str, config: NybbleConfig) -> bool:
    """Whether it, or a module around it, is named."""
    parts = name.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(matches(each, wanted) for each in around for wanted in config.skip_modules)


def _check_skipped(skipped: Iterable[str], names: Sequence[str]) -> None:
    for wanted in skipped:
        if not any(matches(name, wanted) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
            near = difflib.get_close_matches(wanted, leaves, n=1)
            raise ConfigError(
                f"skip_modules names {wanted!r}, which is no module of this model.",
                f"Allowed: whole names, their ends after a dot, or patterns; among {', '.join(leaves)}.",
                f"Did you mean {near[0]!r}?" if near else "",
            )


def _say_what_stays(model: "PreTrainedModel") -> None:
    for sentence in describe_untouched(model):
        warnings.warn(sentence, stacklevel=4)
    inventory = take_inventory(model)
    if inventory.dense_share > DENSE_SHARE:
        warnings.warn(f"{type(model).__name__}: {partly_dense(inventory)}", stacklevel=4)


def straighten(model: nn.Module, names: Iterable[str]) -> None:
    """Put `nn.Linear` in the place of transformers' transposed `Conv1D` (GPT-2) among the named, weights turned."""
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if isinstance(module, Conv1D):
            linear = nn.Linear(*linear_features(module), bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name.removesuffix(".weight"), linear)


def transposed(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the named parameters that a file may hold the other way round."""
    linears = {name: name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return {name for name, linear in linears.items() if is_transposed(model.get_submodule(linear))}


def put_weight(name: str, value: Tensor, config: NybbleConfig) -> nn.Parameter:
    """The parameter that stands for a dense weight `[out, in]`."""
    spec = config.formats.of(name.removesuffix(".weight"))
    return frozen_parameter(round_weight(value, spec, config.quality), value.dtype)


def put_experts(name: str, value: Tensor, config: NybbleConfig, transposed: bool) -> nn.Parameter:
    """The same of one projection of all experts, `[E, out, in]` or turned."""
    spec = config.formats.of(name)
    matrices = (round_weight(each.T if transposed else each, spec, config.quality) for each in value)
    return frozen_experts(QuantizedStack.of(matrices, len(value)), value.dtype, transposed)


def stored_parameters(model: nn.Module) -> dict[str, Any]:
    """What is in few bits, by the name of the parameter."""
    return {name: each.q for name, each in model.named_parameters() if isinstance(each, FewBitTensor)}
