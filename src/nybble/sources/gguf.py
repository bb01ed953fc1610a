"""A base model from a GGUF file."""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from gguf import TokenType
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.errors import FormatError, ModelError, foreign_errors
from nybble.families import FAMILIES
from nybble.formats.bnb import StoredWeight
from nybble.formats.format import DEFAULT_FORMAT, STORED_FORMATS
from nybble.formats.gguf import DENSE_ENDS, LATTICES, GgufFile, widen_rows
from nybble.formats.gguf_vocabulary import KNOWN_MODELS, SPLITTING_RULES, Vocabulary, splitting_rule, tokenizer_of
from nybble.formats.quant_spec import BaseFormats, QuantSpec, stored_spec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import MatrixFile, TensorEntry, row_entry, sampled_sha256
from nybble.layers.lora import linear_features
from nybble.layers.streamed import expert_name
from nybble.sources.gguf_config import config_of
from nybble.sources.placement import check_shape
from nybble.sources.skeleton import build_skeleton
from nybble.sources.stored_model import StoredModel
from nybble.sources.tokenizer import load_tokenizer

WIDE = ("F32", "F16", "BF16")  # types without blocks
ROW_ALONE = "shared_expert_gate.weight"  # a matrix of one row, of which GGUF files hold the row


class GgufSource(StoredModel):
    """A GGUF file: blocks are widened to fp32 one tensor at a time, experts one by one, the vocabulary's to bf16.

    Raises:
        ModelError: damaged, or of an architecture that is not supported.
    """

    dense_dtype = torch.bfloat16

    def __init__(self, path: Path, name: str, tokenizer: str | None = None):
        self.path, self.name, self._tokenizer = path, name, tokenizer
        self._file = GgufFile(path)
        self.config = config_of(self._file)

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name -> the file's: one, but of experts up to two."""
        language_model = self.skeleton if self.task.kind == "tokens" else build_skeleton(self.config)
        return self._file.names_of(language_model)

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
        if self._is_stack(name):
            return torch.cat([self._file.read(part) for part in self._names[name]], dim=1)
        (gguf_name,) = self._names[name]
        if gguf_name in DENSE_ENDS:  # kept in 16 bits: widened straight to bf16
            return self._file.read(gguf_name, self.dense_dtype)
        values = self._file.in_hf_order(self._file.read(gguf_name), gguf_name, self.config)
        if name.endswith("norm.weight"):
            values -= FAMILIES[self.config.model_type].norm_offset  # which files have in the weights
        return values[None] if name.endswith(ROW_ALONE) else values

    def read_part(self, name: str, index: int) -> Tensor | QuantizedTensor:
        return torch.cat([self._file.read(part, part=index) for part in self._names[name]])

    def num_parts(self, name: str) -> int | None:
        counts = {self._file.entries[part].shape[0] for part in self._names[name]}
        return counts.pop() if len(counts) == 1 else 0

    def _is_stack(self, name: str) -> bool:
        """Whether it is a projection of all experts of a block."""
        return len(self._file.entries[self._names[name][0]].shape) == 3

    def matrix(self, name: str) -> MatrixFile | None:
        (gguf_name,) = self._names[name]
        return WidenedMatrix(self._file.entries[gguf_name], self.dense_dtype) if gguf_name in DENSE_ENDS else None

    def without_lattice(self) -> StoredModel:
        return DitheredSource(self)

    def as_stored(self) -> StoredModel:
        return StoredBlocks(self)


class WidenedMatrix(MatrixFile):
    """A matrix of a GGUF file whose rows are widened where they are used.

    Args:
        entry: of two dimensions, in any type that is read.
        dtype: of the rows that it gives.
    """

    def __init__(self, entry: TensorEntry, dtype: torch.dtype):
        self.entry, self.dtype = entry, dtype
        self.num_rows, self.num_columns = entry.shape
        self.row_bytes = self.num_columns * dtype.itemsize

    def read_rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        rows = buffer[: (stop - start) * self.row_bytes].view(self.dtype).view(stop - start, self.num_columns)
        widen_rows(self.entry, start, rows)
        return rows

    def gather(self, rows: Tensor) -> Tensor:
        unique, place = rows.unique(return_inverse=True)
        found = torch.empty(len(unique), self.num_columns, dtype=self.dtype)
        for row, into in zip(unique.tolist(), found, strict=True):
            widen_rows(self.entry, row, into[None])
        return found[place]


class StoredBlocks(GgufSource):
    """A GGUF source whose linear layers keep the file's own blocks, whole rows of them in transformers' order.

    The values are llama.cpp's, so that an adapter trained over them fits this very file there. Linear layers that the
    file has in 16 or 32 bits stay so.

    Raises:
        FormatError: a layer is in blocks that are not computed with here, or none is in blocks.
    """

    def __init__(self, source: GgufSource):
        super().__init__(source.path, source.name, source._tokenizer)
        formats: dict[str, str] = {}
        for layer, parts in self._parts_of_layers().items():
            types = dict.fromkeys(self._file.entries[part].dtype for part in parts)
            if types.keys() <= set(WIDE):
                continue
            (format, *others) = (name.lower() for name in types)
            if others or format not in STORED_FORMATS:
                raise FormatError(
                    f"{self.name} has {layer} in {' and '.join(types)}, which is not trained over as it is.",
                    f"Trained over as they are: {', '.join(name.upper() for name in STORED_FORMATS)}; gate and up of "
                    "experts in one of them.",
                    f"Take --format {DEFAULT_FORMAT}: it is widened and put into that.",
                )
            formats[layer] = format
        if not formats:
            raise self._nothing_of_its_own()
        self.layer_formats = BaseFormats(stored_spec(next(iter(formats.values()))), formats)
        self.files = (self.path,)

    def _parts_of_layers(self) -> dict[str, tuple[str, ...]]:
        """Linear layers, and projections of experts -> the file's tensors of each."""
        linears = {layer: self._names[f"{layer}.weight"] for layer in self.linears}
        return linears | {name: self._names[name] for name in self.experts}

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
        assert not self._is_stack(name), f"{name} is read an expert at a time"
        (part,) = self._names[name]
        return self._over_blocks(name, self._file.in_hf_order(self._file.read_packed(part), part, self.config))

    def read_part(self, name: str, index: int) -> Tensor | QuantizedTensor:
        if not self.is_quantized(name):
            return super().read_part(name, index)
        packed = [self._file.read_packed(part, index) for part in self._names[name]]
        return self._over_blocks(name, torch.cat(packed))

    def stored(self, name: str) -> tuple[StoredWeight, dict[str, TensorEntry]] | None:
        (part,) = self._names[name]
        linear = self.skeleton.get_submodule(name.removesuffix(".weight"))
        check_shape(self, name, self._file.entries[part].shape, linear_features(linear)[::-1])
        return self._stored(name, [self._file.entries[part]], self._file.interleaved_heads(part, self.config))

    def stored_expert(self, name: str, index: int) -> tuple[StoredWeight, dict[str, TensorEntry]] | None:
        shape, parts = self.experts[name], [self._file.entries[part] for part in self._names[name]]
        rows = (shape.num, shape.out_features // len(parts), shape.in_features)
        for part in parts:
            check_shape(self, part.name, part.shape, rows)
        return self._stored(name, [row_entry(part, index) for part in parts])

    def _stored(
        self, name: str, parts: Sequence[TensorEntry], heads: int = 0
    ) -> tuple[StoredWeight, dict[str, TensorEntry]] | None:
        """A matrix whose rows are those of several tensors, one after another."""
        if not self.is_quantized(name):
            return None
        starts = accumulate((entry.nbytes for entry in parts), initial=0)
        pieces = {entry.name: start for entry, start in zip(parts, starts, strict=False)}
        spec, shape = self._spec_and_shape(name)
        return StoredWeight(spec, shape, torch.float32, pieces, None, heads), {entry.name: entry for entry in parts}

    def _over_blocks(self, name: str, packed: Tensor) -> QuantizedTensor:
        """A matrix of which `packed` has the blocks, uint8 (rows, bytes of a row)."""
        spec, shape = self._spec_and_shape(name)
        return QuantizedTensor(packed, torch.empty(0, dtype=torch.uint8), spec, shape, torch.float32)

    def _spec_and_shape(self, name: str) -> tuple[QuantSpec, tuple[int, int]]:
        """Of a linear layer's weight, or of each expert's matrix."""
        assert self.layer_formats is not None
        rows = sum(self._file.entries[part].shape[-2] for part in self._names[name])
        columns = self._file.entries[self._names[name][0]].shape[-1]
        return self.layer_formats.of(name.removesuffix(".weight")), (rows, columns)


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
        if self._is_stack(name):
            return torch.stack([self._dithered(name, expert, index) for index, expert in enumerate(tensor)])
        return self._dithered(name, tensor)

    def read_part(self, name: str, index: int) -> Tensor | QuantizedTensor:
        tensor = super().read_part(name, index)
        assert isinstance(tensor, Tensor)
        return self._dithered(name, tensor, index)

    def _dithered(self, name: str, tensor: Tensor, expert: int | None = None) -> Tensor:
        parts = self._names[name]
        if parts[0] in DENSE_ENDS:
            return tensor
        steps = [self._file.lattice_steps(part, expert) for part in parts]
        if any(each is None for each in steps):
            return tensor
        key = hashlib.sha256(f"{self.seed} {name if expert is None else expert_name(name, expert)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        noise = torch.rand(tensor.shape, generator=generator) - 0.5
        joined = torch.cat([each for each in steps if each is not None])
        return tensor + self._file.in_hf_order(noise * joined.view(tensor.shape), parts[0], self.config)


def _tokenizer_of(file: GgufFile) -> PreTrainedTokenizerBase:
    """The file's tokenizer: the tokens that llama.cpp gives, bos put before a text where llama.cpp puts it.

    Raises:
        ModelError: none, of an unknown kind, with an unknown splitting rule, or damaged.
    """
    vocabulary = _vocabulary_of(file)
    with foreign_errors(lambda error: _no_tokenizer(file, f"is damaged: {error}")):
        backend = tokenizer_of(vocabulary)
    special = {name: _special_token(file, vocabulary, name) for name in ("bos", "eos", "unknown", "padding")}
    if special["bos"] is not None and _adds_bos(file, vocabulary):
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


def _adds_bos(file: GgufFile, vocabulary: Vocabulary) -> bool:
    """Whether llama.cpp puts bos before a text."""
    if vocabulary.model == "gemma4":  # whatever the file says
        return True
    rule = splitting_rule(vocabulary.pre)
    default = vocabulary.model == "llama" or (rule is not None and rule.adds_bos)
    return bool(file.metadata.get("tokenizer.ggml.add_bos_token", default))


def _no_tokenizer(file: GgufFile, what: str) -> ModelError:
    return ModelError(
        f"The tokenizer in {file.path} {what}.",
        f"Readable: byte-level BPE (gpt2) split as by {', '.join(SPLITTING_RULES)}; SentencePiece BPE (llama, gemma4).",
        "Name the model's own tokenizer, a folder or hub id, with --tokenizer.",
    )
