"""`nybble eval` and `nybble eval quality`."""

from typing import Any

import nybble
from nybble.cli.lazy_terminal import LazyTerminal


def evaluate(given: dict[str, Any]) -> int:
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten; a report and a model card."""
    with LazyTerminal() as listener:
        nybble.evaluate(on_event=listener, **given)
    return 0


def quality(given: dict[str, Any]) -> int:
    """Compare ways of putting a model into four bits with the 16-bit model: KL, loss, likeliest token, size, time."""
    with LazyTerminal() as listener:
        nybble.evaluate_quality(on_event=listener, **given)
    return 0
