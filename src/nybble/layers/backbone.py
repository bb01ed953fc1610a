"""From a batch to the hidden states that the loss head reads.

Two ways, same numbers. `FusedForward` runs packed batches through nybble's decoder blocks, for the families they know.
`ModuleForward` runs any transformers decoder through its own modules, packed where that gives what each row gives
alone, else padded, else a row at a time. `CausalLM.of` (`layers/causal_lm.py`) chooses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter, signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence

from nybble.data.packing import Batch, PicturedBatch, widen
from nybble.families import FAMILIES, family_of
from nybble.families.family import Family
from nybble.kernels import registry
from nybble.kernels.heap import TrimmedHeap, lies_in_heap, trim_heap
from nybble.layers.context import widest_rows
from nybble.layers.convert import TOWERS, block_names
from nybble.layers.decoder_block import Keep, block_ops
from nybble.layers.layer_input import Beside, beside_states
from nybble.layers.lora import DoraLinear
from nybble.layers.mixers import computes_mixers, masks_of_rows
from nybble.layers.mixture_block import block_of
from nybble.layers.norms import final_norm, normed_rows
from nybble.layers.own_head import decoder_of, is_plain
from nybble.layers.packed_rows import PackedSequences, Spread, rotary_angles, scaled_embeddings
from nybble.layers.projection import DenseWeights
from nybble.layers.recurrence import knows_borders, row_borders
from nybble.layers.regularisers import PLAIN, Regularisers
from nybble.layers.rotary import angles_by_length
from nybble.layers.streamed import BlockStore, attach_store
from nybble.layers.trained import frozen, trained_modules
from nybble.sizes import SHAPE_RULES, rules_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCKS_A_TRIM = 4  # each costs 3 % of the time; at every eighth the heap would grow by a fourth more

Layout = Literal["packed", "padded", "single"]  # rows side by side, one a line, or one at a time


class Why(StrEnum):
    """Why decoder blocks do not compute a model."""

    NOT_PACKED = "rows are not packed"
    FAMILY = f"decoder blocks know {', '.join(FAMILIES)}; this is {{}}"
    ACTIVATION = "decoder blocks know another activation in this family than {}"
    OPTION = "decoder blocks do not know {}"
    MODULES = "decoder blocks know other layers in this family: {}"
    DROPOUT = "decoder blocks have no adapter dropout"
    TRAINED = "decoder blocks train adapters alone, not {}"
    WEIGHTS = "decoder blocks train adapters, no weights"
    KERNELS = "decoder blocks have no kernel for {}"
    HEAD = "decoder blocks end in a linear head"
    PICTURES = "decoder blocks read no pictures"
    EXPERTS = "decoder blocks compute experts in nybble's own training and evaluations alone"
    DIFFERENCE = "decoder blocks differ from the model's own forward in {}"


@dataclass(frozen=True)
class Reason:
    """One of them, with what it is about."""

    why: Why
    what: str = ""

    def __str__(self) -> str:
        return self.why.format(self.what)


class Backbone(Protocol):
    """A way from tokens to hidden states.

    Args:
        layout: of the batches that it takes; "single" ones are padded, too.
        details: for the user, what there is to say about it.
        regularisers: whose noise embeddings get while the model trains.
    """

    layout: Layout
    details: str
    regularisers: Regularisers

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """Final hidden states at `positions`, int64 `(N,)`, indices into the flattened B * T positions.

        Returns:
            `(N, hidden)` in the compute dtype.
        """


class KeptTensors(Protocol):
    """Takes tensors until backward needs them, in reverse: all of the last block, then all of the one before."""

    def begin(self) -> None:
        """A new micro-batch: what the last one left is forgotten."""

    def next_block(self) -> None:
        """What follows is kept by the next block."""

    def put(self, tensor: Tensor) -> Any: ...

    def get(self, place: Any) -> Tensor: ...


class ModuleForward:
    """Through transformers' own forward and autograd.

    Args:
        layout: packed batches are taken, or padded ones.
        checkpointing: recompute each layer in backward instead of keeping its activations.
        store: of a streamed base's blocks.
        kept: takes what is saved for backward; memory does where it is None.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layout: Layout,
        *,
        checkpointing: bool,
        store: BlockStore | None = None,
        kept: KeptTensors | None = None,
    ):
        self.model, self.layout, self.store, self.kept = model, layout, store, kept
        self.regularisers = PLAIN
        self._trims = checkpointing and kept is None and lies_in_heap(next(model.parameters()).device)
        if store is not None:
            attach_store(model, store)
        if checkpointing and model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # for reentrant ones; some models add to the embedding's in place
        self.details = "" if store is None else ", streamed"
        self._tells_borders = knows_borders(model) or computes_mixers(model)
        there = next(p.device for p in model.parameters() if not p.is_meta)  # a streamed base's are not
        self.rules = rules_for(there.type, _compute_dtype(model).itemsize, widest_rows(model, model.config))

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """As `Backbone` says."""
        return self.through(lambda: self._all_states(batch)).flatten(0, 1).index_select(0, positions)

    def through(self, compute: Callable[[], Tensor]) -> Tensor:
        """What is computed with the model's modules, and what that saves for its backward pass kept in its place."""
        if self.store is not None:
            self.store.begin(will_return=torch.is_grad_enabled())
        kept = TrimmedHeap(BLOCKS_A_TRIM) if self._trims else self.kept
        if kept is None:
            return compute()
        kept.begin()
        kept.next_block()  # what is kept at all lies between blocks
        with saved_tensors_hooks(kept.put, kept.get):
            computed = compute()
        if self._trims:
            trim_heap()  # the head needs much at once
        return computed

    def _all_states(self, batch: Batch) -> Tensor:
        """(B, T) -> (B, T, hidden); zeros on the padding of rows that go through one at a time."""
        width = batch.input_ids.shape[1]
        if self.layout != "single" or batch.attention_mask is None:
            if batch.attention_mask is not None:
                batch = widen(batch, self.rules.padded_width(width), pad_id=0)
            states = self._embedded(batch.input_ids, batch.document_lengths, batch.packed)
            places = positions_with_pictures(self.model, batch)
            borders = row_borders(batch) if batch.packed and self._tells_borders else {}
            if borders and computes_mixers(self.model):
                borders |= masks_of_rows(self.model, borders, batch.position_ids)
            mask = borders.pop("attention_mask", batch.attention_mask)
            states = decoder_states(self.model, states, places, mask, beside_tokens(batch), **borders)
            return states[:, :width]
        rows = []
        for ids, places, length in zip(batch.input_ids, batch.position_ids, batch.document_lengths, strict=True):
            row = self._embedded(ids[None, :length], (length,))
            states = decoder_states(self.model, row, places[None, :length])
            rows.append(F.pad(states[0], (0, 0, 0, width - length)))
        return torch.stack(rows)

    def _embedded(self, input_ids: Tensor, lengths: Sequence[int], packed: bool = False) -> Tensor:
        """The token ids, or, where they get noise, their embeddings."""
        if not (self.regularisers.noise and self.model.training):
            return input_ids
        embedded = self.model.get_input_embeddings()(input_ids)
        noised = self.regularisers.noised(embedded[0] if packed else embedded, lengths)
        return noised[None] if packed else noised


class FusedForward:
    """Through nybble's decoder blocks; packed batches only.

    Args:
        keep: what each block keeps for its backward.
        whole_blocks: but the last so many keep everything. Their memory is free again when the others' passes begin.
        store: of a streamed base's blocks.
        kept: takes what blocks save for their backward; memory does where it is None.
    """

    layout: Layout = "packed"

    def __init__(
        self,
        model: "PreTrainedModel",
        keep: Keep,
        store: BlockStore | None = None,
        kept: KeptTensors | None = None,
        whole_blocks: int = 0,
    ):
        self.model, self.kept, self.regularisers = model, kept, PLAIN
        self.weights, self.norm = DenseWeights(store), final_norm(model)
        if store is not None:
            attach_store(model, store)  # for experts, which bring their matrices themselves
        self.blocks = [block_of(layer, model.config, self.weights) for layer in model.base_model.layers]
        others = len(self.blocks) - whole_blocks
        self.keeps: list[Keep] = [keep if i < others else "everything" for i in range(len(self.blocks))]
        self.details = f", keeping {keep}{f', the last {whole_blocks} everything' if whole_blocks else ''}"
        self.details += "" if store is None else ", streamed"

    @property
    def asks_for_nothing(self) -> bool:
        """Whether a pass needs nothing but what lies in the memory that it computes in, draws nothing, and waits for
        nobody."""
        waits = any(block.attention_waits(self._computed_in) for block in self.blocks) or angles_by_length(self.model)
        # What DoRA's rows are scaled by is computed when a step has changed it, which a graph would not do again.
        scales = any(isinstance(adapter, DoraLinear) for block in self.blocks for adapter in block.adapters)
        own = self.weights.store is None and self.kept is None
        return own and not self.regularisers.noise and not waits and not scales

    @property
    def block_elements(self) -> int:
        """Weights of the largest block."""
        return max(sum(part.in_features * part.out_features for part in block.projections) for block in self.blocks)

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """As `Backbone` says."""
        self.weights.begin(will_return=torch.is_grad_enabled())
        x, sequences, beside = self.embed(batch)
        self.refresh_adapters()
        if self.kept is None:
            for block, keep in zip(self.blocks, self.keeps, strict=True):
                x = block(x, sequences, keep, beside)
        else:
            self.kept.begin()
            with saved_tensors_hooks(self.kept.put, self.kept.get):
                for block, keep in zip(self.blocks, self.keeps, strict=True):
                    self.kept.next_block()
                    x = block(x, sequences, keep, beside)
        return normed_rows(self.norm, x, positions)

    def refresh_adapters(self) -> None:
        """Bring copies of adapters up to date: together, not among what the blocks free."""
        for block in self.blocks:
            block.refresh_adapters(self._computed_in.dtype)

    @property
    def _computed_in(self) -> Tensor:
        """A tensor in the dtype and on the device that the blocks compute in."""
        weight: Tensor = frozen(self.norm.module).weight
        return weight

    def embed(self, batch: Batch) -> tuple[Tensor, PackedSequences, Beside]:
        """What the first block takes, `(T, hidden)`, where its documents lie, and what blocks read beside the states;
        an arbitrary document fills T up.
        """
        input_ids, position_ids, cu_seqlens, max_length, spread = _fill_up(batch)
        sequences = PackedSequences(rotary_angles(self.model, position_ids), cu_seqlens, max_length, spread)
        x = self.model.base_model.embed_tokens(input_ids[0])
        if self.regularisers.noise and self.model.training:
            x = self.regularisers.noised(x, batch.document_lengths)
        return scaled_embeddings(self.model, x), sequences, beside_states(self.model, input_ids[0], x)


def _fill_up(batch: Batch) -> tuple[Tensor, Tensor, Tensor, int, Spread | None]:
    """Token ids, positions, borders, the length of the longest document and how documents share rows, with a document
    of arbitrary tokens at the end, so that there are as many as the device multiplies best.

    Attention keeps it apart and no position of it is asked for, so it changes no state and no gradient.
    """
    input_ids, position_ids, cu_seqlens = batch.input_ids, batch.position_ids, batch.cu_seqlens
    assert cu_seqlens is not None, "decoder blocks take packed batches"
    missing = -input_ids.shape[1] % SHAPE_RULES[input_ids.device.type].token_multiple
    spread = None
    if batch.spread is not None and batch.first_places is not None and batch.second_places is not None:
        added = torch.arange(missing, device=batch.spread.device)
        rows = torch.cat([batch.spread, input_ids.shape[1] + added])
        spread = Spread(rows, torch.cat([batch.first_places, len(batch.spread) + added]), batch.second_places)
    if not missing:
        return input_ids, position_ids, cu_seqlens, batch.max_document_length, spread
    filled, positions = F.pad(input_ids, (0, missing)), F.pad(position_ids, (0, missing))
    borders = torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])
    return filled, positions, borders, max(batch.max_document_length, missing), spread


def _compute_dtype(model: "PreTrainedModel") -> torch.dtype:
    """What transformers' modules compute in: the type of norms and biases, which products do not round."""
    vectors = (p.dtype for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and not p.requires_grad)
    return next(vectors, model.dtype)


def why_not_blocks(
    model: "PreTrainedModel",
    *,
    packing: bool,
    dropout: bool,
    trained: Iterable[str] = (),
    full: bool = False,
    device: torch.device | None = None,
    here: bool = True,
) -> Reason | None:
    """None when nybble's decoder blocks train this model, as far as it shows without computing, else the reason.

    Args:
        model: loaded, or on the meta device and without adapters, as a plan has it.
        packing: rows of a micro-batch lie side by side.
        dropout: something of the adapters' inputs is dropped.
        trained: names of modules that will be trained whole.
        full: every weight is trained.
        device: that trains; the model's own if not given.
        here: it is this machine's.
    """
    if not packing:
        return Reason(Why.NOT_PACKED)
    if hasattr(model.config, TOWERS):
        return Reason(Why.PICTURES)
    config = model.config.get_text_config()
    family = family_of(config)
    for option in ("attention_dropout", *(family.dropouts if family else ())):
        if getattr(config, option, 0):
            return Reason(Why.OPTION, option)
    if full:
        return Reason(Why.WEIGHTS)
    if inside := trained_inside(trained, block_names(model)):
        return Reason(Why.TRAINED, inside)
    why = why_not_forward(model, device, here=here, experts=True)
    return Reason(Why.DROPOUT) if why is None and dropout else why


def why_not_forward(
    model: "PreTrainedModel",
    device: torch.device | None = None,
    ops: Callable[[Family], Sequence[str]] = block_ops,
    here: bool = True,
    experts: bool = False,
) -> Reason | None:
    """None when nybble's decoder blocks compute this model's answers, in which nothing is dropped, else the reason.

    Args:
        device: that computes; the model's own if not given.
        ops: what it must have kernels for.
        here: the device is this machine's.
        experts: who asks takes blocks that are mixtures of them.
    """
    if hasattr(model.config, TOWERS):
        return Reason(Why.PICTURES)
    config = model.config.get_text_config()
    family = family_of(config)
    if family is None:
        return Reason(Why.FAMILY, config.model_type)
    if family.mixture is not None and not experts:
        return Reason(Why.EXPERTS)
    activation = getattr(config, family.activation_option)
    if activation != family.activation:
        return Reason(Why.ACTIVATION, str(activation))
    if option := family.refuses(config):
        return Reason(Why.OPTION, option)
    if inside := trained_inside(trained_modules(model), block_names(model)):
        return Reason(Why.TRAINED, inside)
    of_layers = [family.of_layer(config, layer) for layer in range(config.num_hidden_layers)]
    other = _other_modules(model.base_model.layers, of_layers)
    if other:
        return Reason(Why.MODULES, ", ".join(other))
    missing = registry.runs(ops(family), (device or next(model.parameters()).device).type, here)
    if missing is not None:
        return Reason(Why.KERNELS, missing)
    output = model.get_output_embeddings()
    if output is not None and not is_plain(output):  # what has none gives states, or scores of them
        return Reason(Why.HEAD)
    return None


def trained_inside(names: Iterable[str], blocks: Sequence[str]) -> str:
    """The first of these modules that lies in a block; "" where none does."""
    return next((name for name in names if any(name.startswith(f"{block}.") for block in blocks)), "")


def _other_modules(layers: Iterable[nn.Module], families: Iterable[Family]) -> list[str]:
    """Names of what these layers have weights in beside what their families do, and of what they lack."""
    other: dict[str, None] = {}
    for layer, family in zip(layers, families, strict=True):
        found = {name: module for name, module in layer.named_modules() if name}
        modules = family.modules(family.mixture_in(found))
        other |= dict.fromkeys(f"no {name}" for name in modules if name not in found)
        for name, module in found.items():
            known = any(name == each or name.startswith(f"{each}.") for each in modules)
            if not known and next(module.parameters(recurse=False), None) is not None:
                other[name] = None
    return list(other)


def beside_tokens(batch: Batch) -> dict[str, Tensor]:
    """What a model is given of a batch's pictures, by name; nothing of other batches."""
    return batch.pictures if isinstance(batch, PicturedBatch) else {}


def positions_with_pictures(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """The positions that a model is given: the batch's, int64 `(B, T)`; of packed rows with pictures where positions
    count in three dimensions (M-RoPE, Qwen2-VL, arXiv 2409.12191) int64 `(4, 1, T)`, plain ones first, by which
    transformers tells documents apart, then those of time, height and width as the model has them for each alone.
    """
    find = getattr(model.base_model, "get_rope_index", None)
    if find is None or not batch.packed or not isinstance(batch, PicturedBatch):
        return batch.position_ids
    lengths = list(batch.document_lengths)
    ids, kinds, mask = (
        pad_sequence(row[0].split(lengths), batch_first=True)
        for row in (batch.input_ids, batch.pictures["mm_token_type_ids"], torch.ones_like(batch.input_ids))
    )
    grid = batch.pictures.get("image_grid_thw")
    places, _ = find(ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=mask)  # (3, documents, longest)
    rows = [places[:, number, :length] for number, length in enumerate(lengths)]
    return torch.cat([batch.position_ids[None], torch.cat(rows, dim=1)[:, None]])


def given_beside(model: "PreTrainedModel", pictures: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same on a device and in the dtype that the model's vision tower computes in."""
    if not pictures:
        return {}
    decoder = model.get_decoder()
    parts = (part for part in model.base_model.children() if part is not decoder)
    dtype = next((weight.dtype for part in parts for weight in part.parameters()), model.dtype)
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in pictures.items()
    }


def decoder_states(
    model: "PreTrainedModel",
    tokens: Tensor,
    position_ids: Tensor,
    attention_mask: Any = None,
    pictures: Mapping[str, Tensor] = MappingProxyType({}),
    **more: Any,
) -> Tensor:
    """The final hidden states of a transformers causal language model, `(B, T, hidden)`.

    Args:
        tokens: ids `(B, T)`, or what takes the place of their embeddings, `(B, T, hidden)`.
        pictures: what it is given of these, by name. Padded rows with pictures get their positions from the model.
        more: arguments of the model's own, which it gets where its forward takes them.
    """
    base = decoder_of(model) if model.base_model is model else model.base_model
    wanted = {"position_ids": position_ids, "attention_mask": attention_mask, "use_cache": False, **more}
    if pictures:
        wanted |= given_beside(model, pictures, tokens.device)
        if attention_mask is not None:
            wanted.pop("position_ids")
    given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
    states: Tensor = base(**given, **accepted(base, **wanted)).last_hidden_state
    return states


def accepted(module: nn.Module, **keywords: Any) -> dict[str, Any]:
    """Those of the arguments that the module's forward takes."""
    parameters = signature(module.forward).parameters
    if any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}
