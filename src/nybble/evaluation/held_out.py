"""Rows to judge a run by: its own validation rows, or a file's."""

from nybble.data.examples import EncodedExample
from nybble.data.prepare import prepare
from nybble.data.readers import FieldNames
from nybble.errors import DataError
from nybble.evaluation.load_run import OpenRun
from nybble.training.session import prepare_data


def held_out_rows(opened: OpenRun, data: str | None = None) -> list[EncodedExample]:
    """The rows that the run did not train on, or all rows of `data`, encoded as the run encodes its own.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    config = opened.config
    if data is None:
        vocab_size = opened.source.config.get_text_config().vocab_size
        rows = prepare_data(config, opened.template, vocab_size).validation
    else:
        fields = FieldNames(config.prompt_field, config.completion_field, config.messages_field, config.text_field)
        rows = prepare(
            data, opened.template, max_seq_len=config.max_seq_len, fields=fields, validation_fraction=0
        ).train
    if not rows:
        raise DataError(
            f"{data or config.data} gives no held-out rows.", "At least one is needed.", "Give others with --data."
        )
    return rows
