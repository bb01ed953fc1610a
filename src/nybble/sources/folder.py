"""A Hugging Face folder as the source of a base model."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from nybble.data.picture_reader import PictureReader
from nybble.errors import FormatError, ModelError, foreign_errors
from nybble.files.manifest import MANIFEST_NAME, verify_manifest
from nybble.formats.bnb import StoredWeight, formats_from_config, from_bnb, is_quantized, stored_weight, true_config
from nybble.formats.packed_methods import Packing, packing_from_config
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_stack import StoredStack, is_stack, stack_owner
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import (
    MatrixFile,
    SafetensorsFolder,
    TensorEntry,
    object_without_duplicates,
    row_entry,
    sampled_sha256,
    tensor_sha256,
)
from nybble.sources.checkpoint_names import CheckpointNames, checkpoint_names
from nybble.sources.packed_weights import PackedWeights, find_packed_weights
from nybble.sources.processor import load_processor, load_vision_language_processor
from nybble.sources.sentences import named_prompts, read_pooling
from nybble.sources.skeleton import (
    build_skeleton,
    build_whole,
    config_from_json,
    config_refused,
    is_taken_alone,
    stored_text_config,
)
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import PICTURES, Task, check_classifier, reads_both, reads_pictures
from nybble.sources.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from nybble.options.objective_groups import Pooling

LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class FolderSource(StoredModel):
    """A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer.

    Weights are in 16 or 32 bits; in four of nybble's or bitsandbytes' own, which stay as they are; or in the few bits
    of another program, which are widened one tensor at a time.

    Raises:
        ModelError: no config, no safetensors, a missing or damaged shard.
        FormatError: quantised in a way that is not readable here; or nybble wrote it, and it is not as it was written.
    """

    def __init__(self, path: Path, name: str, tokenizer: str | None = None):
        self.path, self.name, self._tokenizer = path, name, tokenizer
        if (path / MANIFEST_NAME).exists():  # nybble's own folders have one, others need none
            self.made_from = verify_manifest(path).get("base")
        self._config_json = _read_config_json(path)
        _refuse_pickles(path)
        self._stored = SafetensorsFolder(path)
        self.files = tuple(self._stored.files)
        _check_layers(path, self._config_json, len(self._stored.entries))
        written, packing = _written_formats(path, self._config_json)
        self._packed = PackedWeights({}, ())
        if packing is not None:
            self._packed = find_packed_weights(packing, self._stored.entries)
        packed_parts = self._packed.part_names
        self._parts = _group_by_weight([name for name in self._stored.entries if name not in packed_parts])
        self._stacks: dict[str, StoredStack] = {}
        _refuse_codes(path, self._parts, self._stored.entries)
        self._parts |= {name: list(weight.parts.values()) for name, weight in self._packed.weights.items()}
        first = self._first_spec()
        layers = {} if written is None else written.layers
        self.layer_formats = None if first is None else BaseFormats(first, layers)
        self._whole_config = _load_config(path, self._config_json)
        self._whole = build_whole(self._whole_config)
        self.config = self._text_config = stored_text_config(self._whole_config, self._config_json, self._whole)
        dtypes = {entry.dtype for entry in self._stored.entries.values()}
        self.dense_dtype = torch.float16 if "F16" in dtypes and "BF16" not in dtypes else torch.bfloat16

    @cached_property
    def _names(self) -> CheckpointNames:
        whole = None if self.task.kind == "pictured" else self._whole
        names = checkpoint_names(self._shapes(), self.skeleton, whole)
        for target, recipe in names.recipes.items():
            if recipe.plain_name is None and any(self._is_quantized(name) for name, _ in recipe.sources):
                raise ModelError(
                    f"{self.name} holds {target} in {len(recipe.sources)} four-bit parts.",
                    "Parts are joined from 16- or 32-bit tensors.",
                    "Start from the 16-bit model.",
                )
        return names

    @cached_property
    def untied(self) -> tuple[str, ...]:
        """As `StoredModel` says: of an encoder-decoder those that are stored beside what they are tied to, with other
        values. T5's config ties its head whatever it says (T5 1.1 and Flan-T5 have one of their own), and so
        transformers decides.
        """
        if not self.task.prompted:
            return ()
        tied = build_skeleton(self.config, task=self.task).all_tied_weights_keys
        stored = [pair for pair in tied.items() if self._parts.keys() >= set(pair)]
        return tuple(name for name, owner in stored if self._digest(name) != self._digest(owner))

    def _digest(self, stored: str) -> str:
        return tensor_sha256(self._read_weight(stored))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all stored weights; but biases of zeros that GPTQ's programs write beside layers that have none."""
        packed = self._packed.weights
        shapes = {name: self._shape(name) for name in self._parts}
        known = [name for name in self.skeleton.state_dict() if name.endswith(".bias")]
        biases = {f"{weight.module}.bias" for weight in packed.values()} & shapes.keys()
        extra = {name for name in biases if not any(name.endswith(own) for own in known)}
        zeros = {name for name in extra if not self._stored.read(name).any()}
        return {name: shape for name, shape in shapes.items() if name not in zeros}

    @cached_property
    def licence(self) -> str | None:
        """What the header of the folder's README says."""
        readme = self.path / "README.md"
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        header = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
        licence = re.search(r"^license:[ \t]*([\w.-]+)", header[1], re.MULTILINE) if header else None
        return licence[1] if licence else None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.quant_spec is not None:
            notes.append(f"{self.name} is already quantised ({self._stored_formats()}); its own bits are kept.")
        notes += self._packed.notes(self.name)
        if self.task.kind == "states" and (prompts := named_prompts(self.path)):
            named = ", ".join(prompts)
            notes.append(f"Its files name prompts ({named}); texts are embedded as they are, so write them into these.")
        if wrapper := self._names.wrapper:
            notes.append(f"Its tensors' names begin with {wrapper!r}, which was taken off.")
        if left_out := self._names.left_out:
            parts = ", ".join(self._sizes_by_part(left_out))
            notes.append(f"Only {self.config.model_type} is used of it; left out: {parts}.")
        if self.task.kind != "pictured" and not is_taken_alone(self._whole_config):
            notes.append(
                f"transformers loads it as {self._whole_config.model_type} with all its parts: the adapter of its text "
                "alone does not fit that. `nybble merge` writes the tuned text model."
            )
        return tuple(notes)

    def _sizes_by_part(self, names: Sequence[str]) -> list[str]:
        """`vision_tower.* (434 tensors, 0.86 GB)` by the first part of the names that no used tensor has."""
        used = {source for recipe in self._names.recipes.values() for source, _ in recipe.sources}
        sizes: dict[str, list[int]] = {}
        for name in names:
            parts = name.split(".")
            starts = (".".join(parts[: i + 1]) + "." for i in range(len(parts) - 1))
            start = next((start for start in starts if not any(other.startswith(start) for other in used)), name)
            sizes.setdefault(start, []).append(sum(self._stored.entries[part].nbytes for part in self._parts[name]))
        return [f"{start}* ({len(each)} tensors, {sum(each) / 1e6:,.1f} MB)" for start, each in sizes.items()]

    @property
    def pooling(self) -> "Pooling | None":
        return super().pooling or read_pooling(self.path)

    def config_for(self, task: Task) -> PretrainedConfig:
        return self._whole_config if task.kind == "pictured" else self._text_config

    @cached_property
    def picture_reader(self) -> PictureReader | None:
        if not reads_both(self._whole_config):
            return None
        folder = self._tokenizer or str(self.path)
        return PictureReader(lambda: load_vision_language_processor(folder, self._whole_config))

    def save_processor(self, folder: Path) -> None:
        if self.task.kind == "pictured":
            own = Path(self._tokenizer or self.path)
            for name in PROCESSOR_FILES:
                if (own / name).is_file():
                    shutil.copyfile(own / name, folder / name)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        if reads_pictures(self.config):
            found: Any = load_processor(self._tokenizer or str(self.path), build_skeleton(self.config, task=PICTURES))
            return found
        check_classifier(self.config)
        return load_tokenizer(self._tokenizer or str(self.path))

    def load_generation_config(self) -> GenerationConfig:
        if (self.path / "generation_config.json").is_file():
            with foreign_errors(config_refused(self.path / "generation_config.json")):
                return GenerationConfig.from_pretrained(self.path)
        return super().load_generation_config()

    def fingerprint(self) -> str:
        volatile = ("transformers_version", "_name_or_path")
        config = {key: value for key, value in self._config_json.items() if key not in volatile}
        text = json.dumps(config, sort_keys=True) + sampled_sha256(self._stored.entries.values())
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(self._names.recipes)

    def is_quantized(self, name: str) -> bool:
        stored = self._names.recipes[name].plain_name
        return stored is not None and self._is_quantized(stored)

    def _is_quantized(self, stored: str) -> bool:
        return is_quantized(stored, self._stored.entries) or is_stack(stored, self._stored.entries)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        recipe = self._names.recipes[name]
        if not self.is_quantized(name):
            return recipe.make(self._read_weight)
        return self._read_quantized(recipe.sources[0][0])

    def _read_weight(self, stored: str) -> Tensor:
        packed = self._packed.weights.get(stored)
        weight = self._stored.read(stored) if packed is None else packed.read(self._stored.read)
        return weight.float() if weight.dtype == torch.float64 else weight

    def _read_row(self, stored: str, row: int | None) -> Tensor:
        """A weight, or one row of its first dimension, such as an expert."""
        if row is None:
            return self._read_weight(stored)

        def read(name: str) -> Tensor:
            return self._stored.read_entry(row_entry(self._stored.entries[name], row))

        packed = self._packed.weights.get(stored)
        return read(stored) if packed is None else packed.read(lambda name: read(name)[None])[0]

    def _shape(self, stored: str) -> tuple[int, ...]:
        packed = self._packed.weights.get(stored)
        return self._stored.entries[stored].shape if packed is None else packed.shape

    def read_part(self, name: str, index: int) -> Tensor | QuantizedTensor:
        recipe = self._names.recipes[name]
        if self.is_quantized(name):
            return self._stack(recipe.sources[0][0]).matrix(index)

        return recipe.make_part(index, self._shape, self._read_row)

    def num_parts(self, name: str) -> int:
        if self.is_quantized(name):
            return self._stack(self._names.recipes[name].sources[0][0]).num
        return self._names.recipes[name].num_parts(self._shape)

    def stored_expert(self, name: str, index: int) -> tuple[StoredWeight, dict[str, TensorEntry]]:
        return self._stack(self._names.recipes[name].sources[0][0]).stored(index)

    def _stack(self, stored: str) -> StoredStack:
        if stored not in self._stacks:
            entries = {part: self._stored.entries[part] for part in self._parts[stored]}
            self._stacks[stored] = StoredStack(stored, entries, self._stored.read_entry)
        return self._stacks[stored]

    def _read_quantized(self, stored: str) -> QuantizedTensor:
        return from_bnb(stored, {part: self._stored.read(part) for part in self._parts[stored]})

    def stored(self, name: str) -> tuple[StoredWeight, dict[str, TensorEntry]]:
        stored = self._names.recipes[name].sources[0][0]
        entries = {part: self._stored.entries[part] for part in self._parts[stored]}
        sizes = {part: entry.nbytes for part, entry in entries.items()}
        return stored_weight(stored, sizes, self._stored.read), entries

    def matrix(self, name: str) -> MatrixFile | None:
        stored = self._names.recipes[name].plain_name
        if stored is None or self._is_quantized(stored) or stored in self._packed.weights:
            return None
        return MatrixFile(self._stored.entries[stored])

    def _stored_formats(self) -> str:
        keys = [name for name in self._stored.entries if ".quant_state." in name]
        return ", ".join(sorted({key.rpartition("__")[2] for key in keys}))

    def _first_spec(self) -> QuantSpec | None:
        first = next(filter(self._is_quantized, self._parts), None)
        if first is None:
            return None
        stack = is_stack(first, self._stored.entries)
        return self._stack(first).matrix(0).spec if stack else self._read_quantized(first).spec


def _group_by_weight(names: list[str]) -> dict[str, list[str]]:
    """Weight -> the stored tensors it consists of; a weight in four bits has several (see formats.bnb)."""
    known = dict.fromkeys(names)
    stacks = {stack for name in names if (stack := stack_owner(name)) is not None}
    parts: dict[str, list[str]] = {}
    for name in names:
        if (stack := next((part for part in _beginnings(name) if part in stacks), None)) is not None:
            parts.setdefault(stack, []).append(name)
            continue
        weight, marker, _ = name.partition(".weight.")
        owner = f"{weight}.weight" if marker else name
        parts.setdefault(owner if is_quantized(owner, known) else name, []).append(name)
    return parts


def _beginnings(name: str) -> list[str]:
    """The name, and what is left without its last part, or its last two."""
    return [name, name.rpartition(".")[0], name.partition(".quant_state.")[0]]


def _way_from(folder: Path) -> str:
    """What makes a model of a folder that holds none."""
    run = folder.parent if (folder / "adapter_config.json").is_file() else folder
    if (run / "adapter").is_dir() and (run / "config.yaml").is_file():
        return f"It is a run's: nybble merge --run {run} --out MODEL writes a model, nybble chat --run {run} asks it."
    return "Check the path; an adapter's folder is no model until it is merged: nybble merge."


def _read_config_json(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{folder} has no config.json.",
            "Allowed: a Hugging Face model folder (config.json, safetensors, tokenizer files).",
            _way_from(folder),
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=object_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}.", fix="Fetch the file again.") from error
    config = true_config(config) if isinstance(config, dict) else {}
    config = _with_own_file(folder, config)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} has no model_type.", "Allowed: a config.json written by transformers.")
    return config


def _with_own_file(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt may say how it quantised in a file of its own alone."""
    file = folder / "hf_quant_config.json"
    if "quantization_config" in config or not file.is_file():
        return config
    try:
        written = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=object_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}.", fix="Fetch the file again.") from error
    own = written.get("quantization") if isinstance(written, dict) else None
    if not isinstance(own, dict):
        raise FormatError(f"{file} has no object 'quantization'.", fix="Fetch the file again.")
    return config | {"quantization_config": {"quant_method": "modelopt", **own}}


def _written_formats(folder: Path, config: dict[str, Any]) -> tuple[BaseFormats | None, Packing | None]:
    """How config.json says that layers are quantised: in few bits that stay, or in those of another program.

    Raises:
        FormatError: in yet another way.
    """
    try:
        return formats_from_config(config), packing_from_config(config)
    except FormatError as error:
        raise FormatError(f"{folder / 'config.json'}: {error.got}", error.allowed, error.fix) from error


def _check_layers(folder: Path, config: dict[str, Any], num_tensors: int) -> None:
    """Every layer has tensors, so a config that speaks of more layers is not worth building (and may be endless)."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in LAYER_KEYS:
            if isinstance(count := part.get(key), int) and count > num_tensors:
                raise ModelError(
                    f"{folder / 'config.json'} has {key} = {count}, but {num_tensors} tensors are stored.",
                    "Config and weights must belong together.",
                    "Fetch the model again.",
                )


def _load_config(folder: Path, config_json: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    with foreign_errors(config_refused(folder / "config.json")):
        if (config_json.get("quantization_config") or {}).get("quant_method") == "nybble":  # refused by its folder
            config = config_from_json(config_json)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # left in, it would mark what is loaded as quantised
    return config


def _refuse_codes(folder: Path, parts: Mapping[str, list[str]], entries: Mapping[str, TensorEntry]) -> None:
    """fp8 and integers stand for weights by a scale that only their own format knows: never widen them without it."""
    for name in parts:
        dtype = entries[name].dtype
        is_fp8 = dtype.startswith("F8_")
        is_code = dtype.startswith(("I", "U", "BOOL")) and name.endswith(".weight") and not is_quantized(name, entries)
        if is_fp8 or is_code:
            raise FormatError(
                f"{folder} stores {name} as {'fp8' if is_fp8 else 'integers'} ({dtype}).",
                "Needed beside them: quantization_config in config.json, and the scales that it asks for.",
                "Fetch the whole model again, or start from the 16-bit one.",
            )


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which is refused: opening one can run any code.",
            "Allowed: safetensors.",
            "Fetch the model in safetensors, or convert it where you trust it: save_pretrained writes safetensors.",
        )
