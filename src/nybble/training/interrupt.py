"""Ctrl-C once: finish the step and save. Twice: stop at once."""

import signal
from types import FrameType, TracebackType


class InterruptOnce:
    """Context manager; `requested` turns true at the first SIGINT, the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "InterruptOnce":
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)
