"""Runs `nybble ARGUMENTS` under a hard limit of anonymous memory: python benchmarks/limited.py BYTES ARGUMENTS

What a budget is about is RssAnon, so that is what is limited: a thread reads it every two milliseconds and ends the
process with status 137 once it is beyond BYTES, as the system does to a container. RLIMIT_DATA would not do: it counts
what is mapped and never touched, of which oneDNN's compiled products have some hundreds of MB.
"""

import os
import sys
import threading
import time

from nybble.cli.main import app
from nybble.memory.measure import anonymous_bytes

INTERVAL_S = 0.002
KILLED = 137


def watch(limit: int) -> None:
    """End the process once it holds more than `limit` bytes."""
    while (held := anonymous_bytes()) <= limit:
        time.sleep(INTERVAL_S)
    print(f"limited.py: {held} bytes of anonymous memory, the limit is {limit}", file=sys.stderr, flush=True)
    os._exit(KILLED)


def main() -> None:
    threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()
    app(sys.argv[2:], prog_name="nybble")


if __name__ == "__main__":
    main()
