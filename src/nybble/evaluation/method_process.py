"""In which `nybble compare` trains by one method: `python -m nybble.evaluation.method_process FILE [resume]`.

What ends it is its exit code; the last line that it prints says why.
"""

import sys
from pathlib import Path

from nybble.errors import NybbleError
from nybble.options.verbs import load_config
from nybble.training.session import train

SIGNAL_EXIT_CODE = 128  # plus the signal's number, as shells count it


def main(settings: Path, resume: bool) -> int:
    """Train as a YAML file says, or go on."""
    try:
        trained = train(load_config(settings, {"resume": True} if resume else {"overwrite": True}))
    except NybbleError as error:
        print(" ".join(str(error).split()), flush=True)
        return error.exit_code
    return SIGNAL_EXIT_CODE + trained.interrupted if trained.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] == ["resume"]))
