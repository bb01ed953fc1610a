"""A run's base with its adapter merged in, as a model source: W + ΔW, one tensor at a time.

Because it is a source like any other, whatever takes one (a folder in 16 or in four bits, a GGUF file, a model in
memory) takes merged models too, and no more than one tensor is ever merged at once.

ΔW = scaling · B·A goes onto one of two bases (DESIGN.md, "Merging"):

    dequantized   the four bits that were trained on, widened: the faithful merge
    original      the base's own 16-bit weights: what the adapter was not trained on, often better. An adapter that
                  began with what quantisation lost leaves that out: these weights have not lost it
"""

import hashlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from nybble.calibration.search import search_weight
from nybble.data.template import ChatTemplate
from nybble.errors import RunError
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops import dequantize, quantize
from nybble.layers.convert import quantizable_linears
from nybble.layers.lora import linear_features
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.base import base_formats, data_free_quality
from nybble.runs.open_run import OpenRun
from nybble.sources.interface import ModelSource
from nybble.sources.placement import place_tensors, read_placed
from nybble.sources.skeleton import build_skeleton, is_transposed

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Onto = Literal["original", "dequantized"]


class MergedSource:
    """The tuned model of a run as a source in 16 bits. Its tokenizer carries the template that was trained with,
    its generation config the tokens that end an answer.

    Raises:
        RunError: the adapter does not fit the base, or holds values that are not finite.
    """

    quant_spec: QuantSpec | None = None

    def __init__(self, opened: OpenRun, onto: Onto):
        self.opened, self.onto = opened, onto
        base = opened.source
        self.name, self.kind, self.config, self.dense_dtype = base.name, base.kind, base.config, base.dense_dtype
        self.notes = base.notes
        self.adapter = StoredAdapter(opened.run.adapter)
        self._skeleton = build_skeleton(base.config)
        self.adapter.check_layers(self._skeleton)
        _refuse_tied(self.adapter, self._skeleton)
        self._places = {place.name: place for place in place_tensors(base, self._skeleton)}
        self._formats = base_formats(opened.config, opened.run)
        self._base = opened.source if onto == "original" else opened.base
        self._base_places = {place.target: place for place in place_tensors(self._base, self._skeleton)}
        self._linears = {f"{name}.weight" for name in quantizable_linears(self._skeleton)}
        self._adapted = set(self.adapter.names)
        for layer in self.adapter.names:  # all of it is checked before anything is written
            self._matrices(layer)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        return tokenizer_with_template(self.opened.template)

    def load_generation_config(self) -> "GenerationConfig":
        generation = self.opened.source.load_generation_config()
        known = generation.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        generation.eos_token_id = list(dict.fromkeys([*self.opened.template.stop_ids, *known]))
        return generation

    def fingerprint(self) -> str:
        text = f"{self.opened.source.fingerprint()} {self.onto} {self.adapter.scaling} {self.adapter.fingerprint()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(self._places)

    def target(self, name: str) -> str:
        """The parameter that a stored tensor is for."""
        return self._places[name].target

    def is_quantized(self, name: str) -> bool:
        return False

    def read(self, name: str) -> Tensor:
        """W + ΔW in fp32 of a block's linear layer or what else has an adapter, any other tensor as it is stored."""
        if self._places[name].target not in self._linears and self._layer(name) not in self._adapted:
            tensor = read_placed(self.opened.source, self._places[name])
            assert isinstance(tensor, Tensor)
            return tensor
        weight, delta = self.read_base(name), self.read_delta(name)
        return weight if delta is None else weight.add_(delta)

    def read_base(self, name: str) -> Tensor:
        """The weight that ΔW goes onto, in fp32, as the module stores it."""
        weight = read_placed(self._base, self._base_places[self.target(name)])
        transposed = is_transposed(self._skeleton.get_submodule(self._layer(name)))
        formats = self._formats if self.onto == "dequantized" and self.target(name) in self._linears else None
        if isinstance(weight, Tensor) and formats is not None:
            put = quantize if data_free_quality(self.opened.config) == "absmax" else search_weight
            weight = put(weight.T if transposed else weight, formats.of(self._layer(name)))
        if isinstance(weight, QuantizedTensor):
            dense = dequantize(weight, torch.float32)
            return dense.T.contiguous() if transposed else dense
        return weight.float()

    def read_delta(self, name: str) -> Tensor | None:
        """ΔW in fp32, as the module stores its weight; None where the layer has no adapter."""
        layer = self._layer(name)
        if layer not in self._adapted:
            return None
        a, b = self._matrices(layer)
        delta = (b * self.adapter.scaling) @ a
        begun = self.adapter.initial(layer, *linear_features(self._skeleton.get_submodule(layer)))
        if self.onto == "original" and begun is not None:
            delta -= (begun[1] * self.adapter.scaling) @ begun[0]
        module = self._skeleton.get_submodule(layer)
        return delta.T.contiguous() if is_transposed(module) or isinstance(module, nn.Embedding) else delta

    def survival(self, written: ModelSource) -> float:
        """How much of ΔW lies in the merged model as it was stored: <W' − W, ΔW> / <ΔW, ΔW> over all layers.

        1 where all of it arrived. Rounding W + ΔW back onto the lattice on which W lies can swallow nearly all.

        Args:
            written: the stored model W', read back.
        """
        along, length = 0.0, 0.0
        for name, place in self._places.items():
            delta = self.read_delta(name) if place.target.endswith(".weight") else None
            if delta is None:
                continue
            stored = written.read(place.target)
            if isinstance(stored, QuantizedTensor):
                stored = dequantize(stored, torch.float32)
                stored = stored.T if is_transposed(self._skeleton.get_submodule(self._layer(name))) else stored
            moved = stored.float() - self.read_base(name)
            along += torch.dot(moved.flatten(), delta.flatten()).item()
            length += delta.square().sum().item()
        return along / length if length else 1.0

    def _layer(self, name: str) -> str:
        return self._places[name].target.removesuffix(".weight")

    def _matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        return self.adapter.matrices(layer, *linear_features(self._skeleton.get_submodule(layer)))


def _refuse_tied(adapter: StoredAdapter, skeleton: "PreTrainedModel") -> None:
    """An adapter on one of two layers that share their weight cannot go into it without changing the other."""
    tied = skeleton.all_tied_weights_keys
    if shared := [name for name in adapter.names if f"{name}.weight" in {*tied, *tied.values()}]:
        raise RunError(
            f"The adapter changes {shared[0]}, whose weight is embedding and head in one.",
            "Merged are adapters on weights that no other layer uses.",
            "Use the adapter beside the base (`nybble chat --run`, PEFT), or train without it among --target-modules.",
        )


def tokenizer_with_template(template: ChatTemplate) -> "PreTrainedTokenizerBase":
    """The run's tokenizer with the chat template that was trained with, where it has none of its own."""
    if template.chat_template is not None:
        template.tokenizer.chat_template = template.chat_template
    return template.tokenizer
