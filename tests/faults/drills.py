"""Fault drills: what `make drills` does to runs, and what came of it, for docs/reliability.md.

    python tests/faults/drills.py                  # every drill, some 15 minutes on one core
    python tests/faults/drills.py kill --runs 20   # one drill, fewer repetitions

One process imports torch and nybble; every run that is to be killed, filled or starved is a fork of it, so that two
hundred runs do not pay two hundred imports. Kills and failing system calls are dealt by strace, which attaches to the
fork while it waits for its start signal. Each drill rewrites its own row of the table in docs/reliability.md.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny import make_data, make_model

from nybble.errors import NybbleError
from nybble.events import Event
from nybble.options.verbs import load_config
from nybble.runs.events import read_events
from nybble.sources.folder import FolderSource
from nybble.training.checkpoint import Checkpoint, Checkpoints, Position, Progress, newest_checkpoint
from nybble.training.objective import SupervisedFineTuning
from nybble.training.optimizer import AdamW
from nybble.training.session import train

REPORT = Path(__file__).parents[2] / "docs" / "reliability.md"
SEED = int(os.environ.get("DRILL_SEED", "0"))  # of the moments at which runs are killed
STEPS = int(os.environ.get("DRILL_STEPS", "40"))  # of the runs that are killed
INTERVAL = 4  # steps between checkpoints
WRITING = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "ftruncate", "mkdir", "unlink")
WRITING += ("unlinkat", "rmdir", "openat")
NOT_OF_THE_SAVE = ("exit_group", "exit")


def configured(workplace: Path, out: Path, **more: Any) -> Any:
    """Options of a short run on the tiny model, or with `resume=True` those of the run in `out`."""
    if more.get("resume"):
        return load_config(out / "config.yaml", {"out": str(out), **more})
    own = {"model": str(workplace / "model"), "data": str(workplace / "rows.jsonl"), "out": str(out), "threads": 1}
    own |= {"max_steps": STEPS, "rows_per_step": 4, "micro_batch_size": 2, "rank": 4, "lr": 5e-3, "eval_every": 7}
    return load_config(None, own | {"save_every": INTERVAL, "compute_dtype": "fp32"} | more)


def run(config: Any) -> None:
    train(config)


def adapter_sha256(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def in_fork(work: Callable[[], object], errors: Path) -> int:
    """Start `work` in a fork of this process; returns its id. Exit code 2 is a message for the user, 3 a traceback."""
    if pid := os.fork():
        return pid
    code = 3
    try:
        with errors.open("w") as stream:
            os.dup2(stream.fileno(), 2)
            try:
                work()
                code = 0
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 0
            except NybbleError as error:
                print(error, file=stream)
                code = error.exit_code
            except BaseException as error:
                print(f"Traceback: {error!r}", file=stream)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a fork, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- kill


def drill_kill(workplace: Path, runs: int) -> str:
    """SIGKILL at random times, each run one to three times, then resumed to its end."""
    whole = workplace / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    started = time.monotonic()
    code = wait(in_fork(lambda: run(configured(workplace, whole)), workplace / "errors"))
    assert code == 0, (code, (workplace / "errors").read_text())
    duration, expected = time.monotonic() - started, adapter_sha256(whole)
    draw, kills, lost, restarts, wrong = random.Random(SEED), 0, [0], 0, []
    out = workplace / "killed"
    for number in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(draw.randint(1, 3)):
            pid = in_fork(lambda: go_on(workplace, out), workplace / "errors")
            time.sleep(draw.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
            if wait(pid) != -signal.SIGKILL:
                break  # it had ended by itself
            kills += 1
            if not (out / "config.yaml").exists():
                restarts += 1
                continue
            if (out / "events.jsonl").exists():
                reached = max([event["step"] for event in whole_events(out, "step")], default=0)
                checkpoint = newest_checkpoint(out / "checkpoints", wrong.append)
                lost.append(reached - (checkpoint.step if checkpoint else 0))
        code = wait(in_fork(lambda: go_on(workplace, out), workplace / "errors"))
        if code != 0 or adapter_sha256(out) != expected:
            wrong.append(f"run {number}: exit {code}, {(workplace / 'errors').read_text()[:300]}")
    assert not wrong, wrong
    assert max(lost) <= INTERVAL, lost
    return (
        f"{runs} runs of {STEPS} steps, {kills} kills ({restarts} before training had begun): 0 unrecoverable, at most "
        f"{max(lost)} steps lost at a checkpoint every {INTERVAL}, every final adapter's SHA-256 as uninterrupted"
    )


def go_on(workplace: Path, out: Path) -> None:
    """What a user does after a crash: resume; begin again where nothing had begun."""
    run(configured(workplace, out, resume=(out / "config.yaml").exists()))


def whole_events(out: Path, kind: str) -> list[dict[str, Any]]:
    """Like `read_events`, without a last line that the kill cut off."""
    text = (out / "events.jsonl").read_text()
    (out / "whole-events.jsonl").write_text(text[: text.rfind("\n") + 1])
    return list(read_events(out / "whole-events.jsonl", kind))


# ---- one save under strace


class SaveUnderStrace:
    """A fork saves the checkpoint of step 2 where that of step 1 lies and must go; strace interferes.

    Args:
        workplace: for files.
    """

    def __init__(self, workplace: Path):
        self.workplace, self.folder = workplace, workplace / "saved" / "checkpoints"
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self.folder.mkdir(parents=True)
        torch.manual_seed(0)
        source = FolderSource(workplace / "model", "tiny")
        from nybble.layers.convert import attach_adapters, resolve_targets
        from nybble.sources.load import load_model

        self.model = load_model(source, None, torch.float32)
        attach_adapters(self.model, resolve_targets(self.model, "all-linear"), rank=2, alpha=4.0)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = AdamW(parameters, beta1=0.9, beta2=0.99, weight_decay=0.0)
        self.save(1)
        self.before = self.workplace / "before"
        shutil.rmtree(self.before, ignore_errors=True)
        shutil.copytree(self.folder, self.before)

    def save(self, step: int) -> None:
        from nybble.data.sampler import StepSampler
        from nybble.runs.trained import TrainedAdapters

        writer = Checkpoints(self.folder, save_every="1", keep=1, config="a: 1\n", about={"base": "b"}, settled={})
        position = Position.now(Progress(step, 1), StepSampler(5, 2, 0), torch.device("cpu"))
        writer.save(position, self.model, self.optimizer, TrainedAdapters({"r": 2}), 0)

    def run(self, *options: str) -> tuple[int, str]:
        """Exit code of the save, and strace's log."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.before, self.folder)
        log = self.workplace / "strace"
        go, tell = os.pipe()
        ready, say_ready = os.pipe()

        def work() -> None:
            os.write(say_ready, b"x")
            os.read(go, 1)
            self.save(2)

        pid = in_fork(work, self.workplace / "errors")
        os.close(say_ready)
        os.read(ready, 1)  # else what is injected may hit the fork's own file of errors
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        tracer = subprocess.Popen(["strace", "-f", "-o", str(log), "-p", str(pid), *options], **quiet)  # type: ignore[call-overload]
        while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
            assert tracer.poll() is None, "strace cannot attach"
            time.sleep(0.001)
        os.write(tell, b"x")
        code = wait(pid)
        tracer.wait()
        for end in (go, tell, ready):
            os.close(end)
        return code, log.read_text()

    def state(self) -> int:
        """The step of the newest checkpoint; fails where one that has its name does not verify."""
        problems: list[Event] = []
        found = newest_checkpoint(self.folder, problems.append)
        assert not problems and isinstance(found, Checkpoint), problems
        return found.step

    def calls(self) -> dict[str, int]:
        """System call -> how often an undisturbed save makes it, after its start signal."""
        code, log = self.run()
        assert code == 0, (self.workplace / "errors").read_text()
        names = re.findall(r"^\d+ +(\w+)\(", log, re.MULTILINE)
        return {name: names.count(name) for name in dict.fromkeys(names) if name not in NOT_OF_THE_SAVE}


def drill_syscalls(workplace: Path, runs: int) -> str:
    """SIGKILL at the entry of every system call of one save, up to `runs` of them."""
    save = SaveUnderStrace(workplace)
    cases = [(name, nth) for name, count in save.calls().items() for nth in range(1, count + 1)]
    outcome = {1: 0, 2: 0}
    for name, nth in spread(cases, runs):
        code, _ = save.run("-e", f"inject={name}:signal=SIGKILL:when={nth}")
        assert code == -signal.SIGKILL, (name, nth, code)
        outcome[save.state()] += 1
    total = sum(outcome.values())
    return (
        f"{total} of {len(cases)} system calls ({len({name for name, _ in cases})} kinds): old {outcome[1]}, "
        f"new {outcome[2]}, neither 0"
    )


def drill_io_errors(workplace: Path, runs: int) -> str:
    """EIO and ENOSPC from every call of a save that changes the disk, up to `runs` of each."""
    save = SaveUnderStrace(workplace)
    calls = {name: count for name, count in save.calls().items() if name in WRITING}
    cases = [(name, nth) for name, count in calls.items() for nth in range(1, count + 1)]
    clean = passed = 0
    for name, nth in spread(cases, runs):
        for error in ("EIO", "ENOSPC"):
            code, _ = save.run("-e", f"inject={name}:error={error}:when={nth}")
            message = (workplace / "errors").read_text()
            assert code in (0, 2) and "Traceback" not in message, (name, nth, error, code, message)
            clean, passed = clean + (code == 2), passed + (code == 0)
            save.state()
    kinds = ", ".join(f"{name} {count}" for name, count in calls.items())
    return (
        f"{clean + passed} failing calls ({kinds}; EIO and ENOSPC each): {clean} ended with a message and exit 2, "
        f"{passed} were survived by the libraries, a whole checkpoint was there every time"
    )


def spread(cases: list[Any], most: int) -> list[Any]:
    """All of them, or `most` evenly spread."""
    return cases if len(cases) <= most else [cases[i * len(cases) // most] for i in range(most)]


# ---- a disk that fills


def drill_disk(workplace: Path, runs: int) -> str:
    """A tmpfs is filled up in the middle of a run; once there is room again the run is resumed."""
    small, seconds = workplace / "small-disk", []
    small.mkdir(exist_ok=True)
    run(configured(workplace, workplace / "whole-disk", overwrite=True))
    out, filler = small / "run", small / "filler"
    for number in range(runs):
        with tmpfs(small, "8m"):
            pid = in_fork(lambda: run(configured(workplace, out, keep_checkpoints=1)), workplace / "errors")
            while not (out / "checkpoints" / f"step-{INTERVAL * (1 + number % 5)}").exists():
                time.sleep(0.002)
            started = time.monotonic()
            with filler.open("wb", buffering=0) as stream:
                try:
                    while True:
                        stream.write(bytes(4096))
                except OSError:
                    pass
            code = wait(pid)
            seconds.append(time.monotonic() - started)
            message = (workplace / "errors").read_text()
            assert code == 2 and "No space left" in message and "Traceback" not in message, (code, message)
            filler.unlink()
            code = wait(in_fork(lambda: go_on(workplace, out), workplace / "errors"))
            assert code == 0, (code, (workplace / "errors").read_text())
            assert adapter_sha256(out) == adapter_sha256(workplace / "whole-disk")
    return (
        f"{runs} runs: exit 2 with a message {max(seconds):.1f} s or less after the disk was full; all resumed to the "
        "uninterrupted run's bytes once there was room"
    )


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


# ---- damaged bytes


def drill_damage(workplace: Path, runs: int) -> str:
    """Single bits flipped, and every file cut at every 4 KiB, of a checkpoint and of a four-bit folder."""
    out, four_bit = workplace / "damaged", workplace / "four-bit"
    run(configured(workplace, out, overwrite=True, max_steps=2, save_every=2))
    if not four_bit.exists():
        from nybble.formats.quant_spec import BaseFormats
        from nybble.quantization.folder import quantize_folder

        quantize_folder(FolderSource(workplace / "model", "tiny"), BaseFormats(), four_bit)
    checkpoint = out / "checkpoints" / "step-2"

    def open_checkpoint() -> None:
        newest_checkpoint(checkpoint.parent)

    def open_folder() -> None:
        FolderSource(four_bit, "four-bit")

    flips = cuts = 0
    for folder, use in ((checkpoint, open_checkpoint), (four_bit, open_folder)):
        use()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        draw = random.Random(1)
        for number in range(runs):
            path = files[number % len(files)] if number % 2 else draw.choices(files, sizes)[0]
            content = path.read_bytes()
            bit = draw.randrange(8 * len(content))
            spoiled = bytearray(content)
            spoiled[bit // 8] ^= 1 << bit % 8
            path.write_bytes(spoiled)
            assert refuses(use), f"bit {bit} of {path} was flipped and nothing noticed"
            path.write_bytes(content)
            flips += 1
        for path, size in zip(files, sizes, strict=True):
            content = path.read_bytes()
            for length in range(0, size, 4096):
                os.truncate(path, length)
                assert refuses(use), f"{path} was cut to {length} bytes and nothing noticed"
                path.write_bytes(content)
                cuts += 1
        use()
    return (
        f"{flips} flipped bits and {cuts} truncations, half of the flips in files chosen by turn: all seen before use"
    )


def refuses(use: Callable[[], None]) -> bool:
    try:
        use()
    except NybbleError:
        return True
    return False


# ---- every step, and memory that runs out


def drill_every_step(workplace: Path, runs: int) -> str:
    """Resume after every step of a 30-step run, on both paths through the layers."""
    worst, resumes, paths = 0.0, 0, {"blocks": {}, "generic": {"dropout": 0.1, "keep": "nothing"}}
    for name, more in paths.items():
        whole = workplace / f"whole-{name}"
        run(configured(workplace, whole, overwrite=True, max_steps=30, save_every=1, keep_checkpoints=99, **more))
        expected = last_tensors(whole)
        for step in spread(list(range(1, 31)), runs):
            out = workplace / "resumed"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            for later in range(step + 1, 31):
                shutil.rmtree(out / "checkpoints" / f"step-{later}")
            run(configured(workplace, out, resume=True))
            got = last_tensors(out)
            assert got.keys() == expected.keys()
            worst = max(worst, *(float((got[key] - expected[key]).abs().max()) for key in got))
            resumes += 1
    assert worst == 0.0, worst
    return f"{resumes} resumes ({' and '.join(paths)} path): largest difference of adapter and moments {worst:g}"


def last_tensors(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = out / "checkpoints" / "step-30"
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "optimizer.safetensors")


def drill_memory(workplace: Path, runs: int) -> str:
    """An allocation really fails, in a random micro-batch: the fork may take no more memory than it has."""
    draw, original, halved = random.Random(2), SupervisedFineTuning.loss, 0
    out = workplace / "starved"
    for _ in range(runs):
        call, calls = draw.randrange(1, 2 * STEPS), []
        shutil.rmtree(out, ignore_errors=True)

        def starve(*arguments: Any, call: int = call, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == call:
                with address_space(64_000_000):
                    torch.empty(1_000_000_000)
            return original(*arguments)

        def work(starve: Any = starve) -> None:
            SupervisedFineTuning.loss = starve
            run(configured(workplace, out, save_every=1000))

        code = wait(in_fork(work, workplace / "errors"))
        steps = [event["step"] for event in read_events(out / "events.jsonl", "step")]
        events = list(read_events(out / "events.jsonl", "out-of-memory"))
        assert code == 0 and steps == list(range(1, STEPS + 1)), (code, (workplace / "errors").read_text())
        halved += len(events)
    assert halved == runs
    return f"{runs} runs of {STEPS} steps, one failing allocation each: every step taken once, none lost"


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """This process may take `more` bytes of address space and not a byte beyond."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ---- bad files, fuzzing


def drill_bad_files(workplace: Path, runs: int) -> str:
    """Every file of the corpus in a process of its own, its time and memory taken."""
    from corpus import all_cases

    worst_s, worst_bytes, over, cases = 0.0, 0, [], spread(all_cases(), runs)
    for case in cases:
        folder = workplace / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        arguments = case.build(folder, workplace / "model")
        file_bytes = max((p.stat().st_size for p in folder.rglob("*") if p.is_file()), default=0)
        pid = in_fork(lambda folder=folder, arguments=arguments: command_line(folder, arguments), workplace / "errors")
        peak = watch(pid, seconds=60)
        _, status, usage = os.wait4(pid, 0)
        code, message = os.waitstatus_to_exitcode(status), (workplace / "errors").read_text(errors="replace")
        assert code == 2 and re.search("^Error: ", message, re.MULTILINE), (case.name, code, message)
        assert "Traceback" not in message, (case.name, message)
        assert all(words in message for words in case.says), (case.name, message)
        seconds = usage.ru_utime + usage.ru_stime
        worst_s, worst_bytes = max(worst_s, seconds), max(worst_bytes, peak)
        if seconds > 5 or peak > 2 * file_bytes + 300_000_000:
            over.append((case.name, round(seconds, 1), peak, file_bytes))
    assert not over, over
    return (
        f"{len(cases)} files: 0 tracebacks, exit 2 and the file named every time; at most {worst_s:.1f} s of processor "
        f"time and {worst_bytes / 1e6:.0f} MB above the process's own"
    )


def command_line(folder: Path, arguments: list[str]) -> None:
    from nybble.cli.main import app

    os.chdir(folder)
    os.environ["NYBBLE_CACHE"] = str(folder / "cache")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    app(arguments)


def watch(pid: int, seconds: float) -> int:
    """Wait until a fork ends (it stays to be reaped); returns the most memory it held beyond what it began with."""
    start = peak = 0
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        assert time.monotonic() < deadline, f"hangs for {seconds} s"
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        if found:
            peak = int(found[1]) * 1024
            start = start or peak
        time.sleep(0.001)
    return peak - start


def drill_fuzz(workplace: Path, runs: int) -> str:
    """The fuzz tests with `runs` examples each."""
    tests = Path(__file__).parent / "test_fuzz.py"
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=0", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=os.environ | {"NYBBLE_FUZZ": str(runs)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return (
        f"safetensors header, GGUF header, rows, chat template: {runs} examples each, a value or a message every time"
    )


DRILLS: dict[str, tuple[Callable[[Path, int], str], int, str]] = {
    "kill": (drill_kill, 200, "SIGKILL at random times, resumed to the end"),
    "syscalls": (drill_syscalls, 10_000, "SIGKILL at every system call of one save"),
    "io-errors": (drill_io_errors, 10_000, "EIO and ENOSPC at every write, flush, rename of a save"),
    "disk": (drill_disk, 10, "a small disk that fills in the middle of a run"),
    "damage": (drill_damage, 2000, "flipped bits and truncations of a checkpoint and of a four-bit folder"),
    "every-step": (drill_every_step, 30, "resume after every step of a 30-step run"),
    "bad-files": (drill_bad_files, 10_000, "bad data, option, tokenizer, safetensors and GGUF files"),
    "fuzz": (drill_fuzz, 3000, "fuzzing of the readers"),
    "memory": (drill_memory, 50, "an allocation that fails in a random micro-batch"),
}


def report(name: str, title: str, result: str, seconds: float) -> None:
    """Replace the drill's row in docs/reliability.md."""
    row = f"| {title} | {result} | {seconds:.0f} s | <!-- {name} -->"
    text = REPORT.read_text(encoding="utf-8")
    pattern = rf"^\|.*<!-- {name} -->$"
    assert len(re.findall(pattern, text, re.MULTILINE)) == 1, f"{REPORT} needs one row for {name}"
    REPORT.write_text(re.sub(pattern, lambda match: row, text, flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=", ".join(DRILLS))
    parser.add_argument("--runs", type=int, help="repetitions; the report is written for full numbers only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="drills-") as folder:
        workplace = Path(folder)
        make_model(workplace / "model")
        make_data(workplace / "rows.jsonl")
        for name in given.drills or DRILLS:
            drill, runs, title = DRILLS[name]
            started = time.monotonic()
            result = drill(workplace, given.runs or runs)
            print(json.dumps({"drill": name, "result": result}), flush=True)
            if given.runs is None:
                report(name, title, result, time.monotonic() - started)


if __name__ == "__main__":
    main()
