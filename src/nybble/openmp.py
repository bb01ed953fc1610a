"""How OpenMP's threads wait for one another, which has to be said before PyTorch loads the library.

Threads that meet at the end of a product spin for a while before they sleep. GNU's library spins some
milliseconds if nobody says otherwise: on cores that other programs share, a waiting thread then takes the time that
the thread it waits for needs (a step of a 135M model beside two busy programs took ten times as long as on quiet
cores). Waking a thread takes some microseconds, and the pieces of a step are longer: threads that sleep at once are no
slower on quiet cores, and within 1.3 times of what the cores can do at all beside other programs (lab notes).
"""

import os
import sys
from typing import Literal

VARIABLES = {"OMP_WAIT_POLICY": "passive"}
ALSO_SAID_BY = ("GOMP_SPINCOUNT",)  # GNU's own, which wins over the policy

Waiting = Literal["asleep", "given", "unknown"]
SENTENCES: dict[Waiting, str] = {
    "asleep": "threads sleep while they wait",
    "given": "as the environment says",
    "unknown": "as they come, which is slow beside other busy programs: torch was imported before nybble, so that it "
    f"cannot be set any more; import nybble first, or set {' '.join(f'{k}={v}' for k, v in VARIABLES.items())}",
}


def settle() -> Waiting:
    """Set how threads wait, unless the user did or it is too late; returns which of these it was.

    Child processes inherit it, as they do what a user sets.
    """
    if any(name in os.environ for name in (*VARIABLES, *ALSO_SAID_BY)):
        return "given"
    if "torch" in sys.modules:
        return "unknown"
    os.environ.update(VARIABLES)
    return "asleep"


waiting: Waiting = settle()
