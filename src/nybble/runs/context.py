"""Rows and the context: never longer than what the model computes, and said where longer than it was made for."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nybble.data import findings
from nybble.data.open_template import open_template
from nybble.data.prepare import EXAMPLE_ROWS, PreparedData, RowKind, prepare_data
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError
from nybble.events import Listener, silent
from nybble.layers.context import context_length, within_positions
from nybble.options.groups import DataOptions, RowOptions
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import reads_pictures

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def within_context(max_seq_len: int, base: StoredModel) -> int:
    """The max_seq_len that the base can compute: the default is lowered to its context.

    Raises:
        ConfigError: another max_seq_len was asked for, and the base has no positions for so many tokens, or takes
            pictures whole.
    """
    if reads_pictures(base.config):
        if max_seq_len != RowOptions.model_fields["max_seq_len"].default:
            raise ConfigError(
                f"max-seq-len is {max_seq_len}, and the model reads pictures.",
                "Its tokens are the patches of a picture, whose size its image processor says.",
                "Leave --max-seq-len out.",
            )
        return max_seq_len
    return within_positions(max_seq_len, base.config, lambda: base.skeleton)


def read_examples(
    options: DataOptions, source: StoredModel, kind: RowKind = EXAMPLE_ROWS
) -> tuple[PreparedData, ChatTemplate]:
    """Read, encode, split and audit the examples that the options name, within the base's context, as its template or
    the one named writes them.

    Raises:
        NybbleError: they cannot be read.
    """
    options = options.model_copy(update={"max_seq_len": within_context(options.max_seq_len, source)})
    template = open_template(options, source.load_tokenizer(), kind=kind, reader=source.picture_reader)
    return read_rows(options, source, template, kind), template


def read_rows(
    options: DataOptions,
    source: StoredModel,
    template: ChatTemplate,
    kind: RowKind = EXAMPLE_ROWS,
    scratch: Path | None = None,
    encoded: Path | None = None,
    report: Listener = silent,
) -> PreparedData:
    """Read, encode, split and audit the examples that the options name, for a base; as `prepare`. Of pictures nothing
    is kept: files that rows name may change.
    """
    if reads_pictures(source.config):
        return prepare_data(options, template, None, kind=kind, scratch=scratch, report=report)
    vocab_size = source.config.get_text_config().vocab_size
    data = prepare_data(options, template, vocab_size, source.embedding_rows, kind, scratch, encoded, report)
    return _note_context(data, options.max_seq_len, source.config)


def _note_context(data: PreparedData, max_seq_len: int, base: "PretrainedConfig") -> PreparedData:
    """`data` with what there is to say about the base's context in its audit."""
    context = context_length(base)
    if context is None:
        return data
    audit = data.audit
    if max_seq_len == context < RowOptions.model_fields["max_seq_len"].default:
        note = f"max_seq_len is {context}, the tokens that the model has positions for"
        audit = replace(audit, notices=(*audit.notices, note))
    rows = data.train + data.validation
    beyond = (rows[number].origin for number in np.flatnonzero(rows.longest > context).tolist())
    found = findings.find("beyond-context", beyond, f"its context is {context} tokens")
    return replace(data, audit=replace(audit, findings=(*audit.findings, *found)))
