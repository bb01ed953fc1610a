"""Ctrl-C or SIGTERM once: finish the step and save. Ctrl-C twice: stop at once."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptOnce:
    """Context manager; `requested` becomes the first signal that arrives, a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "InterruptOnce":
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
