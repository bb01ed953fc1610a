"""`nybble.check_data`."""

from typing import TYPE_CHECKING, Any

from nybble.api.keywords import as_options
from nybble.events import Listener, silent
from nybble.network import fetching
from nybble.options.option import build_options
from nybble.options.verbs import DataConfig

if TYPE_CHECKING:
    from nybble.api.parts import TrainingData


def check_data(*, on_event: Listener = silent, **options: Any) -> "TrainingData":
    """Read what a training run would learn from, whatever is wrong with it.

    Args:
        on_event: told where a model is fetched.
        options: the flags of `nybble data check` with underscores. `model` and `data` are needed.

    Returns:
        The rows, and their audit: `audit.check()` raises what would stop a run, `audit.to_json()` is all of it.

    Raises:
        NybbleError: an option is wrong, or the model or the examples cannot be read.

    Example:
        >>> found = nybble.check_data(model=tiny, data="rows.jsonl")
        >>> found.audit.num_rows, found.train[0].supervised_tokens
        (40, 9)
    """
    config = build_options(DataConfig, as_options(options))
    from nybble.api.parts import TrainingData
    from nybble.data.row_kinds import row_kind
    from nybble.options.seq2seq import for_seq2seq
    from nybble.sources.open import open_model
    from nybble.sources.task import task_of

    with fetching(not config.model.offline):
        source = open_model(config.model.model, config.model.tokenizer, on_event, config.model.revision)
        source = source.for_task(task_of(config.objective.objective, source.config))
        if source.task.prompted:
            config = for_seq2seq(config)
        kind = row_kind(config.objective.objective, prompted=source.task.prompted)
        return TrainingData.read(config.data, source, kind)
