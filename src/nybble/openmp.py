"""How OpenMP's threads wait for one another, which has to be said before PyTorch loads the library.

Threads that meet at the end of a product spin for a while before they sleep. GNU's library spins some
milliseconds if nobody says otherwise: on cores that other programs share, a waiting thread then takes the time that
the thread it waits for needs (a step of a 135M model beside two busy programs took ten times as long as on quiet
cores). Nobody has to spin that long: the pieces of a step are short, and waking a thread takes some microseconds.
"""

import os
import sys
from typing import Literal

# A few microseconds, meant to cover the barriers within a token; benchmarks/bench_busy.py compares other numbers.
SPINS = 1000
VARIABLES = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}  # any OpenMP; GNU's, which spins even then

Waiting = Literal["short", "given", "unknown"]
SENTENCES: dict[Waiting, str] = {
    "short": "threads spin briefly, then sleep",
    "given": "as the environment says",
    "unknown": "as they come, which is slow beside other busy programs: torch was imported before nybble, so that it "
    f"cannot be set any more; import nybble first, or set {' '.join(f'{k}={v}' for k, v in VARIABLES.items())}",
}


def settle() -> Waiting:
    """Set how threads wait, unless the user did or it is too late; returns which of these it was.

    Child processes inherit it, as they do what a user sets.
    """
    if any(name in os.environ for name in VARIABLES):
        return "given"
    if "torch" in sys.modules:
        return "unknown"
    os.environ.update(VARIABLES)
    return "short"


waiting: Waiting = settle()
