"""`nybble eval`."""

from typing import Any

from rich.console import Console

from nybble.options.option import build_options
from nybble.options.verbs import EvalConfig


def evaluate(given: dict[str, Any]) -> int:
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten; a report and a model card."""
    config = build_options(EvalConfig, given)
    from nybble.evaluation.evaluate import evaluate as run_evaluation

    return run_evaluation(config, Console())
