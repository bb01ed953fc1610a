"""`nybble merge` and `nybble export`."""

from typing import Any

import nybble
from nybble.cli.lazy_terminal import LazyTerminal

EXIT_CODES = {"verified": 0, "failed": 3, "undecided": 4}


def merge(given: dict[str, Any]) -> int:
    """Merge a run's adapter into its base, verified against the run before it is called done; or adapters into one."""
    with LazyTerminal() as listener:
        if given.get("compare") or given.get("adapters"):
            nybble.merge(on_event=listener, **given)
            return 0
        return EXIT_CODES[nybble.merge(on_event=listener, **given).outcome]


def export(given: dict[str, Any]) -> int:
    """Write a run for other programs (PEFT, transformers, bitsandbytes, llama.cpp), verified in them."""
    with LazyTerminal() as listener:
        return EXIT_CODES[nybble.export(on_event=listener, **given).outcome]
