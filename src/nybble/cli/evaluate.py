"""`nybble eval`."""

from typing import Any

from nybble.options.option import build_options
from nybble.options.verbs import EvalConfig


def evaluate(given: dict[str, Any]) -> int:
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten; a report and a model card."""
    config = build_options(EvalConfig, given)
    from nybble.cli.render import Terminal
    from nybble.evaluation.evaluate import evaluate as run_evaluation

    with Terminal() as terminal:
        run_evaluation(config, terminal)
    return 0
