"""The experts of a mixture with their matrices in few bits, as modules in the place of transformers' parameters.

transformers keeps a projection of all experts as one parameter of three dimensions and dispatches what computes with it
over a registry (`transformers.integrations.moe`): a class that takes part says how its matrices lie (`is_transposed`),
whether they have biases, and how gate and up go together (`_apply_gate`). nybble registers `experts_forward` there, and
a module of matrices stands under the parameter's own name; in other libraries' scripts an `ExpertsWeight`.

Two classes take no part, and compute what is their own business: `OWN` has a module of nybble's for each, which has
their parameters under the same names and stands in their place as soon as anything of theirs is swapped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_stack import QuantizedStack
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.layers.expert_products import ExpertMatrices, ExpertsProduct, Routed
from nybble.layers.experts_weight import ExpertsWeight
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.streamed import StreamedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "nybble"  # what `experts_forward` is registered as
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertShape:
    """One projection of all experts of a block.

    Args:
        num: E.
        transposed: a parameter that holds it is `[E, in, out]` and not `[E, out, in]`.
        turned_in_peft: and PEFT does not know: its A and B are those of the transposed matrices.
    """

    num: int
    in_features: int
    out_features: int
    transposed: bool = False
    turned_in_peft: bool = False

    @property
    def elements(self) -> int:
        return self.num * self.in_features * self.out_features


class QuantizedExperts(ExpertMatrices):
    """One projection of all experts, in few bits.

    Args:
        dtype: of the matrices that they were made from.
        device: where to allocate; "meta" for a layer whose matrices come later.
    """

    def __init__(self, shape: ExpertShape, spec: QuantSpec, dtype: torch.dtype, device: torch.device | str = "cpu"):
        super().__init__(shape.num, shape.in_features, shape.out_features)
        self._take(QuantizedStack.empty(shape.num, spec, (shape.out_features, shape.in_features), dtype, device))

    @classmethod
    def over(cls, stack: QuantizedStack) -> "QuantizedExperts":
        """The same bytes as a module."""
        out_features, in_features = stack.shape
        made = cls(ExpertShape(len(stack), in_features, out_features), stack.spec, stack.dtype, "meta")
        made._take(stack)
        return made

    def _take(self, stack: QuantizedStack) -> None:
        self.spec, self.source_dtype = stack.spec, stack.dtype
        self.weight = nn.Parameter(stack.packed, requires_grad=False)
        self.scales = nn.Parameter(stack.scales, requires_grad=False)

    def load_stack(self, stack: QuantizedStack) -> None:
        """Take over the bytes of all of them."""
        assert len(stack) == self.num_experts and stack.shape == self._shape, (len(stack), stack.shape, self)
        self._take(stack)

    def load_expert(self, index: int, q: QuantizedTensor) -> None:
        """Copy one expert's matrix into its place; the first decides format and device."""
        if self.weight.is_meta or index == 0:
            self._take(QuantizedStack.empty(self.num_experts, q.spec, self._shape, q.dtype, q.packed.device))
        self.stack().put(index, q)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def stack(self) -> QuantizedStack:
        """The matrices as formats/ knows them; nothing is copied."""
        return QuantizedStack(self.weight.detach(), self.scales.detach(), self.spec, self._shape, self.source_dtype)

    def matrix(self, index: int) -> QuantizedTensor:
        return self.stack().matrix(index)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}"


class DenseExperts(ExpertMatrices):
    """One projection of all experts in 16 or 32 bits, for adapters beside it.

    Args:
        weight: transformers' parameter.
    """

    def __init__(self, weight: nn.Parameter, shape: ExpertShape):
        super().__init__(shape.num, shape.in_features, shape.out_features)
        self.weight, self.transposed = weight, shape.transposed

    def matrix(self, index: int) -> Tensor:
        weight = self.weight[index].detach()
        return weight.T if self.transposed else weight


def expert_shapes(model: nn.Module) -> dict[str, ExpertShape]:
    """Projections of experts that can be in few bits, by the name of the parameter that holds them.

    Found by what transformers' interface asks of a class, not by its name.
    """
    found = {}
    for name, module in model.named_modules():
        turned, own = _turned(module), _own_class(module) is not None
        for leaf in PROJECTIONS if turned is not None else ():
            shape = _shape_of(getattr(module, leaf, None), bool(turned))
            if shape is not None:
                found[f"{name}.{leaf}"] = replace(shape, turned_in_peft=own and shape.transposed)
    return found


def experts_given_all(model: nn.Module) -> int:
    """Experts of a block that are given a state for every token, sent to them or not; 0 where such are gathered."""
    given = [module for module in model.modules() if (own := _own_class(module)) is not None and own.given_all]
    return max((_num(module.down_proj) for module in given), default=0)


def _own_class(module: nn.Module) -> "type[OwnExperts] | None":
    """What stands in its place, or what it is, of a module that takes no part in the registry."""
    return type(module) if isinstance(module, OwnExperts) else OWN.get(type(module).__name__)


def _turned(module: Any) -> bool | None:
    """Whether an experts module has its matrices `[in, out]`; None of modules that are none."""
    if (own := _own_class(module)) is not None:
        return own.turned
    return module.is_transposed if _is_of_interface(module) else None


def _is_of_interface(module: nn.Module) -> bool:
    """Whether its class takes part in transformers' registry of what computes experts."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def _shape_of(projection: Any, transposed: bool) -> ExpertShape | None:
    if isinstance(projection, ExpertMatrices | LoraExperts):
        inner = projection.base if isinstance(projection, LoraExperts) else projection
        return ExpertShape(inner.num_experts, inner.in_features, inner.out_features, transposed)
    if not isinstance(projection, nn.Parameter) or projection.ndim != 3:
        return None
    num, first, second = projection.shape
    features = (first, second) if transposed else (second, first)
    return ExpertShape(num, *features, transposed)


def replace_experts(model: "PreTrainedModel", names: Iterable[str], formats: BaseFormats, dtype: torch.dtype) -> None:
    """Swap the named parameters for `QuantizedExperts` without matrices, in place."""
    shapes = expert_shapes(model)
    modules = {name: QuantizedExperts(shapes[name], formats.of(name), dtype, "meta") for name in names}
    swap_experts(model, modules)
    if modules:
        model.set_experts_implementation(IMPLEMENTATION)


def stream_experts(model: "PreTrainedModel", names: Iterable[str], device: torch.device | str) -> None:
    """Swap the named parameters for `StreamedExperts`, in place."""
    shapes = expert_shapes(model)
    each = {name: shapes[name] for name in names}
    modules = {n: StreamedExperts(n, s.num, s.in_features, s.out_features, device) for n, s in each.items()}
    swap_experts(model, modules)
    if modules:
        model.set_experts_implementation(IMPLEMENTATION)


def widen_for_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Put `DenseExperts` in place of those of the named parameters that transformers holds in 16 or 32 bits."""
    shapes, parameters = expert_shapes(model), dict(model.named_parameters())
    owners = {name.rpartition(".")[0] for name in names if name in shapes and name in parameters}
    together = [name for name in shapes if name.rpartition(".")[0] in owners]  # `experts_forward` computes all of them
    swap_experts(model, {name: DenseExperts(parameters[name], shapes[name]) for name in together})
    if owners:
        model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]


def swap_experts(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules of matrices in the place of parameters, or of other such modules; what computes with them is the
    model's `set_experts_implementation`, or a module of `OWN`.
    """
    own_experts(model, modules)
    shapes = expert_shapes(model)
    for name, module in modules.items():
        if isinstance(module, ExpertMatrices):
            module.turned_in_peft = shapes[name].turned_in_peft
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        delattr(parent, leaf)
        setattr(parent, leaf, module)


def own_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Put nybble's modules, with the same parameters, in place of those that have the named projections and take no
    part in transformers' registry.
    """
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(owner)
        if (own := OWN.get(type(module).__name__)) is not None:
            model.set_submodule(owner, own(module))


def widen_experts(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Put transformers' own parameters, in `dtype`, in place of modules of matrices, and its own code to work."""
    found = expert_shapes(model)
    for name, shape in found.items():
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        matrices = getattr(parent, leaf)
        if not isinstance(matrices, ExpertMatrices):
            continue
        dense = torch.stack([matrices.widened(index, dtype) for index in range(shape.num)])
        delattr(parent, leaf)
        weight = dense.transpose(1, 2).contiguous() if shape.transposed else dense
        parent.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    if found:
        model.set_experts_implementation("eager")


def experts_forward(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module of transformers computes, through modules of matrices: (tokens, width) -> the same.

    Args:
        top_k_index, top_k_weights: (tokens, k), each token's experts and what their outputs are multiplied by.
    """
    device = hidden.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _through_experts(experts, hidden.to(computed), top_k_index, top_k_weights).to(hidden.dtype)


def _through_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    num_tokens, top_k = top_k_index.shape
    num_experts = _num(experts.down_proj)
    ids, order = torch.sort(top_k_index.flatten(), stable=True)  # by expert
    counts = torch.bincount(ids, minlength=num_experts)[:num_experts].tolist()
    x = hidden.index_select(0, order // top_k)  # (rows, width)
    outer = _through_matrices(experts, x, counts)
    weighted = outer * top_k_weights.flatten()[order][:, None]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    per_token = weighted.index_select(0, places).view(num_tokens, top_k, -1)
    return per_token.sum(1)


def _through_matrices(experts: Any, x: Tensor, counts: list[int]) -> Tensor:
    """(rows, width) -> the same: rows sorted by expert, through the two projections of each."""
    matrices: Any = experts.gate_up_proj if experts.has_gate else experts.up_proj
    without_rows = [0] * (_num(matrices) - len(counts))
    turned = bool(_turned(experts))
    inner = _times(matrices, Routed(x, counts + without_rows), turned)
    if experts.has_bias:
        inner = inner + _bias(experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias, counts, inner)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = _times(experts.down_proj, Routed(inner, counts), turned)
    if experts.has_bias:
        outer = outer + _bias(experts.down_proj_bias, counts, outer)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    return outer


def _num(projection: Any) -> int:
    """How many experts a projection is of: a parameter, or a module."""
    num: int = projection.shape[0] if isinstance(projection, Tensor) else projection.num_experts
    return num


def _times(projection: Any, routed: Routed, transposed: bool) -> Tensor:
    """Rows through their experts' matrices, (rows, in) -> (rows, out): a module, or a parameter `[E, out, in]` or
    turned.
    """
    if isinstance(projection, nn.Module):
        y: Tensor = projection(routed)
        return y
    if isinstance(projection, ExpertsWeight):
        matrices, factors = QuantizedExperts.over(projection.q), projection.added or (None, None, 1.0)
        return ExpertsProduct.apply(routed.x, routed.counts, matrices, *factors)
    of_expert = projection.mT if transposed else projection  # (E, out, in)
    rows = routed.x[: sum(routed.counts)].split(list(routed.counts))
    parts = [F.linear(x, matrix.to(x.dtype)) for x, matrix in zip(rows, of_expert, strict=True)]
    none = routed.x.new_zeros(len(routed.x) - sum(routed.counts), of_expert.shape[1])
    return torch.cat([*parts, none])


def _bias(bias: Tensor, counts: list[int], like: Tensor) -> Tensor:
    """Of each row its expert's bias: (E, out) -> (rows, out); zeros for rows of no expert."""
    repeats = torch.tensor(counts, device=bias.device)
    rows = bias.to(like.dtype).repeat_interleave(repeats, dim=0)
    return torch.cat([rows, rows.new_zeros(len(like) - len(rows), rows.shape[1])])


class OwnExperts(nn.Module):
    """What stands in place of an experts module of transformers that takes no part in its registry.

    Args:
        theirs: whose parameters it takes over.

    Attributes:
        given_all: each expert is given a state for every token.
        turned: matrices are `[in, out]`; not called as in the registry, by which PEFT would go.
    """

    given_all, turned = False, False
    has_gate, has_bias, has_post_expert_norm = True, False, False

    def __init__(self, theirs: Any):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = theirs.gate_up_proj, theirs.down_proj, theirs.act_fn
        self.train(theirs.training)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        y: Tensor = self.act_fn(gate) * up
        return y


class Llama4Experts(OwnExperts):
    """Llama 4's, which are given every token for each expert, multiplied by what that expert weighs for it: 0 for those
    that it was not sent to, of which zeros come out, and whose gradients that 0 stops.
    """

    given_all, turned = True, True

    def forward(self, hidden: Tensor) -> Tensor:
        """(E · tokens, width) -> the same, all tokens of an expert together."""
        per_expert = hidden.view(_num(self.down_proj), -1, hidden.shape[-1])
        sent = per_expert.detach().any(-1)  # (E, tokens)
        rows, counts = sent.flatten().nonzero().squeeze(1), sent.sum(1).tolist()
        device = hidden.device.type
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            outer = _through_matrices(self, hidden.index_select(0, rows).to(computed), counts).to(hidden.dtype)
        return torch.zeros_like(hidden).index_copy(0, rows, outer)


class LongcatExperts(OwnExperts):
    """LongCat's, of which those behind the last that has a matrix in `down_proj` give back what they are given."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `experts_forward`."""
        given_back = (top_k_weights * (top_k_index >= _num(self.down_proj))).sum(1)  # (tokens)
        through = experts_forward(self, hidden, top_k_index, top_k_weights)
        return through + (hidden * given_back[:, None]).to(hidden.dtype)


OWN: Mapping[str, type[OwnExperts]] = {"Llama4TextExperts": Llama4Experts, "LongcatFlashExperts": LongcatExperts}
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
