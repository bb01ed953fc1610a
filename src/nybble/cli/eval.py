"""`nybble eval quality`."""

from typing import Any

from nybble.options.option import build_options
from nybble.options.verbs import EvalQualityConfig


def quality(given: dict[str, Any]) -> int:
    """Compare ways of putting a model into four bits with the 16-bit model: KL, loss, likeliest token, size, time."""
    config = build_options(EvalQualityConfig, given)
    from nybble.cli.render import Terminal
    from nybble.evaluation.compare_arms import compare_arms

    with Terminal() as terminal:
        compare_arms(config, terminal)
    return 0
