"""Whether anything may be fetched. `--offline` says no for as long as its verb works."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OFFLINE: ContextVar[bool] = ContextVar("offline", default=False)


@contextmanager
def fetching(allowed: bool) -> Iterator[None]:
    """Let nothing be fetched meanwhile, unless it is allowed, and was before."""
    before = _OFFLINE.set(_OFFLINE.get() or not allowed)
    try:
        yield
    finally:
        _OFFLINE.reset(before)


def may_fetch() -> bool:
    """Whether what is not on this machine may be fetched. What the hub's client reads from its environment
    (HF_HUB_OFFLINE) comes on top of it.
    """
    return not _OFFLINE.get()
