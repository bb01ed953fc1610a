"""What is known of a family of decoders. Plain data, so that nothing here needs torch.

A layer of every family is

    x = x + residual * attention_output_norm(o(attention(rope(head_norms(qkv(input_norm(x)))))))
    x = x + residual * mlp_output_norm(down(activation(gate) * up)),   gate, up = gate_up(mlp_norm(x))

or, where the MLP stands beside attention, both read the same x and are added together. Without a gate the MLP is
down(activation(up)); of a mixture there are many, of which each token passes a few. What a layer is given of each token
beside the states, e, it adds after these, times a factor:

    x = factor * (x + norm(project(activation(gate(x)) * e)))

A `Family` says which of its parts there are and what transformers calls them; `of` what there is of them in models of a
config, `of_layer` in one layer. What a layer or config of transformers holds as a number (head widths, the factor on
the scores, epsilon) is read there; embeddings that are scaled by their own module are its business.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

Activation = Literal["silu", "gelu_pytorch_tanh", "gelu_new"]  # as transformers names them; the last two are one

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as in a config's `layer_types`


@dataclass(frozen=True)
class Mixture:
    """An MLP that is a mixture of experts, in all layers of a family or in some:

        sum over a token's experts e of weight_e * down_e(activation(gate_e) * up_e)

    and, where there is one, an expert that every token passes.

    Args:
        router: module that gives of normed states (T, hidden) its logits, the weights (T, k) and the experts (T, k).
        experts: module with the matrices of all experts, those of gate and up side by side.
        shared_gate_up, shared_down: linear layers of the expert that every token passes; none where there is none.
        shared_weight: linear layer with one output, whose sigmoid its result is multiplied by.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    shared_gate_up: tuple[str, ...] = ()
    shared_down: tuple[str, ...] = ()
    shared_weight: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Names within a layer of all that has weights."""
        return self.router, self.experts, *self.shared_gate_up, *self.shared_down, *self.shared_weight


@dataclass(frozen=True)
class Family:
    """A family of decoders; what is not said is Llama's.

    Args:
        model_type: of its configs.
        activation, activation_option: of the MLP's gate, and the config's option that names it.
        gated: whether it has one.
        norm, norm_eps: of which kind its norms are, and the config's option for their epsilon.
        norm_offset: what is added to the weights of RMSNorm.
        final_norm: module that norms what the head reads.
        input_norm, mlp_norm: modules that norm what attention and the MLP read, or None.
        parallel: attention and the MLP read the same states, those that come into the layer;
        parallel_option: or do so where this option of the config is set, behind one norm.
        attention_output_norm, mlp_output_norm: modules that norm what these two add to the states, or None.
        head_norms: modules that norm queries and keys, and values where there is a third, or none.
        head_norms_option: the config's option that says whether there are these; there are where None.
        heads_together: they norm all heads of a token as one row, not each by itself.
        qkv, o, gate_up, down: linear layers; those that read the same states together, or one whose outputs lie as
            theirs would.
        windows: layers that attend to the last `sliding_window` tokens only: none, all, or those of that kind.
        rope_by_kind: each kind of layer has its own rotary angles.
        rope_neighbours: neighbouring elements of a head are turned together, not those of its halves.
        angles_in_pairs: transformers lists each rotary angle twice in a row, not all of them once and then once more.
        rotated_windows: only layers under a window have rotary angles.
        rotated_layers: the config's option that says of each layer whether it has rotary angles; all have where None.
        growing_queries: queries grow with their position, by `llama_4_scaling_beta` of the rotary parameters.
        attention_softcap: the config's option for c in c · tanh(scores / c), or None.
        embedding_multiplier, residual_multiplier: the config's options for factors on the embeddings and on what is
            added to the states, or None.
        shared_keys: the config's option for how many of the last layers have no keys and values, but read those of the
            last layer of their kind before them, or None.
        keys_as_values: the config's option for values that are the keys before their norm, in layers without a window.
        layer_inputs: the config's option for the width of what each layer is given of a token beside the states.
        layer_input: modules of that: linear layers to its width and back, and the norm of what is added.
        layer_factor: a layer's buffer with the factor on its result, or None.
        dropouts: options, beside `attention_dropout`, for shares of a layer's states that training drops.
        unsupported: options that, where a config sets them, or sets them to this value, make of its layers something
            else than this.
        mixture: what the MLP of layers is that have its router.
        gguf: its architecture in GGUF files, a name of gguf.MODEL_ARCH, or None where it is not exported.
        gguf_neighbours: llama.cpp turns neighbouring elements of a head together, transformers those of its halves.
    """

    model_type: str
    activation: Activation = "silu"
    activation_option: str = "hidden_act"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    norm_offset: float = 0.0
    final_norm: str = "norm"
    input_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    parallel: bool = False
    parallel_option: str | None = None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    head_norms: tuple[str, ...] = ()
    head_norms_option: str | None = None
    heads_together: bool = False
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    windows: Literal["none", "all", "by kind"] = "none"
    rope_by_kind: bool = False
    rope_neighbours: bool = False
    angles_in_pairs: bool = False
    rotated_windows: bool = False
    rotated_layers: str | None = None
    growing_queries: bool = False
    attention_softcap: str | None = None
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    shared_keys: str | None = None
    keys_as_values: str | None = None
    layer_inputs: str | None = None
    layer_input: tuple[str, ...] = ()
    layer_factor: str | None = None
    dropouts: tuple[str, ...] = ()
    unsupported: tuple[str | tuple[str, str], ...] = ()
    mixture: Mixture | None = None
    gguf: str | None = None
    gguf_neighbours: bool = False

    @property
    def input_norms(self) -> int:
        """How many norms there are of what attention and the MLP read."""
        return sum(name is not None for name in (self.input_norm, self.mlp_norm))

    @property
    def added_norms(self) -> int:
        """How many norms there are of what is added to the states."""
        names = (self.attention_output_norm, self.mlp_output_norm, *self.layer_input[2:])
        return sum(name is not None for name in names)

    @property
    def linears(self) -> tuple[str, ...]:
        """Names within a layer of its linear layers."""
        return (*self.qkv, self.o, *self.gate_up, self.down, *self.layer_input[:2])

    def modules(self, mixture: Mixture | None = None) -> tuple[str, ...]:
        """Names within a layer of all that has weights.

        Args:
            mixture: what its MLP is, if it is one.
        """
        norms = (self.input_norm, self.mlp_norm, self.attention_output_norm, self.mlp_output_norm, *self.head_norms)
        mlp = (*self.gate_up, self.down) if mixture is None else mixture.modules
        own = (*norms, *self.layer_input)
        return (*self.qkv, self.o, *mlp, *(name for name in own if name is not None))

    def mixture_in(self, modules: Collection[str]) -> Mixture | None:
        """What the MLP of a layer with modules of these names is, if it is a mixture."""
        return self.mixture if self.mixture is not None and self.mixture.router in modules else None

    @property
    def beside(self) -> bool:
        """Whether layers take something beside the states: keys and values of others, or inputs of their own."""
        return self.shared_keys is not None or self.layer_inputs is not None

    def of(self, config: Any) -> "Family":
        """What models of this config have of it."""
        found = self
        if self.parallel_option is not None and getattr(config, self.parallel_option):
            found = replace(found, parallel=True, mlp_norm=self.input_norm)
        if self.head_norms_option is not None and not getattr(config, self.head_norms_option):
            found = replace(found, head_norms=())
        if self.layer_inputs is not None and not getattr(config, self.layer_inputs):
            found = replace(found, layer_inputs=None, layer_input=())
        return found

    def of_layer(self, config: Any, layer: int) -> "Family":
        """What a layer of a model of this config has of it."""
        found = self.of(config)
        if self.reads_keys(config, layer):
            return replace(found, qkv=found.qkv[:1], head_norms=found.head_norms[:1])
        return replace(found, qkv=found.qkv[:2]) if self.values_are_keys(config, layer) else found

    def reads_keys(self, config: Any, layer: int) -> bool:
        """Whether a layer reads keys and values that another one computed."""
        shared: int = getattr(config, self.shared_keys) if self.shared_keys is not None else 0
        return layer >= config.num_hidden_layers - shared

    def gives_keys(self, config: Any, layer: int) -> bool:
        """Whether others read the keys and values that a layer computes: it is the last of its kind that does so."""
        kinds = self.kinds(config)
        later = [i for i in range(layer + 1, len(kinds)) if kinds[i] == kinds[layer]]
        return bool(later) and not self.reads_keys(config, layer) and self.reads_keys(config, later[0])

    def values_are_keys(self, config: Any, layer: int) -> bool:
        """Whether a layer's values are its keys before their norm."""
        wanted = self.keys_as_values is not None and getattr(config, self.keys_as_values)
        return bool(wanted) and self.kinds(config)[layer] == FULL

    def kinds(self, config: Any) -> list[str]:
        """Each layer's kind."""
        if self.windows == "by kind":
            return list(config.layer_types)
        return [FULL if self.windows == "none" else SLIDING] * config.num_hidden_layers

    def window(self, config: Any, kind: str) -> int:
        """Tokens that a token of a layer of this kind attends to, itself included; 0 for all before it."""
        return (config.sliding_window or 0) if kind == SLIDING else 0

    def softcap(self, config: Any) -> float:
        """c of the scores' soft cap; 0 where there is none."""
        return (getattr(config, self.attention_softcap) or 0.0) if self.attention_softcap else 0.0

    def rotated(self, config: Any, layer: int) -> bool:
        """Whether queries and keys of this layer are rotated."""
        if self.rotated_windows:
            return self.window(config, self.kinds(config)[layer]) > 0
        return self.rotated_layers is None or bool(getattr(config, self.rotated_layers)[layer])

    def refuses(self, config: Any) -> str | None:
        """The first option of a config that makes of its layers something else, or None."""
        for each in self.unsupported:
            option, value = each if isinstance(each, tuple) else (each, None)
            found = getattr(config, option, None)
            if found and value in (None, found):
                return option
        return self._refuses_value(config)

    def _refuses_value(self, config: Any) -> str | None:
        """An option with a value that its layers cannot have, of which transformers has to say what it makes."""
        kinds = self.kinds(config)
        if others := set(kinds) - {FULL, SLIDING}:
            return f"layer_types of the kind {min(others)}"
        window = config.sliding_window if SLIDING in kinds else None
        if window is None and self.windows == "by kind" and SLIDING in kinds:
            return "layers under a window, of which sliding_window says nothing"
        if window is not None and window < 1:
            return f"sliding_window = {window}"
        if self.attention_softcap and getattr(config, self.attention_softcap) == 0:
            return f"{self.attention_softcap} = 0"  # by which transformers divides
        given = getattr(config, "rope_parameters", None) or {}
        ropes = given.values() if self.rope_by_kind else [given]
        shares = (rope.get("partial_rotary_factor") for rope in ropes)
        return next((f"partial_rotary_factor = {s}" for s in shares if s is not None and not 0 < s <= 1), None)

    def embedding_factor(self, config: Any) -> float:
        """Of what the embedding module gives."""
        return getattr(config, self.embedding_multiplier) if self.embedding_multiplier else 1.0

    def residual_factor(self, config: Any) -> float:
        """Of what attention and the MLP add to the states."""
        return getattr(config, self.residual_multiplier) if self.residual_multiplier else 1.0
