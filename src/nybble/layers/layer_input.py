"""What a decoder layer makes of an input of its own, and what passes from layer to layer beside the states.

    y = x + norm(project(activation(gate(x)) * e))

e `(T, width)` is a layer's part of a second embedding of the tokens ("per-layer embeddings" in Gemma 3n and 4). Layers
may also read keys and values that an earlier one computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nybble.families import family_of
from nybble.kernels.slabs import empty_like
from nybble.layers.added import Added, add_projection
from nybble.layers.norms import Norm
from nybble.layers.projection import Projection
from nybble.sizes import LAYER_INPUT_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Beside:
    """What the layers of one pass read beside the states.

    Args:
        inputs: of each layer, `(T, layers, width)`, or None.
        keys_values: by kind of layer, `(T, 2 kv)` of the last that computed its own and gives them to later ones.
    """

    inputs: Tensor | None = None
    keys_values: dict[str, Tensor] = field(default_factory=dict)

    def input_of(self, layer: int) -> Tensor | None:
        """`(T, width)`"""
        return None if self.inputs is None else self.inputs[:, layer]


def beside_states(model: "PreTrainedModel", input_ids: Tensor, embedded: Tensor) -> Beside:
    """What there is at the start of a pass.

    Args:
        input_ids: int64 `(T)`.
        embedded: what the embedding module gave of them, `(T, hidden)`.
    """
    family = family_of(model.config.get_text_config())
    if family is None or family.layer_inputs is None:
        return Beside()
    base: Any = model.base_model
    layers, width = model.config.get_text_config().num_hidden_layers, base.hidden_size_per_layer_input
    inputs = empty_like(embedded, (len(embedded), layers, width))
    for start in range(0, len(embedded), LAYER_INPUT_TOKENS):
        rows = slice(start, start + LAYER_INPUT_TOKENS)
        own = base.get_per_layer_inputs(input_ids[None, rows], None)  # (1, some of T, layers, width)
        inputs[rows] = base.project_per_layer_inputs(embedded[None, rows], own)[0]
    return Beside(inputs)


@dataclass
class Entered:
    """What `LayerInput.forward` leaves for backward."""

    states: Tensor  # (T, hidden)
    z: Tensor | None  # (T, r) of the gate
    gate: Tensor  # (T, width), as wide as its projection writes it
    added: Added


class LayerInput:
    """Of one layer, forward and backward.

    Args:
        gate, project: its linear layers, hidden to width and back.
        norm: of what it adds.
        activate, activate_backward: the activation of a gate and what it gates, as `geglu`.
    """

    def __init__(
        self,
        gate: Projection,
        project: Projection,
        norm: Norm,
        activate: Callable[..., Tensor],
        activate_backward: Callable[..., Any],
    ):
        self.gate, self.project, self.norm = gate, project, norm
        self._activate, self._activate_backward = activate, activate_backward

    def forward(self, x: Tensor, given: Tensor) -> tuple[Tensor, Entered]:
        """The states with what it adds, (T, hidden), from those before and the layer's input, (T, width)."""
        act, z, gate = self._gated(x, given)
        y, added = self.output(act, x)
        return y, Entered(x, z, gate, added)

    def gated(self, x: Tensor, given: Tensor) -> Tensor:
        """What `project` reads, (T, width)."""
        return self._gated(x, given)[0]

    def output(self, act: Tensor, x: Tensor) -> tuple[Tensor, Added]:
        """The states with what comes of that, (T, hidden)."""
        return add_projection(self.project, self.norm, 1.0, act, x)

    def _gated(self, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        z = self.gate.low_rank(x)
        gate = self.gate.forward(x, z)
        return self._activate(gate[:, : self.gate.out_features], given), z, gate

    def backward(self, grad_y: Tensor, entered: Entered, given: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """From the gradient of the result, (T, hidden), to those of the states, of the layer's input, and of the
        adapters of `gate` and `project`. What the gate gave is overwritten.
        """
        grad = entered.added.backward(grad_y)
        grad_z = self.project.backward_low_rank(grad)
        grad_act = self.project.backward_input(grad, grad_z)
        act, grad_given = empty_like(grad_act), empty_like(grad_act)
        y = self.gate.for_magnitudes(entered.gate)
        gate = entered.gate[:, : self.gate.out_features]
        self._activate_backward(grad_act, gate, given, gate, grad_given, act)  # the gate now holds its own gradient
        last = self.project.backward_adapters(grad, grad_z, act, entered.added.z)
        grad_z = self.gate.backward_low_rank(entered.gate)
        first = self.gate.backward_adapters(entered.gate, grad_z, entered.states, entered.z, y)
        return self.gate.backward_input(entered.gate, grad_z).add_(grad_y), grad_given, [*first, *last]
