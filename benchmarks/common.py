"""What the benchmark programs share: contenders in processes of their own, paired ratios, the machine, the records.

Neither nybble nor torch is imported here, since the peers' virtual environment has no nybble. Processor time and
memory are read from /proc: Linux only.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE_SHARE = 0.02  # of one core: what a contender may use while another is measured
QUIET_SHARE = 0.10  # of one core: less than this by others is a quiet machine
DISTURBED_SHARE = 0.20  # of one core: a round in which others used more does not count...
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how OpenMP's threads wait: nybble sets it for itself alone
FEWEST_ROUNDS = 2  # ...unless fewer than these are left


# ---- options -------------------------------------------------------------------------------------


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds; nothing is saved")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds ({rounds})")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender (all cores)")
    parser.add_argument("--wait", type=float, default=300, help="most seconds to wait for a quiet machine (300)")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results")
    return parser


def model_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options of programs that run whole models against the peers."""
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model, as for `nybble train`")
    parser.add_argument("--data", default="builtin:pydoc", help="questions and answers, as for `nybble train`")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="the peers' Python")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench", help="for models and logs")
    return parser


# ---- contenders ----------------------------------------------------------------------------------


class Channel:
    """A contender's end: JSON lines, requests on standard input, answers on standard output.

    Whatever libraries print goes to standard error.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)

    def receive(self) -> dict[str, Any]:
        """The next request; the process ends when there are no more."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        request: dict[str, Any] = json.loads(line)
        return request


class Contender:
    """A long-lived process that answers one request at a time and sleeps in between.

    Args:
        name: for people.
        command: Python and script; settings are appended as JSON.
        log: file for what it prints.
        waiting: how OpenMP's threads wait. What this process was given, or set for itself, is not passed on.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        settings: dict[str, Any],
        threads: int,
        log: Path,
        waiting: Mapping[str, str] | None = None,
    ):
        self.name, self.log = name, log
        variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*map(str, command), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=inherited | variables | dict(waiting or {}),
            )
        started = time.perf_counter()
        self.hello = self._answer()
        self.start_s = time.perf_counter() - started

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}; it printed {self.log}.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S  # utime and stime

    def peak_rss_bytes(self) -> int:
        """Most memory that was resident, file-backed pages included."""
        return _status_bytes(self.process.pid, "VmHWM")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _status_bytes(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024


Answer = dict[str, Any]


@dataclass
class Turns:
    """Measurements of contenders that take turns, in alternating order; a ratio comes from pairs of one round.

    Args:
        patience_s: seconds that may be spent, in all, on waiting for a quiet machine before a round.
        rounds: the answers of each round by contender, each with its "seconds".
        foreign: share of one core that other processes used, the most in any turn of the round.
        idle: the same of contenders whose turn it was not, one a turn.
    """

    patience_s: float = 0.0
    rounds: list[dict[str, Answer]] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)

    def take(self, turns: Mapping[str, Callable[[], Answer]], cpu_seconds: Callable[[], dict[str, float]]) -> None:
        """One round: call each. `cpu_seconds` tells what the measured processes, by name, have used so far."""
        started = time.monotonic()
        if self.patience_s > 0:
            wait_for_quiet(self.patience_s)
            self.patience_s -= time.monotonic() - started
        answers, foreign = {}, []
        for name in turns if len(self.rounds) % 2 else reversed(turns):
            before, total, started = cpu_seconds(), _busy_seconds(), time.perf_counter()
            answers[name] = turns[name]()
            wall, total = time.perf_counter() - started, _busy_seconds() - total
            used = {process: now - before[process] for process, now in cpu_seconds().items()}
            foreign.append(max(0.0, total - sum(used.values())) / wall)
            self.idle.append(sum(used[other] for other in turns if other != name and other in used) / wall)
        self.rounds.append(answers)
        self.foreign.append(max(foreign))

    def ask(self, contenders: Sequence[Contender], **request: Any) -> None:
        """One round of the same request to each."""
        turns = {contender.name: partial(contender.ask, **request) for contender in contenders}
        self.take(turns, lambda: {contender.name: contender.cpu_seconds() for contender in contenders})

    def quiet_rounds(self) -> list[int]:
        """Rounds in which others kept still; all of them where those are too few."""
        quiet = [i for i, share in enumerate(self.foreign) if share < DISTURBED_SHARE]
        return quiet if len(quiet) >= FEWEST_ROUNDS else list(range(len(self.rounds)))

    def seconds(self, name: str) -> list[float]:
        return [self.rounds[i][name]["seconds"] for i in self.quiet_rounds()]

    def ratio(self, name: str, to: str) -> "Spread":
        """How many times as long `name` takes as `to`."""
        return Spread.of([a / b for a, b in zip(self.seconds(name), self.seconds(to), strict=True)])

    def load(self) -> dict[str, Any]:
        """What else ran, for the record.

        Raises:
            SystemExit: waiting contenders kept a core busy, so that the figures are worth nothing.
        """
        idle = statistics.median(self.idle)
        if idle > IDLE_SHARE:
            raise SystemExit(f"Waiting contenders used {idle:.1%} of a core while others were measured.")
        kept = self.quiet_rounds()
        return {
            "rounds used": f"{len(kept)} of {len(self.rounds)} (in the others, other work disturbed)",
            "others' share of a core": statistics.median(self.foreign[i] for i in kept),
            "waiting contenders' share": idle,
        }

    def record(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "foreign": self.foreign}


class Spread(NamedTuple):
    median: float
    low: float  # the quartiles
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median, low, high)

    def show(self, digits: int = 2, unit: str = "") -> str:
        """`1.23 (1.20 to 1.31)`."""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f} to {self.high:.{digits}f})"


# ---- the machine ---------------------------------------------------------------------------------


def _busy_seconds() -> float:
    """Processor time of all cores not spent idle, since boot."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def wait_for_quiet(most_s: float) -> float:
    """Wait until others use less than a tenth of a core, `most_s` at most; returns what they use now."""
    deadline = time.monotonic() + most_s
    while True:
        started, busy = time.perf_counter(), _busy_seconds()
        time.sleep(1)
        share = (_busy_seconds() - busy) / (time.perf_counter() - started)
        if share < QUIET_SHARE or time.monotonic() > deadline:
            return share
        time.sleep(3)


def about_machine(threads: int) -> dict[str, Any]:
    """Where and when, for the record."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": threads,
        "load_average_before": os.getloadavg()[0],
    }


def commit() -> str | None:
    """Of the code that is measured, and whether the sources differ from it; None where they are not in git."""

    def git(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return None
    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py").stdout.strip()
    return head.stdout.strip() + (" with changes" if changed else "")


def versions(*modules: str) -> dict[str, str]:
    """Python's and the modules' versions in this process."""
    return {"python": platform.python_version()} | {m: importlib.import_module(m).__version__ for m in modules}


# ---- records -------------------------------------------------------------------------------------


class Table(NamedTuple):
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"{self.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(
    arguments: argparse.Namespace, name: str, title: str, about: dict[str, Any], tables: Sequence[Table], samples: Any
) -> None:
    """Print the tables; unless this is a quick run, keep them and every sample in the results folder."""
    described = "\n".join(f"- {key}: {_plain(value)}" for key, value in about.items())
    text = f"# {title}\n\n" + "\n".join(table.markdown() for table in tables) + f"\n{described}\n"
    print(text)
    if arguments.quick:
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{name}.md").write_text(text)
    record = {"title": title, "about": about, "tables": [table._asdict() for table in tables], "samples": samples}
    (arguments.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
