"""The parts of a run, for a training loop of one's own on nybble's kernels.

source = nybble.open_model("smollm2-135m-instruct")
data = nybble.load_data("examples.jsonl", source, max_seq_len=512)
model = nybble.load(source, format="nf4")
nybble.add_adapters(model, rank=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
for batch in data.batches(rows=8):
    model.loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_adapter("adapters/first")
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from nybble.api.keywords import as_options
from nybble.data.audit import Audited
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch, collate
from nybble.data.picture_reader import have_pictures
from nybble.data.preference_rows import PreferenceRow, compare
from nybble.data.prepare import EXAMPLE_ROWS, PreparedData, RowKind
from nybble.data.row_kinds import ROW_KINDS
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError
from nybble.events import Listener, silent
from nybble.files.disk import complete_folder
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, add_new_adapters, trained_parameters
from nybble.layers.precision import set_up
from nybble.network import fetching
from nybble.options.adapter_groups import SeededAdapters
from nybble.options.groups import DataOptions, MemoryOptions
from nybble.options.option import build_options
from nybble.options.verbs import AttachConfig, LoadConfig, RowsConfig, SourceConfig, StepConfig
from nybble.planning.micro_batches import total_steps
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.runs.base import in_asked_bits, quant_spec
from nybble.runs.context import read_examples
from nybble.sources.inventory import take_inventory
from nybble.sources.load import load_model
from nybble.sources.open import open_model as open_stored
from nybble.sources.parts import check_dense_share
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_model(
    model: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    on_event: Listener = silent,
) -> StoredModel:
    """Open a base model where it is stored; none of its weights is read.

    Args:
        model: a Hugging Face folder or hub id, a .gguf file, or an alias: smollm2-135m-instruct, all-minilm-l6-v2.
        tokenizer: folder or hub id of another tokenizer than the model's own.
        revision: branch, tag or commit of a model on the hub; the source's `revision` is the commit that was opened.
        offline: fetch nothing.
        on_event: told where a model is fetched.

    Raises:
        NybbleError: there is no such model, or it cannot be read or fetched.

    Example:
        >>> source = nybble.open_model(tiny)
        >>> source.config.num_hidden_layers, len(source.fingerprint())
        (2, 64)
    """
    given = {"model": model, "tokenizer": tokenizer, "revision": revision, "offline": offline}
    options = build_options(SourceConfig, as_options(given)).model
    with fetching(not options.offline):
        return open_stored(options.model, options.tokenizer, on_event, options.revision)


@dataclass(frozen=True)
class TrainingData(PreparedData):
    """Examples as a model learns from them.

    Args:
        train, validation: sequences of at most `max_seq_len` tokens: `input_ids` int32 `(T,)`, `supervised` bool
            `(T,)`, and the row that each comes from. They are read from the disk when they are asked for.
        audit: what was read, dropped and cut, and what is wrong with it.
        template: how conversations became tokens.
        seed: of the order of the rows.
        mixture: the weights of the data sets that the training sequences are of; None where they have none.
    """

    template: ChatTemplate
    seed: int

    @classmethod
    def read(cls, options: DataOptions, source: StoredModel, kind: RowKind = EXAMPLE_ROWS) -> Self:
        """What `load_data` does, but that the audit refuses nothing, and that rows may be of another kind."""
        found, template = read_examples(options, source, kind)
        return cls(found.train, found.validation, found.audit, found.mixture, template, options.seed)

    def batches(
        self, rows: int = 16, *, packed: bool = True, epochs: float = 1.0, max_steps: int | None = None
    ) -> Iterator[Batch]:
        """The rows of one optimizer step after another, each step in one batch. Arguments are those of `steps`.

        Example:
            >>> batch = next(data.batches(rows=8))
            >>> batch.packed, len(batch.document_lengths), batch.input_ids.shape == (1, batch.num_tokens)
            (True, 8, True)
        """
        return (batch for (batch,) in self.steps(rows, packed=packed, epochs=epochs, max_steps=max_steps))

    def steps(
        self,
        rows: int = 16,
        micro_batch_size: int | None = None,
        *,
        packed: bool = True,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step after another: the rows, and their order, that `nybble.train` takes.

        Args:
            rows: that make one step.
            micro_batch_size: most rows computed at once; all rows of a step where None.
            packed: documents lie side by side in one row, `input_ids` int64 `(1, T)`; else padded, one a row. What a
                model takes, its `packed` says.
            epochs: passes over the rows.
            max_steps: steps, whatever `epochs` says.

        Raises:
            ConfigError: a number is not allowed.

        Example:
            >>> [len(step) for step in data.steps(rows=8, micro_batch_size=3, max_steps=2)]
            [3, 3]
        """
        numbers = {"rows_per_step": rows, "micro_batch_size": micro_batch_size, "packing": packed}
        config = build_options(StepConfig, numbers | {"epochs": epochs, "max_steps": max_steps})
        return self._steps(config.memory, total_steps(config.loop, len(self.train), rows))

    def _steps(self, memory: MemoryOptions, num_steps: int) -> Iterator[list[Batch]]:
        rows, packed = memory.rows_per_step, memory.packing
        sampler = StepSampler(len(self.train), rows, self.seed, self.mixture)
        for _ in range(num_steps):
            dealt = split_micro_batches(
                sampler.next_step(), self.train.lengths, memory.micro_batch_size or rows, packed
            )
            yield [_collate([self.train[row] for row in micro], packed) for micro in dealt]


def _check_decoder(source: StoredModel, objective: str = "sft") -> None:
    """Refuse what no loop of one's own is made of.

    Raises:
        ConfigError, ModelError: the source is a path that is to be opened first, or its model no decoder.
    """
    if isinstance(source, str | os.PathLike):
        got = f"The model is {str(source)!r}."
        raise ConfigError(got, "Allowed: what nybble.open_model returns.", "Open it first: nybble.open_model(PATH).")
    if task_of(objective, source.config).prompted:
        raise ConfigError(
            "The model is an encoder-decoder.",
            "A training loop of one's own is for decoders.",
            "Train with nybble.train.",
        )


def _collate(rows: Sequence[EncodedExample], packed: bool) -> Batch:
    compared = [row for row in rows if isinstance(row, PreferenceRow)]
    return compare(compared, packed) if compared else collate(rows, packed)


def load_data(data: Any, source: StoredModel, *, on_event: Listener = silent, **options: Any) -> TrainingData:
    """Read, encode, split and audit examples for a base model.

    Args:
        data: a JSONL, JSON, CSV, Parquet or text file, a folder, a pattern, a hub id, or "builtin:pydoc"; or several.
        source: the base, for its tokenizer, its context and its vocabulary.
        on_event: told of the audit.
        options: the flags of `nybble data check` with underscores, such as `max_seq_len`. With an `objective` rows are
            what it learns from; a batch of pairs, or of judged answers, says of which it is (`PreferenceBatch` in
            `nybble.data.preference_rows`), with two documents a pair, the chosen one first.

    Raises:
        NybbleError: examples cannot be read, or the audit finds an error that is not in `allow`.

    Example:
        >>> data = nybble.load_data("rows.jsonl", nybble.open_model(tiny), max_seq_len=128)
        >>> len(data.train), len(data.validation), data.audit.num_dropped
        (38, 2, 0)
    """
    config = build_options(RowsConfig, as_options({"data": data} | options))
    _check_decoder(source, config.objective.objective)
    found = TrainingData.read(config.data, source, ROW_KINDS[config.objective.objective])
    on_event(Audited(found.audit))
    found.audit.check()
    if have_pictures(found.train + found.validation):
        raise ConfigError(
            "Rows have pictures.",
            "Batches for a training loop of one's own are of text.",
            "Train with nybble.train, or remove the rows with pictures.",
        )
    return found


class Model:
    """A base in memory, with or without adapters, from batch to loss.

    Which way computes it (nybble's decoder blocks, or transformers' modules where these do not know it) is chosen when
    it is first asked something, and again after `add_adapters`.

    Args:
        module: the transformers model.
        name: what the user called it.
        config: how it was loaded.
    """

    def __init__(self, module: "PreTrainedModel", name: str, config: LoadConfig):
        self.module, self.name, self._config = module, name, config
        self._adapters: SeededAdapters | None = None

    @cached_property
    def causal_lm(self) -> CausalLM:
        """What computes it; `causal_lm.verdict` says which way, and why."""
        return CausalLM.of(self.module, keep=self._config.loaded.keep, packing=self._config.loaded.packing)

    @property
    def packed(self) -> bool:
        """Whether it takes batches whose rows lie side by side, else padded ones."""
        return self.causal_lm.packed

    def loss(self, batch: Batch, denominator: float | None = None) -> Tensor:
        """Mean over the batch's supervised tokens of −log p(target), in nats: a scalar in fp32 to call `backward` on.

        Args:
            denominator: supervised tokens of the whole step, where the batch is part of one.

        Raises:
            ModelError: the batch is padded and the model takes packed ones, or the other way round; or no way of
                computing the model agrees with its own loss.

        Example:
            >>> model.loss(batch).backward()
            >>> all(parameter.grad is not None for parameter in model.parameters())
            True
        """
        return self.causal_lm.loss(batch.to(self.causal_lm.device), denominator)

    def token_losses(self, batch: Batch) -> Tensor:
        """−log p of each supervised token, fp32 `(N,)` in nats, without a gradient; errors as `loss`."""
        return self.causal_lm.token_losses(batch.to(self.causal_lm.device))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: A `(rank, in)` and B `(out, rank)` of every adapter, fp32."""
        return trained_parameters(self.module)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on, or off with `mode` False."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Switch dropout off, as it is after loading."""
        return self.train(False)

    def attach(self, config: AttachConfig) -> None:
        """What `add_adapters` does, with its options."""
        if adapters_of(self.module):
            raise ConfigError("The model has adapters.", "They are added once.", "Load it again for others.")
        add_new_adapters(self.module, config.adapters, config.adapters.seed)
        self._adapters = config.adapters
        self.__dict__.pop("causal_lm", None)  # chosen again, for the model as it is now

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapters in PEFT's format; `folder` appears complete or not at all, in place of an earlier one.

        Raises:
            ConfigError: there is no adapter.

        Example:
            >>> model.save_adapter("adapters/first")
        """
        if self._adapters is None:
            raise ConfigError("The model has no adapter.", "", "Add adapters with `nybble.add_adapters` first.")
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        with complete_folder(Path(folder)) as temporary:
            write_adapter(self.module, temporary, adapter_config(self.module, self.name))


def load(source: StoredModel, *, on_event: Listener = silent, **options: Any) -> Model:
    """Load a base model, frozen, its blocks' linear layers in four bits; the 16-bit model is never in memory.

    Args:
        source: what `open_model` returned. One that is stored in four bits keeps its own, bit for bit.
        on_event: told how far loading has come.
        options: `format` ("nf4", ..., "stored" for a GGUF file's own blocks, "none" for 16 bits), `block_size`,
            `double_quant`, `max_dense_share`, `device`, `compute_dtype`, `threads` and `packing` as the flags of
            `nybble train`. `quality` is "absmax" or "search". `keep` is "nothing" (least memory), "attention" or
            "everything" (fastest).

    Raises:
        NybbleError: an option is wrong, most of the model would stay in 16 bits, or the weights are damaged, missing or
            not finite.

    Example:
        >>> model = nybble.load(nybble.open_model(tiny), format="nf4", keep="everything")
        >>> model.parameters()
        []
    """
    config = build_options(LoadConfig, as_options(options))
    _check_decoder(source)
    device, dtype = set_up(config.machine)
    source = in_asked_bits(source, config.weights)
    spec = quant_spec(config.weights)
    if spec is not None:
        inventory = take_inventory(source.skeleton, source.in_four_bits)
        check_dense_share(inventory, source.name, config.weights.max_dense_share)
    formats = None if spec is None else BaseFormats(spec)
    module = load_model(source, formats, dtype, device, config.loaded.quality, report=on_event)
    return Model(module, source.name, config)


def add_adapters(model: Model, **options: Any) -> None:
    """Put a LoRA adapter beside linear layers of the model, in place; they are what is trained then.

    Args:
        model: without adapters.
        options: `rank`, `alpha`, `dropout`, `rslora`, `target_modules`, `rank_pattern`, `alpha_pattern` and `seed` as
            the flags of `nybble train`; a pattern is a dict.

    Raises:
        ConfigError: an option is wrong, a name matches no layer, or the model has adapters already.

    Example:
        >>> nybble.add_adapters(model, rank=4, target_modules="q_proj,v_proj")
        >>> [tuple(parameter.shape) for parameter in model.parameters()][:2]
        [(4, 64), (64, 4)]
    """
    model.attach(build_options(AttachConfig, as_options(options)))
