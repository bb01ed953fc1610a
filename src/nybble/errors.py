"""The exceptions nybble raises for its users.

Every message says three things: what was got, what is allowed, and what to do. The command line
prints the message without a traceback and exits with the exception's `exit_code`.
Broken invariants inside nybble are `assert`s, not these.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

NO_MEMORY = (  # torch on CUDA and on the CPU, C++, oneDNN
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "could not create a memory object",
    "could not create a primitive",
)


class NybbleError(ValueError):
    """Base of every error a user can cause or mend.

    Args:
        got: what was found, with the file and place where there is one.
        allowed: what would have been accepted.
        fix: what the user can do now.
    """

    exit_code = 2

    def __init__(self, got: str, allowed: str = "", fix: str = ""):
        self.got, self.allowed, self.fix = got, allowed, fix
        super().__init__("\n".join(part for part in (got, allowed, fix) if part))


class ConfigError(NybbleError):
    """An option has an unknown name or a value that is not allowed."""


class ModelError(NybbleError):
    """A base model cannot be found, read or trusted."""


class DataError(NybbleError):
    """Examples cannot be read, or would not train what the user means."""


class FormatError(NybbleError):
    """Bytes on disk or in memory are not in the format they claim."""


class KernelError(NybbleError):
    """A kernel was asked for that this machine or build does not have."""


class RunError(NybbleError):
    """A run folder cannot be created, read or continued."""


class TrainingError(NybbleError):
    """Training had to stop: a loss or gradient was not finite."""


class ExportError(NybbleError):
    """A model cannot be written in the form that was asked for."""


class PlanError(NybbleError):
    """No plan fits the memory budget, or a run outgrew the plan it was given."""


@contextmanager
def foreign_errors(explain: Callable[[Exception], NybbleError]) -> Iterator[None]:
    """Around a call into another library that raises whatever it meets: `explain` says what that means for the user.

    A failed allocation is about this machine and not about what was read, so it stays what it is.
    """
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise explain(error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; libraries say so in a class of their own, or only in words."""
    words = str(error)
    return isinstance(error, MemoryError) or any(each in words for each in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with those that it announces: it ends in a colon then."""
    if isinstance(error, KeyError):
        return f"{error} is not known"
    first, *others = (line.strip() for line in str(error).strip().splitlines() or [""])
    for line in others:
        if not first.endswith(":"):
            break
        first = f"{first} {line}"
    return first
