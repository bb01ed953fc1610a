"""Ctrl-C or SIGTERM once: finish the step and save. Ctrl-C twice: stop at once."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptOnce:
    """Context manager; `requested` becomes the first signal that arrives, a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "InterruptOnce":
        # Only the main thread may, and only it gets signals.
        watched = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._on_signal) for number in watched}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
