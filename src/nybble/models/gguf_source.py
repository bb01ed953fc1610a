"""A base model from a GGUF file. Its config and tokenizer are derived once and kept as a transformers folder."""

import hashlib
import os
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.errors import ModelError, foreign_errors
from nybble.formats.disk import disk_errors
from nybble.formats.gguf_io import LATTICES, GgufFile
from nybble.formats.quantized_tensor import QuantizedTensor, QuantSpec
from nybble.formats.safetensors_io import sampled_sha256, staged_folder
from nybble.models.bundled import CACHE_FIX, cache_folder
from nybble.models.interface import Kind
from nybble.models.skeleton import build_skeleton
from nybble.models.tokenizer import load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


DERIVED_VERSION = 1  # raise it when what is derived from a file changes
DENSE_ENDS = ("token_embd.weight", "output.weight")  # kept in 16 bits: widened straight to bf16


class GgufSource:
    """A GGUF file as a model source: blocks are widened to fp32 one tensor at a time, the vocabulary's to bf16.

    Raises:
        ModelError: damaged, or of an architecture that is not supported.
    """

    quant_spec: QuantSpec | None = None
    dense_dtype = torch.bfloat16

    def __init__(self, path: Path, name: str, kind: "Kind", tokenizer: str | None):
        from transformers import AutoConfig

        self.path, self.name, self.kind, self._tokenizer = path, name, kind, tokenizer
        self._file = GgufFile(path)
        self._derived = _derived_folder(self._file)
        self.config: PretrainedConfig = AutoConfig.from_pretrained(self._derived)
        self.notes = _notes(self._file, name)
        self.licence: str | None = self._file.metadata.get("general.license")

    @cached_property
    def _names(self) -> dict[str, str]:
        """transformers' name -> the file's."""
        names = self._file.hf_names(build_skeleton(self.config))
        return {hf_name: gguf_name for gguf_name, hf_name in names.items()}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self._tokenizer or str(self._derived))

    def load_generation_config(self) -> "GenerationConfig":
        from transformers import GenerationConfig

        return GenerationConfig.from_model_config(self.config)

    def fingerprint(self) -> str:
        text = self._file.header_sha256 + sampled_sha256(self._file.entries.values())
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(self._names)

    def is_quantized(self, name: str) -> bool:
        return False

    def read(self, name: str) -> Tensor | QuantizedTensor:
        gguf_name = self._names[name]
        if gguf_name in DENSE_ENDS:
            return self._file.read(gguf_name, self.dense_dtype)
        return self._file.read_as_hf(gguf_name, self.config)


class DitheredSource(GgufSource):
    """A GGUF source whose four-bit blocks are taken off their lattice: each weight gets uniform noise of up to half a
    step either way, the same at every reading.

    Weights that lie on sixteen evenly spaced values a block flatter formats whose levels happen to meet them. For
    comparing formats only: what comes out is no model that anybody trained.

    Args:
        seed: of the noise.
    """

    def __init__(self, source: GgufSource, seed: int = 0):
        super().__init__(source.path, source.name, source.kind, source._tokenizer)
        self.seed = seed
        noisy = [name for name in self._file.entries if self._file.entries[name].dtype in LATTICES]
        types = sorted({self._file.entries[name].dtype for name in noisy})
        note = f"{len(noisy)} tensors in {', '.join(types)} were dithered by half a step of their lattice, seed {seed}."
        self.notes = (*self.notes, note)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} dithered {self.seed}".encode()).hexdigest()

    def read(self, name: str) -> Tensor | QuantizedTensor:
        tensor = super().read(name)
        assert isinstance(tensor, Tensor)
        gguf_name = self._names[name]
        steps = None if gguf_name in DENSE_ENDS else self._file.lattice_steps(gguf_name)
        if steps is None:
            return tensor
        key = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        noise = torch.rand(steps.shape, generator=generator) - 0.5
        return tensor + self._file.in_hf_order(noise * steps, gguf_name, self.config)


def _derived_folder(file: GgufFile) -> Path:
    """Config and tokenizer of the file as transformers saves them, in nybble's cache.

    transformers parses the whole vocabulary several times to get them from the file, some 10 s for the
    smallest; the cache is keyed by the file's header and transformers' version.
    """
    import transformers

    key = f"{file.header_sha256} {transformers.__version__} {DERIVED_VERSION}"
    folder = cache_folder() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.is_dir():
        try:
            with disk_errors(folder, fix=CACHE_FIX), staged_folder(folder) as staging:
                _derive(file, staging)
        except ModelError:
            if not folder.is_dir():  # else another process was quicker with the same content
                raise
    return folder


def _derive(file: GgufFile, out: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    def cannot_be_taken(error: Exception) -> ModelError:
        return ModelError(
            f"transformers cannot take config and tokenizer from {file.path}: {error}",
            fix="Use the model's safetensors folder.",
        )

    # alone in a folder: other files beside the model would be taken for its tokenizer's
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(file.path.absolute(), Path(folder) / "model.gguf")
        with foreign_errors(cannot_be_taken):
            config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # "gguf", which would block saving
    file.complete_config(config)
    config.architectures = [type(build_skeleton(config)).__name__]
    _set_splitting(tokenizer, file)
    config.save_pretrained(out)
    save_tokenizer(tokenizer, out)


def _set_splitting(tokenizer: "PreTrainedTokenizerBase", file: GgufFile) -> None:
    """Split text as SmolLM's tokenizer was trained to: digits one by one. transformers' reader does not know it."""
    from tokenizers import pre_tokenizers

    if file.metadata.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _notes(file: GgufFile, name: str) -> tuple[str, ...]:
    main_type = next(iter(file.block_types))
    bits = re.match(r"[A-Z]*Q(\d)|MXFP(\d)|NVFP(\d)", main_type)
    if bits is None:
        return ()
    count = next(group for group in bits.groups() if group)
    return (f"{name} was itself published in {count} bits ({main_type}), not in 16.",)
