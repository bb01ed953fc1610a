"""A decoder layer whose MLP is a mixture of experts, forward and backward, an expert at a time.

    y = x2 + sum over a token's experts e of weight_e · down(silu(gate) * up),   gate, up = gate_up_e(rms_norm(x2))

Rows, a token's state for each expert that it is sent to, lie sorted by expert. Of each touched expert the matrices are
written out once in a pass; the states of its tokens are gathered, what it gives back is added up in fp32, and all that
comes between is as small as its rows. Backward computes what lies between again in the same round, unless a block keeps
everything: then gate and up are kept. Which experts and with what weights, transformers' own router says, and its
gradient comes by autograd; it is frozen. Since down_proj is linear, what it reads is multiplied by the weight, and not
what it gives: so the weights' gradients need no second product.

Mixture of experts: arXiv 1701.06538, as in Mixtral (arXiv 2401.04088); Qwen2-MoE's shared expert: arXiv 2407.10671.
Left out: noise on what routers read, capacities, and experts that no matrices belong to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nybble.families import FAMILIES
from nybble.families.family import Family
from nybble.kernels.slabs import copy_of, empty_like
from nybble.layers.added import scaled
from nybble.layers.decoder_block import ACTIVATIONS, DecoderBlock
from nybble.layers.expert_products import ExpertAdapters, ExpertMatrices, ExpertProjection, touched
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.projection import DenseWeights, Projection
from nybble.layers.quantized_experts import DenseExperts, ExpertShape
from nybble.sizes import filled_rows


def block_of(layer: Any, config: Any, weights: DenseWeights) -> DecoderBlock:
    """The decoder block over one layer of a model with this config, as the layer's linears and experts are now."""
    config = config.get_text_config()
    family = FAMILIES[config.model_type]
    mixed = family.mixture_in({name for name, _ in layer.named_modules()})
    return (DecoderBlock if mixed is None else MixtureBlock)(layer, family, config, weights)


@dataclass(frozen=True)
class Routing:
    """Where each token's state goes: R rows, sorted by expert, each expert's filled up with rows of the first token
    and of no weight.

    Args:
        tokens: int64 (R), the token of each row.
        places: int64 (T, k), the row of each of a token's experts.
        counts: rows of each expert.
    """

    tokens: Tensor
    places: Tensor
    counts: Sequence[int]

    @classmethod
    def to(cls, experts: Tensor, num_experts: int) -> "Routing":
        """To these experts of each token, (T, k)."""
        top_k, device = experts.shape[1], experts.device
        ids, order = torch.sort(experts.flatten(), stable=True)
        sent = torch.bincount(ids, minlength=num_experts).tolist()
        counts = [filled_rows(count) for count in sent]
        filled = [count - own for count, own in zip(counts, sent, strict=True)]
        moved = torch.tensor(list(accumulate(filled, initial=0))[:-1], device=device)  # by rows that fill others up
        rows = torch.arange(len(ids), device=device) + moved[ids]
        tokens = torch.zeros(sum(counts), dtype=torch.int64, device=device)
        tokens[rows] = order // top_k
        places = torch.empty_like(order).index_copy_(0, order, rows)
        return cls(tokens, places.view_as(experts), counts)

    def to_rows(self, weights: Tensor) -> Tensor:
        """(T, k) -> (R), zeros of rows that fill up."""
        rows = weights.new_zeros(len(self.tokens))
        return rows.index_copy_(0, self.places.flatten(), weights.flatten())


@dataclass
class Mixed:
    """What a mixture leaves for backward, where the block keeps everything."""

    routing: Routing | None = None
    gate_up: Tensor | None = None  # (R, 2 f)
    shared: "Shared | None" = None


@dataclass
class Shared:
    """What the expert that all tokens pass computes."""

    z: Tensor | None  # (T, Σ ranks)
    gate_up: Tensor  # (T, 2 f), as wide as `MixtureBlock.shared_gate_up` writes it
    weight_z: Tensor | None
    weight: Tensor  # (T, 1), sigmoid of what its layer gives


class MixtureBlock(DecoderBlock):
    """The forward and backward of one transformers decoder layer with experts; it owns no parameters."""

    def _take_mlp(self, layer: Any, family: Family, projection: Callable[..., Projection]) -> None:
        mixture = family.mixture
        assert mixture is not None and family.mlp_output_norm is None and not family.parallel
        experts = layer.get_submodule(mixture.experts)
        self.router = layer.get_submodule(mixture.router)
        self.expert_modules = [getattr(experts, name) for name in ("gate_up_proj", "down_proj")]
        self.shared = bool(mixture.shared_gate_up)
        if self.shared:
            self.shared_gate_up, self.shared_down = (
                projection(*mixture.shared_gate_up),
                projection(*mixture.shared_down),
            )
            self.shared_weight = projection(*mixture.shared_weight)

    @property
    def projections(self) -> tuple[Projection, ...]:
        shared = (self.shared_gate_up, self.shared_down, self.shared_weight) if self.shared else ()
        return self.qkv, self.o, *shared

    def parameters(self) -> list[Tensor]:
        """As `DecoderBlock` says."""
        of_experts = [p for module in self.expert_modules if isinstance(module, LoraExperts) for p in module.trained()]
        return [*super().parameters(), *of_experts]

    def attention_waits(self, like: Tensor) -> bool:
        """The device is asked which experts have tokens."""
        return True

    def mlp_input(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """What router and experts read, (T, hidden), as `DecoderBlock` says."""
        assert self.mlp_norm is not None
        return self.mlp_norm.forward(states)

    def mlp(self, normed: Tensor, x2: Tensor, *, result: bool, kept: bool) -> tuple[Mixed, Tensor | None]:
        """As `DecoderBlock` says; what is computed again, backward computes an expert at a time."""
        mixed = Mixed()
        if not result:
            return mixed, None
        _, chosen, experts = self.router(normed)
        inner, outer = self._expert_projections()
        routing = Routing.to(experts, inner.matrices.num_experts)
        weights = routing.to_rows(chosen)[:, None]
        gate_up = empty_like(normed, (len(routing.tokens), inner.matrices.out_features)) if kept else None
        total = empty_like(normed, dtype=torch.float32).zero_()
        activate, _ = ACTIVATIONS[self.activation, True]
        for expert, rows in touched(routing.counts):
            tokens = routing.tokens[rows]
            x = normed.index_select(0, tokens)  # (rows, hidden)
            out = None if gate_up is None else gate_up[rows]
            both = inner.forward(expert, x, self._weight(inner, expert, x), out=out)  # (rows, 2 f)
            act = activate(*both.chunk(2, dim=1)).mul_(weights[rows])
            total.index_add_(0, tokens, outer.forward(expert, act, self._weight(outer, expert, x)).float())
        y = empty_like(normed).copy_(total.mul_(self.residual))
        del total
        if self.shared:
            shared, act = self._shared(normed)
            y = self.shared_down.forward(act, self.shared_down.low_rank(act), residual=y, factor=self.residual)
            mixed.shared = shared if kept else None
        if kept:
            mixed.routing, mixed.gate_up = routing, gate_up
        return mixed, y.add_(x2)

    def backward_mlp(self, grad_y: Tensor, mlp: Any, states: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `DecoderBlock` says; `mlp` is a `Mixed`."""
        grad_y = scaled(grad_y, self.residual).contiguous()
        normed = self.mlp_input(states)[0]
        with torch.enable_grad():
            routed = normed.detach().requires_grad_()
            _, chosen, experts = self.router(routed)
        inner, outer = self._expert_projections()
        routing = mlp.routing or Routing.to(experts, inner.matrices.num_experts)
        grad_normed, grad_weights, grads = self._backward_experts(
            normed, grad_y, routing, routing.to_rows(chosen.detach()), mlp.gate_up, (inner, outer)
        )
        of_chosen = grad_weights[routing.places].to(chosen.dtype)
        (through_router,) = torch.autograd.grad(chosen, routed, of_chosen)
        grad_normed.add_(through_router)
        if not self.shared:
            return grad_normed, grads
        of_shared, shared_grads = self._backward_shared(normed, grad_y, mlp.shared)
        return grad_normed.add_(of_shared), [*shared_grads, *grads]

    def _backward_experts(
        self,
        normed: Tensor,
        grad_y: Tensor,
        routing: Routing,
        weights: Tensor,
        gate_up: Tensor | None,
        projections: tuple[ExpertProjection, ExpertProjection],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The gradients of what experts read (T, hidden), of the weights of their rows (R), and of their adapters.

        Args:
            gate_up: what was kept of them, (R, 2 f); it is overwritten.
        """
        inner, outer = projections
        learnt = [each.adapters.zeros_like() if each.adapters is not None else None for each in projections]
        total = empty_like(normed, dtype=torch.float32).zero_()
        grad_weights = torch.empty(len(weights), device=weights.device)
        _, activate_backward = ACTIVATIONS[self.activation, True]
        for expert, rows in touched(routing.counts):
            tokens = routing.tokens[rows]
            x, grad = normed.index_select(0, tokens), grad_y.index_select(0, tokens)  # (rows, hidden)
            weight = weights[rows, None]
            matrix = self._weight(inner, expert, x)
            both = inner.forward(expert, x, matrix) if gate_up is None else gate_up[rows]  # (rows, 2 f)
            grad_outer_z = outer.backward_low_rank(expert, grad)
            grad_act = outer.backward_input(expert, grad, grad_outer_z, self._weight(outer, expert, x, "second"))
            gate, up, act = *both.chunk(2, dim=1), empty_like(grad_act)
            activate_backward(
                copy_of(grad_act).mul_(weight), gate, up, gate, up, act
            )  # `both` now holds its own gradient
            grad_weights[rows] = (grad_act * act).sum(1, dtype=torch.float32)
            outer.backward_adapters(expert, grad, grad_outer_z, act.mul_(weight), learnt[1])
            grad_z = inner.backward_low_rank(expert, both)
            total.index_add_(0, tokens, inner.backward_input(expert, both, grad_z, matrix).float())
            inner.backward_adapters(expert, both, grad_z, x, learnt[0])
        of_adapters = [grad for each in learnt if each is not None for grad in (each.a, each.b)]
        return empty_like(normed).copy_(total), grad_weights, of_adapters

    def _expert_projections(self) -> tuple[ExpertProjection, ExpertProjection]:
        """Gate and up, and down, as their adapters are now."""
        inner, outer = (_expert_projection(module) for module in self.expert_modules)
        return inner, outer

    def _weight(self, projection: ExpertProjection, expert: int, like: Tensor, key: object = None) -> Tensor:
        """An expert's matrix, valid until another one is asked for with this key."""
        shape = (projection.matrices.out_features, projection.matrices.in_features)
        return projection.matrices.dense(expert, self.weights.rooms.of(key, shape, like.dtype, like.device))

    # ---- the expert that all tokens pass ---------------------------------------------------------

    def _shared(self, normed: Tensor) -> tuple[Shared, Tensor]:
        """It, and what its down_proj reads, (T, f)."""
        z, weight_z = self.shared_gate_up.low_rank(normed), self.shared_weight.low_rank(normed)
        weight = self.shared_weight.forward(normed, weight_z)[:, :1].sigmoid()
        shared = Shared(z, self.shared_gate_up.forward(normed, z), weight_z, weight)
        activate, _ = ACTIVATIONS[self.activation, True]
        return shared, activate(*self._shared_halves(shared)).mul_(weight)

    def _shared_halves(self, shared: Shared) -> tuple[Tensor, Tensor]:
        gate, up = shared.gate_up[:, : self.shared_gate_up.out_features].chunk(2, dim=1)
        return gate, up

    def _backward_shared(self, normed: Tensor, grad_y: Tensor, kept: Shared | None) -> tuple[Tensor, list[Tensor]]:
        """The gradient of what it read, (T, hidden), and those of its adapters."""
        shared = kept or self._shared(normed)[0]
        down, gate_up, weighing = self.shared_down, self.shared_gate_up, self.shared_weight
        grad_down = down.gradient(grad_y)
        grad_z = down.backward_low_rank(grad_down)
        grad_act = down.backward_input(grad_down, grad_z)  # of what is weighted
        y = gate_up.for_magnitudes(shared.gate_up)
        gate, up, act = *self._shared_halves(shared), empty_like(grad_act)
        _, activate_backward = ACTIVATIONS[self.activation, True]
        activate_backward(copy_of(grad_act).mul_(shared.weight), gate, up, gate, up, act)
        grad_weight = (grad_act * act).sum(1, keepdim=True)
        act.mul_(shared.weight)
        grads = down.backward_adapters(grad_down, grad_z, act, down.low_rank(act))
        grad_z = gate_up.backward_low_rank(shared.gate_up)
        grads = [*gate_up.backward_adapters(shared.gate_up, grad_z, normed, shared.z, y), *grads]
        grad_normed = gate_up.backward_input(shared.gate_up, grad_z)
        grad_logit = weighing.gradient(grad_weight * shared.weight * (1 - shared.weight))
        grad_z = weighing.backward_low_rank(grad_logit)
        grads += weighing.backward_adapters(grad_logit, grad_z, normed, shared.weight_z)
        return grad_normed.add_(weighing.backward_input(grad_logit, grad_z)), grads


def _expert_projection(module: nn.Module | nn.Parameter) -> ExpertProjection:
    """One projection of all experts: a module of matrices, with adapters beside it or not, or transformers' parameter
    `[E, out, in]`.
    """
    if isinstance(module, nn.Parameter):
        num, out_features, in_features = module.shape
        return ExpertProjection(DenseExperts(module, ExpertShape(num, in_features, out_features)))
    if isinstance(module, LoraExperts):
        adapters = ExpertAdapters(module.lora_A.detach(), module.lora_B.detach(), module.scaling)
        return ExpertProjection(module.base, adapters if module.enabled else None)
    assert isinstance(module, ExpertMatrices), module
    return ExpertProjection(module)
