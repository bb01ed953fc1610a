"""Templates get so much time and memory, and the process is as before afterwards."""

import resource
import signal
import sys
import time

import pytest

from nybble.data.limits import TimeIsUpError, limited


def test_an_endless_loop_ends_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TimeIsUpError), limited(0.05, 10**9):
        while True:
            pass
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


class BusyAtItsEnd:
    """Python only notes what is raised while it takes an object away."""

    def __del__(self):
        for _ in range(10_000_000):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_comes_while_an_object_is_taken_away_comes_again():
    give_up = time.thread_time() + 5
    with pytest.raises(TimeIsUpError), limited(0.05, 10**9):
        BusyAtItsEnd()
        while time.thread_time() < give_up:
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_huge_string_is_refused_and_the_limit_is_put_back():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), limited(5, 10_000_000):
        len("a" * 1_000_000_000)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with limited(5, 400_000_000):
        assert len("a" * 100_000_000) == 100_000_000
