"""In which `nybble compare` trains by one method: `python -m nybble.cli.method_process FILE [resume]`.

What ends it is its exit code; the last line that it prints says why.
"""

import sys
from pathlib import Path

import nybble
from nybble.cli.train import SIGNAL_EXIT_CODE
from nybble.errors import NybbleError


def main(settings: Path, resume: bool) -> int:
    """Train as a YAML file says, or go on."""
    try:
        trained = nybble.train(settings, resume=resume, overwrite=not resume)
    except NybbleError as error:
        print(" ".join(str(error).split()), flush=True)
        return error.exit_code
    return SIGNAL_EXIT_CODE + trained.interrupted if trained.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] == ["resume"]))
