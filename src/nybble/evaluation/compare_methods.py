"""`nybble compare`: full fine-tuning, LoRA over 16 bits and QLoRA on one's own model and rows, by short runs.

Every method is a run of its own in a process of its own, one after the other: the peak of its memory is its own, and
its run can be opened afterwards. All take the same rows in the same order, and are asked about the same held-out rows
before and after. What does not fit is left out, with what it would have taken.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError, NybbleError, RunError
from nybble.evaluation.compare_arms import Arm, parse_arm
from nybble.events import Event, Listener, Note, Progress, silent
from nybble.files.disk import disk_errors, write_complete
from nybble.formats.format import DEFAULT_FORMAT
from nybble.options.option import build_options, fields_of, flat, yaml_key
from nybble.options.verbs import CompareConfig, PlanConfig, TrainConfig, config_text, settle_method
from nybble.pictures import picture
from nybble.planning.from_config import plan_from_config
from nybble.runs.events import read_events
from nybble.runs.folder import RunFolder
from nybble.training.interrupt import InterruptOnce

REPORT, PLOT, OPTIONS = "comparison.json", "comparison.png", "options.json"
HELD_OUT_ROWS = 64  # where the user does not say
NEVER = 10**9  # steps between evaluations: before the first and after the last they come in any case
POLL_S = 0.3
TITLES = {"full": "full fine-tuning", "lora": "LoRA, 16 bits"}


@dataclass(frozen=True)
class MethodResult:
    """What a method took and gave.

    Args:
        method: as `methods` names it.
        planned_bytes, peak_bytes: of memory at the peak, predicted and measured, the process itself included.
        tokens_per_s: of all steps but the first.
        tokens: that were trained on.
        loss_before, loss_after: of held-out rows, nats a supervised token.
        retention: how much of what full fine-tuning gained over the 16-bit base it gained over that; None where full
            fine-tuning gained nothing, or is not there.
        artefact_bytes: of what training leaves: the adapter, or the whole model.
        run: its folder.
    """

    method: str
    lr: float
    planned_bytes: int
    peak_bytes: int
    step_s: float
    tokens_per_s: float
    tokens: int
    loss_before: float
    loss_after: float
    artefact_bytes: int
    run: str
    retention: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """A method that does not fit, or cannot be.

    Args:
        planned_bytes: at the peak of its smallest plan; None where it came to none.
    """

    method: str
    reason: str
    planned_bytes: int | None


@dataclass(frozen=True)
class MethodsCompared(Event):
    """All methods have been tried; in `folder` lie the report, the picture and the runs.

    Args:
        interrupted: the signal that ended it early; the same options go on from there.
    """

    results: Sequence[MethodResult]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]
    folder: Path
    interrupted: signal.Signals | None = None

    def to_json(self) -> dict[str, Any]:
        """What `comparison.json` holds: bytes, seconds, nats."""
        methods, left_out = [asdict(each) for each in self.results], [asdict(each) for each in self.left_out]
        return {"methods": methods, "left_out": left_out, "notes": list(self.notes)}


def compare_methods(config: CompareConfig, report: Listener = silent) -> MethodsCompared:
    """Train by each method, or go on where an earlier call was interrupted, and compare.

    Raises:
        ConfigError: a method is not known, or the folder holds a comparison with other options.
        NybbleError: anything else the user can mend.
    """
    out = config.comparison.out
    arms = {name: _arm_options(config, name) for name in dict.fromkeys(config.comparison.methods)}
    results: list[MethodResult] = []
    left_out: list[LeftOut] = []
    refused = ("The comparison is not complete.", "Mend what is wrong; the same command goes on.")
    with disk_errors(out, RunError, *refused), InterruptOnce() as interrupt:
        _keep_options(config)
        for name, options in arms.items():
            found = _finished(name, options, out / _folder(name)) or _try(name, options, interrupt, report)
            if interrupt.requested:
                break
            if isinstance(found, LeftOut):
                left_out.append(found)
                report(Note(f"{name} is left out: {found.reason}"))
            elif found is not None:
                results.append(found)
                report(Note(f"{name}: held-out loss {found.loss_before:.4f} before, {found.loss_after:.4f} after"))
        notes = _notes(config, results)
        compared = MethodsCompared(_with_retention(results), left_out, notes, out, interrupt.requested)
        write_complete(out / REPORT, json.dumps(compared.to_json(), indent=2) + "\n")
        if results:
            _draw(out / PLOT, compared)
    report(compared)
    return compared


# ---- what each method is asked


def _arm_options(config: CompareConfig, name: str) -> dict[str, Any]:
    """The options of `nybble train` for one method.

    Raises:
        ConfigError: there is no such method, format or quality.
    """
    given: dict[str, Any] = {"validation_rows": HELD_OUT_ROWS}
    for group in (config.model, config.data, config.memory, config.machine):
        given |= _changed(group.model_dump(mode="json", exclude_none=True))
    own: dict[str, Any] = {"method": name, "lr": config.comparison.lr}
    adapters = {key: getattr(config.adapters, key) for key in config.adapters.model_fields_set}
    if name == "full":
        own |= {"lr": config.comparison.full_lr}
    elif name == "lora":
        own |= adapters
    else:
        arm = _arm_of(name)
        calibrated = config.calibration.model_dump(exclude_none=True) if arm.rounding == "calibrated" else {}
        own |= {"method": "qlora", "format": arm.format, "quality": arm.rounding} | adapters | calibrated
    own |= {"max_steps": config.loop.max_steps, "eval_every": NEVER, "keep_checkpoints": 1}
    return given | own | {"out": str(config.comparison.out / _folder(name))}


def _arm_of(name: str) -> Arm:
    """A format and a quality, as `nybble eval quality` reads them."""
    try:
        return parse_arm(name)
    except ConfigError as error:
        fix = f"For instance --methods full,lora,{DEFAULT_FORMAT}:absmax."
        raise ConfigError(f"methods names {name!r}.", f"Allowed: full, lora, or {error.allowed[9:]}", fix) from None


def _changed(given: dict[str, Any]) -> dict[str, Any]:
    """Without what is the default of `nybble train` anyway."""
    fields = fields_of(TrainConfig)
    return {name: value for name, value in given.items() if fields[name].is_required() or value != fields[name].default}


def _folder(name: str) -> str:
    return name.replace(":", "-")


def _keep_options(config: CompareConfig) -> None:
    """Write what is compared into the folder, or find the same there.

    Raises:
        ConfigError: it holds a comparison with other options, or something else.
    """
    out, file = config.comparison.out, config.comparison.out / OPTIONS
    options = {name: value for name, value in flat(config, "json").items() if name not in ("out", "methods", "threads")}
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            problem = f"{out} holds files, but no comparison."
            raise ConfigError(problem, "A comparison needs a new or empty folder.", "Choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_complete(file, json.dumps(options, indent=2) + "\n")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in options.items() if before.get(name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{file} is damaged: {error!r}.", "", "Choose another --out.") from error
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{out} holds a comparison with another {yaml_key(name)}: {before.get(name)} and not {options[name]}.",
            "A comparison goes on with the options that it began with; --methods may name others.",
            "Restore them, or choose another --out.",
        )


# ---- one method


def _try(
    name: str, options: dict[str, Any], interrupt: InterruptOnce, report: Listener
) -> MethodResult | LeftOut | None:
    """Plan it, train it, read what came of it; None where that was interrupted."""
    reason = _why_left_out(name, options)
    if reason is not None:
        return reason
    run = RunFolder(Path(options["out"]))
    settings = run.path.with_name(f"{run.path.name}.yaml")
    write_complete(settings, config_text(settle_method(build_options(TrainConfig, options))))
    log = run.path.with_name(f"{run.path.name}.log")
    resumes = any(run.checkpoints.glob("step-*"))
    code = _train(name, settings, log, run, options["max_steps"], resumes, interrupt, report)
    if interrupt.requested:
        return None
    if code:
        return LeftOut(name, _last_words(log, code), None)
    found = _finished(name, options, run.path)
    assert found is not None, name
    shutil.rmtree(run.checkpoints)  # nobody goes on with it, and of whole models they are large
    return found


def _why_left_out(name: str, options: dict[str, Any]) -> LeftOut | None:
    """None where it fits, as far as a plan says."""
    known = {key: value for key, value in options.items() if key in fields_of(PlanConfig)}
    try:
        plans, *_ = plan_from_config(build_options(PlanConfig, known))
    except NybbleError as error:
        return LeftOut(name, error.got, None)
    if plans.chosen is not None:
        return None
    smallest = plans.smallest
    return LeftOut(name, plans.reason(smallest).sentence, smallest.peak_bytes)


def _train(
    name: str,
    settings: Path,
    log: Path,
    run: RunFolder,
    steps: int,
    resumes: bool,
    interrupt: InterruptOnce,
    report: Listener,
) -> int:
    """Train in a process of its own; its exit code.

    An interrupt is handed on: the other process, in a group of its own, finishes its step and saves.
    """
    command = [sys.executable, "-m", "nybble.cli.method_process", str(settings)]
    report(Progress(name, 0, steps))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command + ["resume"] * resumes, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not interrupt.requested:
                time.sleep(POLL_S)
                report(Progress(name, min(_last_step(run), steps - 1), steps))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait()
    report(Progress(name, steps, steps))
    return process.returncode


def _last_step(run: RunFolder) -> int:
    """Of the run so far, as its log says; 0 before the first."""
    if not run.events.is_file():
        return 0
    lines = run.events.read_bytes().split(b"\n")[:-1]
    steps = (json.loads(line)["step"] for line in reversed(lines) if line.startswith(b'{"event": "step"'))
    return next(steps, 0)


def _last_words(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"it ended with {code}: {lines[-1]}" if lines else f"it ended with {code}"


def _finished(name: str, options: dict[str, Any], folder: Path) -> MethodResult | None:
    """What a finished run of this method took and gave; None where there is none.

    Raises:
        RunError: what its folder says of it is damaged.
    """
    run = RunFolder(folder)
    if not run.plan.is_file():
        return None
    try:
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
        ended = list(read_events(run.events, "end"))
        steps, losses = list(read_events(run.events, "step")), list(read_events(run.events, "eval"))
        if not ended or ended[-1]["interrupted"] or ended[-1]["steps"] < options["max_steps"]:
            return None
        taken = steps[1:] or steps
        return MethodResult(
            name,
            options["lr"],
            int(plan["chosen"]["peak_bytes"]),
            int(plan["measured"]["peak_bytes"]),
            plan["measured"]["step_s"],
            sum(step["tokens"] for step in taken) / sum(step["step_s"] for step in taken),
            sum(step["tokens"] for step in steps),
            losses[0]["loss"],
            losses[-1]["loss"],
            sum(file.stat().st_size for file in run.trained(name == "full").glob("*.safetensors")),
            str(folder),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{folder} is damaged: {error!r}.", "", "Remove that folder; it is trained again.") from error


# ---- what is made of them


def _with_retention(results: Sequence[MethodResult]) -> list[MethodResult]:
    """(loss of the 16-bit base - loss after) / (that of full fine-tuning)."""
    full = next((found for found in results if found.method == "full"), None)
    if full is None or not full.loss_after < full.loss_before:
        return list(results)
    gained = full.loss_before - full.loss_after
    return [replace(found, retention=(full.loss_before - found.loss_after) / gained) for found in results]


def _notes(config: CompareConfig, results: Sequence[MethodResult]) -> list[str]:
    steps, rows = config.loop.max_steps, config.memory.rows_per_step
    notes = [f"{steps} steps of {rows} rows each, the same rows in the same order, one method after the other"]
    if len({found.tokens for found in results}) > 1:
        notes.append("the methods met different numbers of tokens: their rows are not the same")
    notes.append("retention: what it gained over the base in 16 bits as a share of what full fine-tuning gained")
    return notes


def _draw(path: Path, compared: MethodsCompared) -> None:
    """Held-out loss by memory at the peak, measured and planned."""
    with picture(path, "memory at the peak, GB", "held-out loss, nats a token", fitted=True) as axes:
        for number, found in enumerate(compared.results):
            color = f"C{number}"
            label = f"{TITLES.get(found.method, 'QLoRA, ' + found.method)}: {found.tokens_per_s:.0f} tokens/s"
            axes.plot(found.peak_bytes / 1e9, found.loss_after, "o", color=color, label=label)
            axes.plot(found.planned_bytes / 1e9, found.loss_after, "|", color=color, markersize=12)
        base = [found.loss_before for found in compared.results if found.method in TITLES]
        if base:
            axes.axhline(base[0], color="gray", linestyle=":", label="base in 16 bits")
        axes.plot([], [], "|", color="gray", markersize=12, label="planned")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
