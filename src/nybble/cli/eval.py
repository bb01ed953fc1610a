"""`nybble eval`."""

from typing import Any

from rich.console import Console

from nybble.config import EvalQualityConfig
from nybble.options import build_options


def quality(given: dict[str, Any]) -> int:
    """Compare ways of putting a model into four bits with the 16-bit model: KL, loss, likeliest token, size, time."""
    config = build_options(EvalQualityConfig, given)
    from nybble.evaluation.compare_arms import compare_arms

    compare_arms(config, Console())
    return 0
