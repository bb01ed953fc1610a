"""Runs `nybble ARGUMENTS` under a hard limit of memory: python benchmarks/limited.py BYTES ARGUMENTS

RLIMIT_DATA limits what a process may map for writing, resident or not, of which libraries map a good deal and never
touch it. So the limit is set once they are imported: to what is mapped then, and the bytes that are left of BYTES
beyond what is resident then. An allocation that goes beyond fails.
"""

import resource
import sys
from pathlib import Path

from nybble.cli.main import app


def status(key: str) -> int:
    """Bytes that Linux reports about this process under `key`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  # what a run imports, before the limit

    import nybble.evaluation.report  # noqa: F401

    limit = status("VmData") + int(sys.argv[1]) - status("RssAnon")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    app(sys.argv[2:], prog_name="nybble")


if __name__ == "__main__":
    main()
