"""A base model that is stored somewhere: what can be asked of it before, and instead of, loading it.

A place where weights come from is a class that answers what is abstract here, and what else it can. Everything that
follows from that is written once, here: the model's skeleton, where each stored tensor goes, which layers lie in
blocks, and how a linear layer's weight is turned.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from nybble.errors import FormatError, ModelError
from nybble.formats.bnb import StoredWeight
from nybble.formats.format import DEFAULT_FORMAT
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import MatrixFile, TensorEntry
from nybble.kernels.ops.four_bit import dequantize
from nybble.layers.convert import block_names, quantizable_linears
from nybble.layers.dense import is_transposed, kept_in_fp32
from nybble.layers.quantized_experts import ExpertShape, expert_shapes
from nybble.sources.placement import Placed, PlacedTensor, check_shape, check_stored, place_tensors, read_placed
from nybble.sources.skeleton import build_skeleton, dense_end_weights, untie
from nybble.sources.task import HEADS, TOKENS, Task

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from nybble.data.picture_reader import PictureReader
    from nybble.options.objective_groups import Pooling


class StoredModel(ABC):
    """A model's config, tokenizer and tensors, of which none is in memory.

    Attributes:
        name: what the user called it.
        config: of transformers, without a quantisation entry.
        dense_dtype: in which embeddings and head are kept: fp16 where the model is stored in fp16, else bf16.
        layer_formats: the few bits that its linear layers are already in, else None.
        task: what the model is for: which head stands on it.
        model_labels: names that its own config has for scores, of a model for another task than the next token.
        made_from: fingerprint of the model that it was quantised from, where that is known.
        revision: the commit that was opened, of a model on the hub.
        files: that its tensors can be read from a part at a time; none where they are converted or made on the way.
    """

    name: str
    config: "PretrainedConfig"
    dense_dtype: torch.dtype
    layer_formats: BaseFormats | None = None
    made_from: str | None = None
    revision: str | None = None
    files: tuple[Path, ...] = ()
    task: Task = TOKENS
    model_labels: tuple[str, ...] = ()

    # ---- what every place of weights answers

    @abstractmethod
    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, or the one that was named instead."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over the config, every tensor's name, type and shape, and samples of its bytes."""

    @abstractmethod
    def tensor_names(self) -> list[str]:
        """Names as transformers has them, in the order in which reading them is quickest."""

    @abstractmethod
    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One tensor, in memory that nothing else refers to: it is gone when the caller drops it."""

    # ---- what some can, and the others say that they cannot

    @property
    def quant_spec(self) -> QuantSpec | None:
        """The format that the model is already in; where its layers differ, that of one of them."""
        return None if self.layer_formats is None else self.layer_formats.spec

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences the user should see."""
        return ()

    @property
    def pooling(self) -> "Pooling | None":
        """How the states of a text's tokens become its embedding; None where nothing says so."""
        return self.task.pooling

    @property
    def text_length(self) -> int | None:
        """Tokens of a text that are embedded; None where nothing says so."""
        return None

    @property
    def licence(self) -> str | None:
        """As its makers name it, where they do."""
        return None

    def load_generation_config(self) -> "GenerationConfig":
        """How the model's makers generate with it; end-of-turn tokens among others."""
        from transformers import GenerationConfig

        return GenerationConfig.from_model_config(self.config)

    def is_quantized(self, name: str) -> bool:
        """Whether `read` gives this one as a QuantizedTensor."""
        return False

    def read_part(self, name: str, index: int) -> Tensor | QuantizedTensor:
        """The index-th of a tensor's first dimension, such as an expert; who can reads no more than that."""
        tensor = self.read(name)
        assert isinstance(tensor, Tensor), name
        return tensor[index]

    def num_parts(self, name: str) -> int | None:
        """How many there are of these; None where that is not known before they are read."""
        return None

    def matrix(self, name: str) -> MatrixFile | None:
        """A 16-bit matrix, to be read row by row; None where single rows cannot be read."""
        return None

    def stored(self, name: str) -> tuple[StoredWeight, dict[str, TensorEntry]] | None:
        """Where the bytes of a four-bit weight lie, and the stored tensors it consists of; None where in no file."""
        return None

    def as_stored(self) -> "StoredModel":
        """The same with the few bits that it is stored in, which are trained over as they are.

        Raises:
            FormatError: it has none, or layers in bits that cannot be.
        """
        if self.quant_spec is not None:
            return self
        raise self._nothing_of_its_own()

    def _nothing_of_its_own(self) -> FormatError:
        return FormatError(
            f"{self.name} has no few bits of its own that are trained over as they are.",
            "Those that do: GGUF files in blocks, and folders in four bits of nybble or bitsandbytes.",
            f"Take another --format, such as {DEFAULT_FORMAT}.",
        )

    def stored_expert(self, name: str, index: int) -> tuple[StoredWeight, dict[str, TensorEntry]] | None:
        """The same of one expert of a stack."""
        return None

    def without_lattice(self) -> "StoredModel":
        """The same with weights that lie on no evenly spaced values, which would flatter some four-bit formats."""
        return self

    # ---- what follows

    def for_task(self, task: Task) -> Self:
        """The same weights under another head."""
        if task == self.task:
            return self
        other = copy.copy(self)
        for kind in type(self).__mro__:
            for name in (name for name, value in vars(kind).items() if isinstance(value, cached_property)):
                vars(other).pop(name, None)
        if self.task is TOKENS:
            other.model_labels = tuple(map(str, (getattr(self.config, "id2label", None) or {}).values()))
        other.task, other.config = task, task.config(self.config_for(task))
        return other

    def config_for(self, task: Task) -> "PretrainedConfig":
        """The config of the model that a task asks of these weights."""
        return self.config

    @property
    def picture_reader(self) -> "PictureReader | None":
        """What a vision-language model reads pictures with; None of others."""
        return None

    def save_processor(self, folder: Path) -> None:
        """Write the files of what reads its pictures beside the tokenizer's, where the model reads pictures.

        Raises:
            OSError: one cannot be written.
        """
        return

    @cached_property
    def skeleton(self) -> "PreTrainedModel":
        """The model on the meta device, to be looked at; `empty_model` gives one to change."""
        return untie(build_skeleton(self.config, task=self.task), self.untied)

    def empty_model(self, dtype: torch.dtype) -> "PreTrainedModel":
        """The model on the meta device, to be filled: it is the caller's own, and so is its config."""
        return untie(build_skeleton(copy.deepcopy(self.config), dtype, self.task), self.untied)

    @cached_property
    def placements(self) -> dict[str, PlacedTensor]:
        """Parameter -> the stored tensor for it, in the order in which reading is quickest; tied ones once.

        Raises:
            ModelError: a stored tensor has no place, a parameter has no stored tensor, or tied parameters are stored
                with different values.
        """
        return self._placed.tensors

    @cached_property
    def _placed(self) -> Placed:
        return place_tensors(self, self.skeleton)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters of the head that are not stored, or not as the task wants them: they begin anew."""
        return self._placed.fresh

    @property
    def untied(self) -> tuple[str, ...]:
        """Parameters that the config ties to others, and that have values of their own all the same."""
        return ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stored tensors that this task's model has no place for: of another head."""
        return self._placed.left_out

    @property
    def computed(self) -> tuple[str, ...]:
        """Parameters and buffers that are not stored and that the model's own code fills, such as positions."""
        return self._placed.computed

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the modules that make scores, which are trained whole; none for other tasks."""
        if not self.task.gives_scores:
            return ()
        heads = [name for name, _ in self.skeleton.named_children() if name in HEADS]
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.fresh)
        return (*heads, *(name for name in owners if not any(f"{name}.".startswith(f"{head}.") for head in heads)))

    @cached_property
    def linears(self) -> list[str]:
        """Linear layers of the blocks: what goes into four bits and can have an adapter."""
        return quantizable_linears(self.skeleton)

    @cached_property
    def experts(self) -> dict[str, ExpertShape]:
        """Projections of experts inside the blocks, which go into four bits too, by the name of their parameter."""
        blocks = block_names(self.skeleton)
        found = expert_shapes(self.skeleton).items()
        inside = {name: shape for name, shape in found if any(name.startswith(f"{block}.") for block in blocks)}
        return {name: shape for name, shape in inside.items() if name not in self.kept_in_fp32}

    @cached_property
    def in_few_bits(self) -> set[str]:
        """Parameters that go into four bits: weights of linear layers, and projections of experts."""
        return {*(f"{name}.weight" for name in self.linears), *self.experts}

    @cached_property
    def blocks(self) -> list[str]:
        """The blocks that hold such parameters, in order."""
        names = block_names(self.skeleton)
        return [name for name in names if any(target.startswith(f"{name}.") for target in self.in_few_bits)]

    @cached_property
    def ends(self) -> set[str]:
        """Parameters of the input embedding and the output head, which stay in 16 bits."""
        return dense_end_weights(self.skeleton)

    @cached_property
    def kept_in_fp32(self) -> set[str]:
        """Parameters and buffers that stay in fp32 whatever the model computes in, as its makers say."""
        return kept_in_fp32(self.skeleton)

    def loaded_dtype(self, target: str, compute_dtype: torch.dtype, narrow: Collection[str]) -> torch.dtype:
        """What a parameter that is not in few bits is loaded in.

        Args:
            narrow: parameters that stay in `dense_dtype`.
        """
        if target in narrow:
            return self.dense_dtype
        return torch.float32 if target in self.kept_in_fp32 else compute_dtype

    def written(self, target: str) -> Tensor:
        """A parameter as a folder in 16 bits holds it: matrices rounded, norms and biases as they are.

        Raises:
            ModelError: as `read_parameter`.
        """
        if target in self.experts:
            return self._dense_experts(target, self.dense_dtype)
        tensor = self.read_parameter(target)
        assert isinstance(tensor, Tensor), target
        rounded = tensor.ndim > 1 and target not in self.kept_in_fp32
        return tensor.to(self.dense_dtype) if rounded else tensor

    @cached_property
    def in_four_bits(self) -> set[str] | None:
        """The layers, and projections of experts, that are stored in four bits; None of a model in 16 or 32."""
        if self.quant_spec is None:
            return None
        stored = [target for target, place in self.placements.items() if self.is_quantized(place.name)]
        return {target.removesuffix(".weight") for target in stored}

    @cached_property
    def streamed_layers(self) -> list[str]:
        """Linears of the blocks and projections of experts that lie in files in few bits, to be read from there while a
        run trains; others stay in memory.
        """
        stored = self.in_four_bits if self.files else None
        return [name for name in (*self.linears, *self.experts) if name in (stored or ())]

    @property
    def is_streamable(self) -> bool:
        """Whether there are any such in every block."""
        return bool(self.streamed_layers) and all(
            any(name.startswith(f"{block}.") for name in self.streamed_layers) for block in self.blocks
        )

    def read_parameter(self, target: str) -> Tensor | QuantizedTensor:
        """The tensor that is stored for a parameter; in four bits it is `[out, in]`, whatever the layer is. Experts in
        four bits are read one at a time (`read_expert`), or dense.

        Raises:
            ModelError: it has another shape than the parameter, or holds values that are not finite.
        """
        return read_placed(self, self.placements[target])

    def read_dense(self, target: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A parameter's values as its module keeps them.

        Args:
            dtype, device: what a tensor in four bits is widened to, and where; any other comes as it is stored.
        """
        if target in self.experts and self.is_quantized(self.placements[target].name):
            return self._dense_experts(target, dtype, device)
        tensor = self.read_parameter(target)
        if isinstance(tensor, QuantizedTensor):
            dense = dequantize(tensor.to(device), dtype)
            return self.turned(target.removesuffix(".weight"), dense).contiguous()
        return tensor

    def _dense_experts(self, target: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A projection of experts as its parameter holds it, read an expert at a time."""
        shape = self.experts[target]
        dense = torch.empty(self.placements[target].shape, dtype=dtype, device=device)
        for index in range(shape.num):
            expert = self.read_expert(target, index)
            matrix = dequantize(expert.to(device), dtype) if isinstance(expert, QuantizedTensor) else expert
            dense[index] = matrix.T if shape.transposed else matrix
        return dense

    def read_expert(self, target: str, index: int) -> Tensor | QuantizedTensor:
        """One expert's matrix of a projection, `[out, in]`.

        Raises:
            ModelError: there are more or fewer than the parameter's, it has another shape, or holds values that are not
                finite.
        """
        place, shape = self.placements[target], self.experts[target]
        if (stored := self.num_parts(place.name)) not in (None, shape.num):
            raise ModelError(
                f"{self.name}: {stored} experts are stored for {target}.",
                f"Its config asks for {shape.num}.",
                "Check that config.json and the weights belong together and that no file is missing.",
            )
        expert = self.read_part(place.name, index)
        name = f"{place.name} of expert {index}"
        if isinstance(expert, QuantizedTensor):
            check_stored(self, name, expert, (shape.out_features, shape.in_features))
            return expert
        check_stored(self, name, expert, place.shape[1:])
        return expert.T if shape.transposed else expert

    def read_linear(self, layer: str) -> Tensor | QuantizedTensor:
        """The weight of a linear layer, `[out, in]`."""
        weight = self.read_parameter(f"{layer}.weight")
        return self.turned(layer, weight) if isinstance(weight, Tensor) else weight

    def turned(self, layer: str, weight: Tensor) -> Tensor:
        """`[out, in]` of a weight as its layer keeps it, and the way back."""
        return weight.T if is_transposed(self.skeleton.get_submodule(layer)) else weight

    def embedding_rows(self, ids: list[int]) -> Tensor | None:
        """fp32 (len(ids), hidden): what is stored for these tokens; None where single rows cannot be read.

        Raises:
            ModelError: the files cannot be read.
        """
        wanted = self.skeleton.get_input_embeddings().weight
        target = next(name for name, parameter in self.skeleton.named_parameters() if parameter is wanted)
        matrix = self.matrix(self.placements[target].name)
        if matrix is not None:
            check_shape(self, target, (matrix.num_rows, matrix.num_columns), tuple(wanted.shape))
        return None if matrix is None else matrix.gather(torch.tensor(ids)).float()
