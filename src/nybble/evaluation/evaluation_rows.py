"""Rows to judge a run by: its own validation rows, or a file's."""

from collections.abc import Sequence

from nybble.data.examples import EncodedExample
from nybble.data.field_names import field_names
from nybble.data.preference_rows import to_follow
from nybble.data.prepare import prepare, prepare_data
from nybble.data.row_kinds import row_kind
from nybble.data.sources import refuse_weights
from nybble.errors import DataError
from nybble.runs.open_run import OpenRun


def evaluation_rows(
    opened: OpenRun, data: Sequence[str] | None = None, allow: Sequence[str] = ()
) -> Sequence[EncodedExample]:
    """The answers to follow of `held_out_rows`; of preferences the chosen and the good ones."""
    return to_follow(held_out_rows(opened, data, allow))


def held_out_rows(
    opened: OpenRun, data: Sequence[str] | None = None, allow: Sequence[str] = ()
) -> Sequence[EncodedExample]:
    """The rows that the run did not train on, or all rows of `data`, encoded as the run encodes its own.

    Args:
        allow: ids of findings of the audit that may be in `data`.

    Raises:
        DataError: they cannot be read, there are none, or the audit finds an error in them.
    """
    own = opened.config.data
    kind = row_kind(opened.config.objective.objective, prompted=opened.source.task.prompted)
    if data is None:
        vocab_size = getattr(opened.source.config.get_text_config(), "vocab_size", None)
        rows = prepare_data(own, opened.template, vocab_size, kind=kind).validation
    else:
        refuse_weights(data, "all rows that a run is judged by are asked")
        fields, length = field_names(own), own.max_seq_len
        prepared = prepare(
            data, opened.template, max_seq_len=length, fields=fields, validation_fraction=0, allow=allow, kind=kind
        )
        prepared.audit.check("used to judge a run")
        rows = prepared.train
    if not rows:
        raise DataError(
            f"{', '.join(data or own.data)} gives no held-out rows.",
            "At least one is needed.",
            "Give others with --data.",
        )
    return rows
