"""A base model from a GGUF file. Its config is derived once and kept as a transformers folder."""

import hashlib
import os
import re
import tempfile
from functools import cached_property
from pathlib import Path

import torch
from gguf import TokenType
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.errors import FormatError, ModelError, foreign_errors
from nybble.files.disk import disk_errors
from nybble.formats.format import DEFAULT_FORMAT, STORED_FORMATS
from nybble.formats.gguf import DENSE_ENDS, LATTICES, GgufFile
from nybble.formats.gguf_vocabulary import KNOWN_MODELS, SPLITTING_RULES, Vocabulary, splitting_rule, tokenizer_of
from nybble.formats.quant_spec import BaseFormats, stored_spec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import sampled_sha256, staged_folder
from nybble.sources.bundled import CACHE_FIX, cache_folder
from nybble.sources.skeleton import build_skeleton
from nybble.sources.stored_model import StoredModel
from nybble.sources.tokenizer import load_tokenizer

WIDE = ("F32", "F16", "BF16")  # types without blocks
DERIVED_VERSION = 2  # raise it when what is derived from a file changes


class GgufSource(StoredModel):
    """A GGUF file: blocks are widened to fp32 one tensor at a time, the vocabulary's to bf16.

    Raises:
        ModelError: damaged, or of an architecture that is not supported.
    """

    dense_dtype = torch.bfloat16

    def __init__(self, path: Path, name: str, tokenizer: str | None = None):
        from transformers import AutoConfig

        self.path, self.name, self._tokenizer = path, name, tokenizer
        self._file = GgufFile(path)
        self._derived = _derived_folder(self._file)
        self.config = AutoConfig.from_pretrained(self._derived)

    @cached_property
    def _names(self) -> dict[str, str]:
        """transformers' name -> the file's."""
        language_model = self.skeleton if self.task.kind == "tokens" else build_skeleton(self.config)
        names = self._file.hf_names(language_model)
        return {hf_name: gguf_name for gguf_name, hf_name in names.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        main_type = next(iter(self._file.block_types), "")  # none: what is missing is said where it is looked for
        bits = re.match(r"[A-Z]*Q(\d)|MXFP(\d)|NVFP(\d)", main_type)
        if bits is None:
            return ()
        count = next(group for group in bits.groups() if group)
        return (f"{self.name} was itself published in {count} bits ({main_type}), not in 16.",)

    @property
    def licence(self) -> str | None:
        licence: str | None = self._file.metadata.get("general.license")
        return licence

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._tokenizer) if self._tokenizer else _tokenizer_of(self._file)

    def fingerprint(self) -> str:
        text = self._file.header_sha256 + sampled_sha256(self._file.entries.values())
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        gguf_name = self._names[name]
        if gguf_name in DENSE_ENDS:  # kept in 16 bits: widened straight to bf16
            return self._file.read(gguf_name, self.dense_dtype)
        return self._file.in_hf_order(self._file.read(gguf_name), gguf_name, self.config)

    def without_lattice(self) -> StoredModel:
        return DitheredSource(self)

    def as_stored(self) -> StoredModel:
        return StoredBlocks(self)


class StoredBlocks(GgufSource):
    """A GGUF source whose linear layers keep the file's own blocks, whole rows of them in transformers' order.

    The values are llama.cpp's, so that an adapter trained over them fits this very file there. Linear layers that the
    file has in 16 or 32 bits stay so.

    Raises:
        FormatError: a layer is in blocks that are not computed with here, or none is in blocks.
    """

    def __init__(self, source: GgufSource):
        super().__init__(source.path, source.name, source._tokenizer)
        types = {layer: self._file.entries[self._names[f"{layer}.weight"]].dtype for layer in self.linears}
        formats = {layer: name.lower() for layer, name in types.items() if name not in WIDE}
        for layer, format in formats.items():
            if format not in STORED_FORMATS:
                raise FormatError(
                    f"{self.name} has {layer} in {types[layer]}, which is not trained over as it is.",
                    f"Trained over as they are: {', '.join(name.upper() for name in STORED_FORMATS)}.",
                    f"Take --format {DEFAULT_FORMAT}: it is widened and put into that.",
                )
        if not formats:
            raise self._nothing_of_its_own()
        self.layer_formats = BaseFormats(stored_spec(next(iter(formats.values()))), formats)

    @property
    def notes(self) -> tuple[str, ...]:
        assert self.layer_formats is not None
        types = ", ".join(name.upper() for name in self.layer_formats.names)
        return (f"{self.name}'s own blocks ({types}) are trained over: an adapter fits this file in llama.cpp.",)

    def as_stored(self) -> StoredModel:
        return self

    def is_quantized(self, name: str) -> bool:
        assert self.layer_formats is not None
        return name.removesuffix(".weight") in self.layer_formats.layers

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if not self.is_quantized(name):
            return super().read(name)
        assert self.layer_formats is not None
        gguf_name = self._names[name]
        packed = self._file.in_hf_order(self._file.read_packed(gguf_name), gguf_name, self.config)
        spec, shape = self.layer_formats.of(name.removesuffix(".weight")), self._file.entries[gguf_name].shape
        return QuantizedTensor(packed, torch.empty(0, dtype=torch.uint8), spec, shape, torch.float32)


class DitheredSource(GgufSource):
    """A GGUF source whose four-bit blocks are taken off their lattice: each weight gets uniform noise of up to half a
    step either way, the same at every reading.

    Weights that lie on sixteen evenly spaced values a block flatter formats whose levels happen to meet them. For
    comparing formats only: what comes out is no model that anybody trained.

    Args:
        seed: of the noise.
    """

    def __init__(self, source: GgufSource, seed: int = 0):
        super().__init__(source.path, source.name, source._tokenizer)
        self.seed = seed

    @property
    def notes(self) -> tuple[str, ...]:
        noisy = [name for name in self._file.entries if self._file.entries[name].dtype in LATTICES]
        types = sorted({self._file.entries[name].dtype for name in noisy})
        what = f"{len(noisy)} tensors in {', '.join(types)}"
        return (*super().notes, f"{what} were dithered by half a step of their lattice, seed {self.seed}.")

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
    """Config of the file as transformers saves it, in nybble's cache.

    transformers parses the whole vocabulary to get it from the file, which takes seconds; the cache is keyed by the
    file's header and transformers' version.
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
    from transformers import AutoConfig

    def cannot_be_taken(error: Exception) -> ModelError:
        return ModelError(
            f"transformers cannot take a config from {file.path}: {error}", fix="Use the model's safetensors folder."
        )

    with tempfile.TemporaryDirectory() as folder:  # alone there: no config beside the model is taken for its own
        os.symlink(file.path.absolute(), Path(folder) / "model.gguf")
        with foreign_errors(cannot_be_taken):
            config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # "gguf", which would block saving
    file.complete_config(config)
    config.architectures = [type(build_skeleton(config)).__name__]
    config.save_pretrained(out)


def _tokenizer_of(file: GgufFile) -> PreTrainedTokenizerBase:
    """The file's tokenizer: the tokens that llama.cpp gives, bos put before a text where llama.cpp puts it.

    Raises:
        ModelError: none, of an unknown kind, with an unknown splitting rule, or damaged.
    """
    vocabulary = _vocabulary_of(file)
    with foreign_errors(lambda error: _no_tokenizer(file, f"is damaged: {error}")):
        backend = tokenizer_of(vocabulary)
    special = {name: _special_token(file, vocabulary, name) for name in ("bos", "eos", "unknown", "padding")}
    if special["bos"] is not None and file.metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(vocabulary)):
        number = vocabulary.tokens.index(special["bos"])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special['bos']} $A",
            pair=f"{special['bos']} $A {special['bos']} $B",
            special_tokens=[(special["bos"], number)],
        )
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokens = {names[name]: token for name, token in special.items() if token is not None}
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None:
        tokens["chat_template"] = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)


def _vocabulary_of(file: GgufFile) -> Vocabulary:
    metadata = file.metadata
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model not in KNOWN_MODELS:
        raise _no_tokenizer(file, f"is of the kind {model!r}" if model else "is missing")
    if model == "gpt2" and (pre is None or splitting_rule(pre) is None):
        raise _no_tokenizer(file, f"splits text by {f'the rule {pre!r}' if pre else 'a rule that it does not name'}")
    tokens = file.array("tokenizer.ggml.tokens")
    return Vocabulary(
        model=model,
        pre=pre or "default",
        tokens=[token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)],  # as llama.cpp names them
        types=file.array("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens),
        merges=file.array("tokenizer.ggml.merges"),
        scores=file.array("tokenizer.ggml.scores"),
        space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", model == "llama")),
    )


def _special_token(file: GgufFile, vocabulary: Vocabulary, name: str) -> str | None:
    """The bos, eos, unknown or padding token; SentencePiece files may leave out the first three."""
    default = {"unknown": 0, "bos": 1, "eos": 2}.get(name) if vocabulary.model == "llama" else None
    number = file.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    return None if number is None or not 0 <= number < len(vocabulary.tokens) else vocabulary.tokens[number]


def _adds_bos(vocabulary: Vocabulary) -> bool:
    """Whether llama.cpp puts bos before a text where the file does not say."""
    if vocabulary.model == "llama":
        return True
    rule = splitting_rule(vocabulary.pre)
    return rule is not None and rule.adds_bos


def _no_tokenizer(file: GgufFile, what: str) -> ModelError:
    return ModelError(
        f"The tokenizer in {file.path} {what}.",
        f"Readable: byte-level BPE (gpt2) split as by {', '.join(SPLITTING_RULES)}; SentencePiece BPE (llama).",
        "Name the model's own tokenizer, a folder or hub id, with --tokenizer.",
    )
