"""What a run trains, on the disk: adapters, or every weight of the model."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from nybble.data.template import ChatTemplate
from nybble.errors import RunError
from nybble.files.disk import complete_folder
from nybble.formats.safetensors import SafetensorsFolder, tensor_sha256, write_tensors
from nybble.layers.full_weights import weights_by_name
from nybble.quantization.folder import save_dense_folder
from nybble.runs.adapter_files import restore_adapter
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.runs.folder import RunFolder
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

MASTERS = "weights.safetensors"


class Trained(Protocol):
    """What is trained of a model."""

    def write(self, model: "PreTrainedModel", folder: Path) -> None:
        """All of it, as training has it, into an existing folder."""

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        """Give the model what `write` wrote.

        Raises:
            RunError: a file is missing or damaged, or of another model.
        """

    def publish(self, model: "PreTrainedModel", run: RunFolder) -> None:
        """What the run is for, as other programs read it; it appears complete, in place of an earlier one."""


class TrainedAdapters:
    """Adapters, in PEFT's format.

    Args:
        config: of PEFT.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)

    @classmethod
    def of(cls, model: "PreTrainedModel", base_name: str) -> "TrainedAdapters":
        """Those of a model."""
        return cls(adapter_config(model, base_name))

    def write(self, model: "PreTrainedModel", folder: Path) -> None:
        """As `Trained` says."""
        write_adapter(model, folder, self.config)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        """As `Trained` says."""
        restore_adapter(model, folder)

    def publish(self, model: "PreTrainedModel", run: RunFolder) -> None:
        """As `Trained` says."""
        with complete_folder(run.adapter) as temporary:
            self.write(model, temporary)


class TrainedWeights:
    """Every weight: fp32 masters while training, at last a model of its own in 16 bits.

    Args:
        base: that training began with.
        template: whose tokens end an answer, and which travels with the model.
    """

    def __init__(self, base: StoredModel, template: ChatTemplate):
        self._base, self._template = base, template

    def write(self, model: "PreTrainedModel", folder: Path) -> None:
        """As `Trained` says."""
        weights = {name: weight.detach() for name, weight in weights_by_name(model).items()}
        layout = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
        write_tensors(folder / MASTERS, layout, ((name, weight.cpu()) for name, weight in weights.items()))

    @torch.no_grad()
    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        """As `Trained` says."""
        stored, weights = SafetensorsFolder(folder / MASTERS), weights_by_name(model)
        shapes = {name: entry.shape for name, entry in stored.entries.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
            raise RunError(f"{folder / MASTERS} holds the weights of another model.", "Allowed: those of this run.")
        for name, weight in weights.items():
            weight.copy_(stored.read(name))

    def publish(self, model: "PreTrainedModel", run: RunFolder) -> None:
        """As `Trained` says."""
        with complete_folder(run.model) as temporary:
            save_dense_folder(_InMemory(self._base, self._template, model), temporary)


class _InMemory(StoredModel):
    """A model in memory as a source, its config the base's, with the template that it was trained with."""

    def __init__(self, base: StoredModel, template: ChatTemplate, model: nn.Module):
        self.name, self.config, self.dense_dtype = base.name, base.config, base.dense_dtype
        self._base, self._template = base, template
        self._tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **weights_by_name(model)}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._template.with_template()

    def load_generation_config(self) -> "GenerationConfig":
        return ending_answers(self._base.load_generation_config(), self._template)

    def fingerprint(self) -> str:
        digests = "".join(tensor_sha256(self.read(name)) for name in self.tensor_names())
        return hashlib.sha256(digests.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(self._base.placements)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()


def ending_answers(generation: "GenerationConfig", template: ChatTemplate) -> "GenerationConfig":
    """A generation config that knows the tokens which end the template's answers."""
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    generation.eos_token_id = list(dict.fromkeys([*template.stop_ids, *known]))
    return generation
