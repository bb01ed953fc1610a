"""`nybble.evaluate`."""

from typing import TYPE_CHECKING, Any

from nybble.api.keywords import RunLike, as_options
from nybble.events import Listener, silent
from nybble.options.option import build_options
from nybble.options.verbs import EvalConfig

if TYPE_CHECKING:
    from nybble.evaluation.evaluate import Evaluation


def evaluate(run: RunLike | None = None, *, on_event: Listener = silent, **options: Any) -> "Evaluation":
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten of general text.

    The report is written to the run's folder `report/`, the model card beside its adapter.

    Args:
        run: what `nybble.train` or `nybble.open_run` returned, or the path of its folder.
        on_event: told what happens, as it happens.
        options: the flags of `nybble eval` with underscores.

    Returns:
        What was measured: `loss(arm)` in nats a supervised token with its interval, `change(arm)`, `score(arm,
        metric)`, for the arms "tuned", "base, as trained on" and "base, 16 bits"; `to_json()` is report.json.

    Raises:
        NybbleError: there is no such run, its base is another now, or there are no rows to judge it by.

    Example:
        >>> found = nybble.evaluate(run, answers=1)
        >>> found.loss("tuned").value < found.loss("base, as trained on").value
        True
    """
    config = build_options(EvalConfig, as_options({"run": run} | options))
    from nybble.evaluation.evaluate import evaluate as run_evaluation

    return run_evaluation(config, on_event)
