"""A run's base with its adapter merged in, as a model source: W + ΔW, one tensor at a time.

Because it is a source like any other, whatever takes one (a folder in 16 or in four bits, a GGUF file, a model in
memory) takes merged models too, and no more than one tensor is ever merged at once.

ΔW = scaling · B·A (of DoRA, what makes its weight of the base's) goes onto one of two bases (DESIGN.md, "Merging"):

    dequantized   the four bits that were trained on, widened: the faithful merge
    original      the base's own 16-bit weights: what the adapter was not trained on, often better. An adapter that
                  began with what quantisation lost leaves that out: these weights have not lost it
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from nybble.calibration.search import round_weight
from nybble.errors import RunError
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.four_bit import dequantize
from nybble.layers.lora import linear_features
from nybble.layers.streamed import expert_name
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.base import data_free_rounding
from nybble.runs.open_run import OpenRun
from nybble.runs.trained import ending_answers
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Onto = Literal["original", "dequantized"]


class MergedSource(StoredModel):
    """The tuned model of a run as a source in 16 bits. Its tokenizer carries the template that was trained with,
    its generation config the tokens that end an answer.

    Raises:
        RunError: the adapter does not fit the base, or holds values that are not finite.
    """

    def __init__(self, opened: OpenRun, onto: Onto):
        self.opened, self.onto = opened, onto
        base = opened.source
        self.name, self.config, self.dense_dtype = base.name, base.config, base.dense_dtype
        self.task = replace(base.task, stored_head=True)
        self.adapter = StoredAdapter(opened.run.adapter)
        self.adapter.check_layers(self.skeleton)
        _refuse_tied(self.adapter, self.skeleton)
        self._formats = opened.formats
        self._base = opened.source if onto == "original" else opened.base
        self._adapted = set(self.adapter.names)
        modules = self.adapter.modules.items()
        self._whole = {f"{module}.{leaf}": (module, leaf) for module, leaves in modules for leaf in leaves}
        self._last_experts: tuple[str, tuple[Tensor, Tensor]] | None = None
        for layer in self.adapter.names:  # all of it is checked before anything is written
            if layer in self.experts:
                self._expert_matrices(layer)
            else:
                self._matrices(layer)
        for module in self.adapter.modules:
            self.adapter.module_weights(module, self.skeleton.get_submodule(module))
        if self.task.pads and self.config.get_text_config().pad_token_id is None:
            self.config = copy.deepcopy(self.config)  # by which transformers finds the last token of padded texts
            self.config.get_text_config().pad_token_id = self.load_tokenizer().pad_token_id

    @cached_property
    def skeleton(self) -> "PreTrainedModel":
        return self.opened.source.skeleton

    @property
    def untied(self) -> tuple[str, ...]:
        return self.opened.source.untied

    @property
    def notes(self) -> tuple[str, ...]:
        return self.opened.source.notes

    @property
    def text_length(self) -> int | None:
        return self.opened.config.data.max_seq_len

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        tokenizer = self.opened.template.with_template()
        if self.task.pads and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # pipelines pad the texts of a batch
        return tokenizer

    def save_processor(self, folder: Path) -> None:
        self.opened.source.save_processor(folder)

    def load_generation_config(self) -> "GenerationConfig":
        return ending_answers(self.opened.source.load_generation_config(), self.opened.template)

    def fingerprint(self) -> str:
        text = f"{self.opened.source.fingerprint()} {self.onto} {self.adapter.scalings()} {self.adapter.fingerprint()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(dict.fromkeys((*self.opened.source.placements, *self._whole)))

    def read(self, name: str) -> Tensor:
        """W + ΔW in fp32 of a block's linear layer or what else has an adapter, a module that was trained whole as it
        was trained, any other tensor as it is stored.
        """
        if name in self._whole:
            module, leaf = self._whole[name]
            return self.adapter.module_weights(module, self.skeleton.get_submodule(module))[leaf]
        if name in self.experts:
            return torch.stack([self.read_part(name, index) for index in range(self.experts[name].num)])
        if _layer(name) not in self._adapted and name not in self.in_few_bits:
            tensor = self.opened.source.read_parameter(name)
            assert isinstance(tensor, Tensor)
            return self._with_token_rows(name, tensor)
        weight, delta = self.read_base(name), self.read_delta(name)
        return weight if delta is None else weight.add_(delta)

    def read_part(self, name: str, index: int) -> Tensor:
        """W + ΔW of one expert in fp32, as the parameter stores it."""
        weight, delta = self.read_base_expert(name, index), self.read_delta_expert(name, index)
        merged = weight if delta is None else weight + delta
        return merged.T if self.experts[name].transposed else merged

    def read_base_expert(self, name: str, index: int) -> Tensor:
        """The matrix of one expert that ΔW goes onto, fp32 `[out, in]`."""
        weight = self._base.read_expert(name, index)
        if isinstance(weight, Tensor):
            if self.onto == "original" or self._formats is None:
                return weight.float()
            weight = round_weight(weight, self._formats.of(name), data_free_rounding(self.opened.config.rounding))
        return dequantize(weight, torch.float32)

    def read_delta_expert(self, name: str, index: int) -> Tensor | None:
        """ΔW of one expert, fp32 `[out, in]`; None where its projection has no adapter."""
        if name not in self._adapted:
            return None
        a, b = self._expert_matrices(name)
        return (b[index] * self.adapter.scaling_of(name)) @ a[index]

    def _expert_matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of all experts of a projection, kept until another's are asked for."""
        if self._last_experts is None or self._last_experts[0] != name:
            shape = self.experts[name]
            self._last_experts = (
                name,
                self.adapter.expert_matrices(
                    name, shape.num, shape.in_features, shape.out_features, shape.turned_in_peft
                ),
            )
        return self._last_experts[1]

    def _with_token_rows(self, name: str, tensor: Tensor) -> Tensor:
        """With the trained rows of tokens in place, where it has some."""
        if tokens := self.adapter.tokens.get(_layer(name)):
            tensor[tokens] = self.adapter.token_rows(_layer(name), tensor.shape[1]).to(tensor.dtype)
        return tensor

    def read_base(self, name: str) -> Tensor:
        """The weight that ΔW goes onto, in fp32, as the module stores it."""
        layer = _layer(name)
        if self.onto == "original" or self._formats is None or layer not in self.linears:
            return self._base.read_dense(name, torch.float32).float()
        weight = self._base.read_linear(layer)
        if isinstance(weight, Tensor):
            weight = round_weight(weight, self._formats.of(layer), data_free_rounding(self.opened.config.rounding))
        return self.turned(layer, dequantize(weight, torch.float32)).contiguous()

    def read_delta(self, name: str) -> Tensor | None:
        """ΔW in fp32, as the module stores its weight; None where the layer has no adapter."""
        layer = _layer(name)
        if layer not in self._adapted:
            return None
        a, b = self._matrices(layer)
        scaling = self.adapter.scaling_of(layer)
        delta = (b * scaling) @ a
        begun = self.adapter.initial(layer, *linear_features(self.skeleton.get_submodule(layer)))
        if self.onto == "original" and begun is not None:
            delta -= (begun[1] * scaling) @ begun[0]
        if self.adapter.dora:
            weight = self.turned(layer, self.read_base(name))
            turned = weight + delta
            lengths = self.adapter.magnitude(layer, len(turned)) / turned.norm(dim=1)
            delta = turned * lengths[:, None] - weight
        if isinstance(self.skeleton.get_submodule(layer), nn.Embedding):
            return delta.T.contiguous()
        return self.turned(layer, delta).contiguous()

    def survival(self, written: StoredModel) -> float:
        """How much of ΔW lies in the merged model as it was stored: <W' − W, ΔW> / <ΔW, ΔW> over all layers.

        1 where all of it arrived. Rounding W + ΔW back onto the lattice on which W lies can swallow nearly all.

        Args:
            written: the stored model W', read back.
        """
        along, length = 0.0, 0.0
        for each in self.moved(written):
            along, length = along + each.along, length + each.length
        return along / length if length else 1.0

    def moved(self, written: StoredModel) -> Iterator["Moved"]:
        """How each layer, and each expert, has moved that has an adapter with an effect.

        Args:
            written: as `survival` takes it.
        """
        for name in self.tensor_names():
            if name in self.experts:
                for index in range(self.experts[name].num):
                    delta = self.read_delta_expert(name, index)
                    if delta is not None and delta.any():
                        now = as_dense(written.read_expert(name, index))
                        yield how_moved(expert_name(name, index), now - self.read_base_expert(name, index), delta)
                continue
            delta = self.read_delta(name) if name.endswith(".weight") else None
            if delta is not None and delta.any():
                now = written.read_dense(name, torch.float32).float()
                yield how_moved(_layer(name), now - self.read_base(name), delta)

    def _matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        return self.adapter.matrices(layer, *linear_features(self.skeleton.get_submodule(layer)))


def as_dense(weight: Tensor | QuantizedTensor) -> Tensor:
    """A matrix in fp32, whatever it is stored as."""
    return weight.float() if isinstance(weight, Tensor) else dequantize(weight, torch.float32)


@dataclass(frozen=True)
class Moved:
    """How a matrix has moved along ΔW.

    Args:
        along, length: <W' − W, ΔW> and <ΔW, ΔW>.
        noise: how far rounding alone moves their ratio: one standard deviation, were it independent of ΔW.
    """

    name: str
    along: float
    length: float
    noise: float

    @property
    def share(self) -> float:
        """How much of ΔW is there."""
        return self.along / self.length


def how_moved(name: str, moved: Tensor, delta: Tensor) -> Moved:
    """Of W' − W and ΔW, which is not zero."""
    along, length = torch.dot(moved.flatten(), delta.flatten()).item(), delta.square().sum().item()
    noise = (moved - delta).norm().item() / (delta.numel() * length) ** 0.5
    return Moved(name, along, length, noise)


def _layer(name: str) -> str:
    """The layer whose weight is called so."""
    return name.removesuffix(".weight")


def _refuse_tied(adapter: StoredAdapter, skeleton: "PreTrainedModel") -> None:
    """An adapter on one of two layers that share their weight cannot go into it without changing the other."""
    tied = skeleton.all_tied_weights_keys
    if shared := [name for name in adapter.names if f"{name}.weight" in {*tied, *tied.values()}]:
        raise RunError(
            f"The adapter changes {shared[0]}, whose weight is embedding and head in one.",
            "Merged are adapters on weights that no other layer uses.",
            "Use the adapter beside the base (`nybble chat --run`, PEFT), or train without it among --target-modules.",
        )
