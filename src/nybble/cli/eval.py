"""`nybble eval`."""

from typing import Any

from rich.console import Console

from nybble.options.option import build_options
from nybble.options.verbs import EvalQualityConfig


def quality(given: dict[str, Any]) -> int:
    """Compare ways of putting a model into four bits with the 16-bit model: KL, loss, likeliest token, size, time."""
    config = build_options(EvalQualityConfig, given)
    from nybble.evaluation.compare_arms import compare_arms

    compare_arms(config, Console())
    return 0
