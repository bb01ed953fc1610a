"""Swap modules in a transformers model: linears into four bits, adapters onto linears."""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from nybble.errors import ConfigError
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.dense import STEERS, is_encoder_decoder, known_embedding, why_untouched
from nybble.layers.expert_products import ExpertMatrices
from nybble.layers.lora import DoraLinear, LoraEmbedding, LoraLinear, linear_features, lora_scaling
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.names import matches
from nybble.layers.quantized_experts import QuantizedExperts, expert_shapes, widen_for_adapters
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.recurrence import kernel_packages, recurrent_mixers
from nybble.layers.streamed import StreamedExperts, StreamedLinear
from nybble.layers.token_rows import TokenLogits, TokenRows
from nybble.layers.trained import TrainedModule, resolve_modules, train_modules, trained_modules
from nybble.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.options.adapter_groups import AdapterSizes, NewAdapters

TOWERS = "quantize_towers"  # of a config: which parts of a vision-language model are in few bits and adapted
# Whose `out_proj` transformers hands to a fused kernel while it trains, past any adapter; PEFT refuses it there.
PEFT_TAKES_NO_OUT_PROJ = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
ATTENTION_PARENTS = ("attn", "attention")
Value = TypeVar("Value", int, float)


def is_linear(module: nn.Module) -> bool:
    """Whether it computes x · Wᵀ + b and nothing else: transformers has routers and grouped products that inherit from
    `nn.Linear`.
    """
    if isinstance(module, LoraExperts):
        return False
    if isinstance(module, QuantizedLinear | StreamedLinear | LoraLinear | Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    own_class: Any = type(module)
    return own_class.forward is nn.Linear.forward or _multiplies(own_class)


@functools.cache
def _multiplies(own_class: type[nn.Linear]) -> bool:
    """Whether a class that has a forward of its own gives what `nn.Linear` gives, tried on a small matrix."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, generator=generator), torch.randn(3, 4, generator=generator)
    small = own_class.__new__(own_class)
    nn.Linear.__init__(small, 4, 3, bias=False)
    small.weight = nn.Parameter(weight, requires_grad=False)
    try:
        return torch.equal(own_class.forward(small, x), F.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError):  # it needs what a plain linear layer does not have
        return False


def block_lists(model: nn.Module) -> list[str]:
    """Names of the outermost lists of modules, whose elements are the model's blocks; of one that reads pictures too
    those of the towers that its config names: language, vision or all.
    """
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists.append(name)
    towers = getattr(getattr(model, "config", None), TOWERS, "all")
    if towers == "all":
        return lists
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    inside = next(name for name, module in model.named_modules() if module is decoder)
    return [name for name in lists if name.startswith(f"{inside}.") == (towers == "language")]


def block_names(model: nn.Module) -> list[str]:
    """The model's blocks, in order."""
    return [f"{name}.{child}" for name in block_lists(model) for child, _ in model.get_submodule(name).named_children()]


def block_linears(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the model's blocks; the head and the embeddings lie outside."""
    lists = block_lists(model)
    whole = tuple(f"{name}." for name in trained_modules(model))
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and any(name.startswith(outer + ".") for outer in lists)
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), LoraLinear)
        and not name.startswith(whole)
    ]


def end_modules(model: nn.Module) -> list[str]:
    """Names of the input embedding and of the output head, as far as adapters can go onto them: not of an
    encoder-decoder, whose encoder and decoder have embeddings of their own, tied to that.
    """
    if is_encoder_decoder(model):
        return []
    ends = [known_embedding(model), model.get_output_embeddings()]  # type: ignore[operator]
    plain = [end for end in ends if isinstance(end, nn.Embedding | nn.Linear)]
    return [name for name, module in model.named_modules() if any(module is end for end in plain)]


def quantizable_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that go into four bits: those of the blocks that the model does nothing with but call,
    and whose makers do not keep them in fp32.
    """
    why = why_untouched(model)
    return [name for name in block_linears(model) if name not in why]


def adaptable_linears(model: nn.Module) -> list[str]:
    """Of those the ones that can have an adapter in PEFT, too."""
    refused = _without_adapter(model)
    return [name for name in quantizable_linears(model) if name not in refused]


def _without_adapter(model: nn.Module) -> dict[str, str]:
    """Linear layers that are in few bits and have no adapter -> why."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in PEFT_TAKES_NO_OUT_PROJ:
        return {}
    names = (name for name in quantizable_linears(model) if name.endswith(".out_proj"))
    return dict.fromkeys(names, f"PEFT takes none on it in models of type {model_type}")


def untouched_linears(model: nn.Module) -> dict[str, str]:
    """Linear layers of the blocks that stay as they are, without adapter -> why."""
    why = why_untouched(model)
    return {name: why[name] for name in block_linears(model) if name in why}


def adapted_by_others(model: nn.Module) -> list[str]:
    """Untouched layers that the model calls, on which other programs put adapters: PEFT knows no steering layers."""
    return [name for name, why in untouched_linears(model).items() if why == STEERS]


def describe_untouched(model: nn.Module) -> list[str]:
    """A sentence for each kind of untouched layer, and one for what recurrent layers have beside their linear ones."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, why in untouched_linears(model).items():
        kinds.setdefault((name.rpartition(".")[2], why), []).append(_bytes_of(model.get_submodule(name)))
    sentences = [
        f"{len(sizes)} x {leaf} ({format_bytes(sum(sizes))}) stays as it is, without adapter: {why}"
        for (leaf, why), sizes in kinds.items()
    ]
    without = Counter((name.rpartition(".")[2], why) for name, why in _without_adapter(model).items())
    sentences += [f"{count} x {leaf} in few bits has no adapter: {why}" for (leaf, why), count in without.items()]
    return [*sentences, *_describe_recurrence(model)]


def _describe_recurrence(model: nn.Module) -> list[str]:
    """Which layers carry a state, what of them stays as it is, and what computes them."""
    mixers = recurrent_mixers(model)
    if not mixers:
        return []
    kinds, kept = Counter(type(mixer).__name__ for mixer in mixers.values()), Counter[str]()
    for mixer in mixers.values():
        kept.update({name: parameter.nbytes for name, parameter in mixer.named_parameters(recurse=False)})
        kept.update({name: _bytes_of(child) for name, child in mixer.named_children() if not is_linear(child)})
    names = ", ".join(name for name, size in kept.items() if size)
    who = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    packages = kernel_packages(model)
    absent = [package for package, found in packages.items() if not found]
    how = f"PyTorch, without {', '.join(absent)}" if absent or not packages else f"kernels of {', '.join(packages)}"
    return [f"{who} carry a state: {names} ({format_bytes(sum(kept.values()))}) stay as they are; computed by {how}"]


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def replace_linears(model: nn.Module, names: Iterable[str], formats: BaseFormats, compute_dtype: torch.dtype) -> None:
    """Swap the named `nn.Linear`/`Conv1D` for `QuantizedLinear` without weights, in place."""
    for name in names:
        linear = model.get_submodule(name)
        in_features, out_features = linear_features(linear)
        has_bias, spec = linear.bias is not None, formats.of(name)
        model.set_submodule(
            name, QuantizedLinear(in_features, out_features, has_bias, spec, compute_dtype, device="meta")
        )


def stream_linears(
    model: nn.Module, names: Iterable[str], compute_dtype: torch.dtype, device: torch.device | str
) -> None:
    """Swap the named `nn.Linear` for `StreamedLinear`, in place."""
    for name in names:
        linear = model.get_submodule(name)
        has_bias = linear.bias is not None
        model.set_submodule(name, StreamedLinear(name, *linear_features(linear), has_bias, compute_dtype, device))


def resolve_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the layers that get an adapter.

    Args:
        target_modules: "all-linear" (every linear layer of the blocks), "attention" (those of them inside
            attention modules), "experts" (every expert of a mixture), or names: the last part of a layer's name, any
            dotted suffix of it, or a pattern; or several of these. The embedding and the head are among those that can
            be named. A pattern is a regular expression for a whole name, as in PEFT, or a wildcard
            (`layers.1*.q_proj`) for a dotted suffix.

    Raises:
        ConfigError: a name matches no layer; the message lists the names there are.
    """
    linears, experts = adaptable_linears(model), list(expert_shapes(model))
    in_attention = [name for name in linears if any(word in name.rpartition(".")[0] for word in ATTENTION_PARENTS)]
    groups = {"all-linear": linears, "attention": in_attention, "experts": experts}
    layers = [*linears, *experts, *end_modules(model)]
    wanted = target_modules.split(",") if isinstance(target_modules, str) else list(target_modules)
    chosen: set[str] = set()
    for name in (each.strip() for each in wanted):
        found = groups.get(name) or [layer for layer in layers if matches(layer, name)]
        if not found and name not in ("all-linear", "attention"):
            _refuse_untouched(model, name)
            raise _no_target(name, [group for group, names in groups.items() if names], layers)
        chosen.update(found)
    return [layer for layer in layers if layer in chosen]


def _no_target(wanted: str, groups: Sequence[str], layers: Sequence[str]) -> ConfigError:
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    near = difflib.get_close_matches(wanted, leaves, n=1)
    what = "linear layer or expert" if "experts" in groups else "linear layer"
    return ConfigError(
        f"target_modules names {wanted!r}, which is no {what} of this model's blocks, embedding or head.",
        f"Allowed: {', '.join(groups)}, names among {', '.join(leaves)}, or a pattern of whole names such as "
        f"{layers[0]}.",
        f"Did you mean {near[0]!r}?" if near else "",
    )


def _refuse_untouched(model: nn.Module, wanted: str) -> None:
    has_none = {name: f"has no adapter: {why}" for name, why in _without_adapter(model).items()}
    stays = {name: f"stays as it is: {why}" for name, why in untouched_linears(model).items()}
    for name, why in (has_none | stays).items():
        if matches(name, wanted):
            raise ConfigError(
                f"target_modules names {wanted!r}, which {why}.",
                "Adapters go onto the layers that can go into few bits.",
                "Leave it out.",
            )


def of_pattern(pattern: Mapping[str, Value], layer: str, otherwise: Value) -> Value:
    """The value of the first pattern that a layer's name matches, as in PEFT's `rank_pattern` and `alpha_pattern`."""
    key = first_match(pattern, layer)
    return otherwise if key is None else pattern[key]


def first_match(pattern: Iterable[str], layer: str) -> str | None:
    """The first regular expression that is the whole name, or its end after a dot (PEFT's `get_pattern_key`)."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", layer)), None)


def check_patterns(names: Sequence[str], **patterns: Mapping[str, Any]) -> None:
    """Refuse a pattern that decides nothing.

    Args:
        names: of the layers that get an adapter.
        patterns: by the option's name.

    Raises:
        ConfigError: a pattern matches no adapter, or only those that an earlier one matches.
    """
    for option, pattern in patterns.items():
        used = {first_match(pattern, name) for name in names}
        if unused := [key for key in pattern if key not in used]:
            shadowed = any(first_match(unused[:1], name) for name in names)
            why = "all of whose layers an earlier pattern has taken" if shadowed else "which matches no adapter"
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"{option.replace('_', '-')} names {unused[0]!r}, {why}.",
                f"Allowed: regular expressions for {', '.join(leaves)}, for other ends of names after a dot, or for "
                f"whole names such as {names[0]}; the first that matches counts.",
                "Leave it out, or put it before the other." if shadowed else "",
            )


def check_adaptable(
    model: nn.Module,
    names: Iterable[str],
    *,
    dora: bool = False,
    dropout: float = 0.0,
    init: str = "default",
    probed: bool = False,
) -> None:
    """Refuse what adapters of embedding, head and experts do not have: DoRA; and of experts dropout, since PEFT's
    adapters of parameters have none, ways to begin, and ranks that are probed for.

    Raises:
        ConfigError: one of them is among the names.
    """
    experts = sorted(set(names) & expert_shapes(model).keys())
    asked = {"dora is on": dora, f"dropout is {dropout:g}": dropout > 0, f"init is {init}": init != "default"}
    asked |= {"rank is auto": probed}
    if experts and (found := [what for what, on in asked.items() if on]):
        option = found[0].partition(" ")[0]
        raise ConfigError(
            f"{found[0]}, and {experts[0]} gets an adapter.",
            "Experts get plain LoRA of a given rank, as PEFT has no DoRA or dropout there; they begin with nothing.",
            f"Leave --{option} out, or experts out of --target-modules.",
        )
    if dora and (ends := sorted(set(names) & set(end_modules(model)))):
        raise ConfigError(
            f"dora is on, and {ends[0]} gets an adapter.",
            "DoRA is for linear layers of the blocks.",
            "Leave it out of --target-modules, or leave --dora out.",
        )


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A `(rank, in)` and B `(out, rank)` of every adapter, or those of all experts in one, the magnitudes `(out)` of
    DoRA's, and whatever is trained whole.
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learning_rates(model: nn.Module, ratio: float) -> list[float]:
    """What the learning rate of each of `trained_parameters` is multiplied by.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B's by `ratio`, and DoRA's magnitudes' as in PEFT; but not an
    embedding's, where A and B change places.
    """
    adapters = [each for each in adapters_of(model).values() if not isinstance(each, LoraEmbedding)]
    faster = {id(each.lora_B) for each in adapters}
    faster |= {id(each.magnitude) for each in adapters if isinstance(each, DoraLinear)}
    return [ratio if id(parameter) in faster else 1.0 for parameter in trained_parameters(model)]


def attach_adapters(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, LoraLinear]:
    """Freeze the model and put a LoRA adapter beside each named layer, in place; name -> adapter.

    Args:
        rank_pattern, alpha_pattern: of layers whose rank or alpha is another, by PEFT's rule (`of_pattern`).
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    names = list(names)
    widen_for_adapters(model, names)
    for name in names:
        base = model.get_submodule(name)
        kind = _kind_of_adapter(base, dora)
        own_rank, own_alpha = of_pattern(rank_pattern or {}, name, rank), of_pattern(alpha_pattern or {}, name, alpha)
        adapter = kind(base, own_rank, own_alpha, dropout, rslora, generator)
        adapter.train(model.training)
        model.set_submodule(name, adapter)
        adapters[name] = adapter
    return adapters


def _kind_of_adapter(base: nn.Module, dora: bool) -> type[LoraLinear]:
    if isinstance(base, ExpertMatrices):
        return LoraExperts
    return LoraEmbedding if isinstance(base, nn.Embedding) else DoraLinear if dora else LoraLinear


def add_new_adapters(model: "PreTrainedModel", adapters: "NewAdapters", seed: int) -> None:
    """`attach_adapters` as options say, and what is trained whole beside them.

    Raises:
        ConfigError: target_modules or modules_to_save names nothing of the model, or a pattern no adapter.
    """
    how = adapters.model_dump(include={"rank", "alpha", "dropout", "rslora", "dora", "rank_pattern", "alpha_pattern"})
    sizes = new_adapter_sizes(model, adapters)
    whole = resolve_modules(model, adapters.modules_to_save, in_few_bits(model), sizes)
    attach_adapters(model, sizes, seed=seed, **how)
    train_modules(model, whole)


def in_few_bits(model: nn.Module) -> list[str]:
    """Names of the layers of a loaded model whose weights are in few bits."""
    kinds = QuantizedLinear | StreamedLinear | QuantizedExperts | StreamedExperts
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def new_adapter_sizes(model: nn.Module, adapters: "NewAdapters") -> dict[str, tuple[int, float]]:
    """Layers that options give an adapter -> its rank, and what its product is multiplied by.

    Raises:
        ConfigError: target_modules names no layer, or a pattern no adapter; or one that cannot have what is asked.
    """
    names = resolve_targets(model, adapters.target_modules)
    check_patterns(names, rank_pattern=adapters.rank_pattern, alpha_pattern=adapters.alpha_pattern)
    check_adaptable(model, names, dora=adapters.dora, dropout=adapters.dropout)
    sizes = {}
    for name in names:
        rank = of_pattern(adapters.rank_pattern, name, adapters.settled_rank)
        alpha = of_pattern(adapters.alpha_pattern, name, adapters.alpha)
        sizes[name] = (rank, lora_scaling(alpha, rank, adapters.rslora))
    return sizes


def parameters_a_rank(model: nn.Module, adapters: "AdapterSizes") -> int:
    """Parameters that each rank of the adapters takes, on a model without them; layers with a rank of their own apart.

    Raises:
        ConfigError: as `resolve_targets`.
    """
    names = resolve_targets(model, adapters.target_modules)
    free = [name for name in names if first_match(adapters.rank_pattern, name) is None]
    return max(1, sum(sum(linear_features(model.get_submodule(name))) for name in free))


def remove_adapters(model: nn.Module) -> None:
    """Put the frozen modules back in the place of adapters, and of what is trained whole."""
    trained: dict[str, LoraLinear | TrainedModule] = {**adapters_of(model), **trained_modules(model)}
    for name, module in trained.items():
        model.set_submodule(name, module.base)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapter of the model by the name of the layer it stands for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch the adapters, and what is trained beside them, on, or off to ask the base."""
    for adapter in adapters_of(model).values():
        adapter.switch(enabled)
    for module in model.modules():
        if isinstance(module, TokenRows | TokenLogits | TrainedModule):
            module.enabled = enabled
