"""Trackers are told what `events.jsonl` says, and cannot stop a run. Their libraries are stood in for by modules of
the same calls; the slow test asks the real ones.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from short_runs import resume, tensors_after
from tiny import make_data
from typed import typed

from nybble.events import Event, Note
from nybble.files.disk import write_complete
from nybble.options.verbs import load_config
from nybble.runs.events import read_events
from nybble.runs.folder import RunFolder
from nybble.training import tracking as tracking_module
from nybble.training.events import HeldOutLoss, RunMeasured, Step, TrainingBegun, TrainingEnded
from nybble.training.session import train
from nybble.training.tracking import Tracking

TESTS = Path(__file__).parents[1]
ENVIRONMENT = TESTS.parent / ".venv-trackers"
READER = Path(__file__).with_name("read_trackers.py")
STEPS = 4


class Calls(list[tuple[str, Any]]):
    """What a stand-in was asked for: names of functions and their arguments, positional ones under "at"."""

    def __call__(self, name: str, answer: Any = None, failing: BaseException | None = None) -> Callable[..., Any]:
        def called(*at: Any, **named: Any) -> Any:
            self.append((name, {"at": at, **named} if at else named))
            if failing is not None:
                raise failing
            return answer

        return called

    def of(self, name: str) -> list[Any]:
        return [arguments for called, arguments in self if called == name]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    run = SimpleNamespace(log=calls("log"), finish=calls("finish"))
    stand_in(monkeypatch, "trackio", init=calls("init", run))
    return calls


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    summary = SimpleNamespace(update=calls("summary"))
    run = SimpleNamespace(log=calls("log"), finish=calls("finish"), define_metric=calls("axis"), summary=summary)
    setup = SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    settings = {"Settings": dict, "setup": lambda: setup, "login": calls("login", False)}
    stand_in(monkeypatch, "wandb", init=calls("init", run), **settings)
    calls.setup = setup  # type: ignore[attr-defined]
    return calls


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """It keeps the runs that it makes, and finds them by their tag."""
    calls, runs = Calls(), dict[str, Any]()

    def create(experiment: str, tags: dict[str, str], run_name: str) -> Any:
        runs[tags["nybble.id"]] = SimpleNamespace(info=SimpleNamespace(run_id=f"run {len(runs)} {run_name}"))
        return runs[tags["nybble.id"]]

    def search(experiments: list[str], filter: str) -> list[Any]:
        return [run for id, run in runs.items() if filter == f"tags.`nybble.id` = '{id}'"]

    client = SimpleNamespace(
        get_experiment_by_name=calls("experiment"), create_experiment=calls("create_experiment", "7"),
        create_run=create, search_runs=search, update_run=calls("update"), log_batch=calls("batch"),
        set_terminated=calls("terminated"),
    )  # fmt: skip
    stand_in(monkeypatch, "mlflow", MlflowClient=lambda: client)
    stand_in(monkeypatch, "mlflow.entities", Metric=lambda *at: at, Param=lambda *at: at)
    return calls


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    writer = SimpleNamespace(add_scalar=calls("scalar"), add_text=calls("text"), close=calls("close"))
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=calls("open", writer))
    return calls


def options(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    own = {"model": str(model), "data": str(data), "out": str(out), "max_steps": STEPS, "rows_per_step": 4, "rank": 2}
    return own | {"lr": 5e-3, "compute_dtype": "fp32", "save_every": 1, "keep_checkpoints": 9, "eval_every": 2} | more


def logged(events: Path) -> list[tuple[dict[str, float], int]]:
    """What a tracker has to be told of a log."""
    told = []
    for event in read_events(events):
        of = {"step": "train", "eval": "eval"}.get(event.pop("event"))
        if of is not None:
            step = event.pop("step")
            told.append(({f"{of}/{name}": figure for name, figure in event.items()}, step))
    return told


def test_a_run_is_tracked_and_gone_on_with_and_a_failing_tracker_changes_nothing(
    trackio: Calls, wandb: Calls, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    run = sys.modules["wandb"].init()
    run.log = wandb("log", failing=SystemExit("the network is down"))
    tracked = options(tiny_model, data, tmp_path / "tracked", max_steps=2, track="trackio,wandb", track_project="sums")
    train(load_config(None, tracked))
    resume(tmp_path / "tracked", allow_change="config", max_steps=STEPS)
    train(load_config(None, options(tiny_model, data, tmp_path / "plain", max_steps=2)))
    resume(tmp_path / "plain", allow_change="config", max_steps=STEPS)
    assert tensors_after(tmp_path / "tracked", STEPS) == tensors_after(tmp_path / "plain", STEPS)

    first, second = trackio.of("init")
    assert first["at"] == second["at"] and first["at"][0] == "sums" and first["at"][1].startswith("tracked-")
    assert (first["resume"], second["resume"]) == ("never", "allow")
    assert first["config"]["rank"] == 2 and first["config"]["micro_batch_size"] is not None, "as settled"
    told = [(call["at"][0], call["step"]) for call in trackio.of("log")]
    finals = [figures for figures, _ in told if "final/steps" in figures]
    assert [final["final/steps"] for final in finals] == [2, STEPS] and len(trackio.of("finish")) == 2
    assert finals[-1]["final/loss_after"] < finals[-1]["final/loss_before"]
    assert [each for each in told if each[0] not in finals] == logged(tmp_path / "tracked" / "events.jsonl")
    assert {step for _, step in told} == {0, 1, 2, 3, 4}

    said = [note["sentence"] for note in read_events(tmp_path / "tracked" / "events.jsonl", "note")]
    assert [sentence for sentence in said if "the network is down" in sentence] == [
        "wandb no longer tracks the run, which goes on: SystemExit: the network is down"
    ] * 2, "once a session"
    assert not wandb.of("finish") and len({each["id"] for each in wandb.of("init")[1:]}) == 1


def heard(names: str, folder: Path, *events: Event, status: type[BaseException] | None = None) -> list[str]:
    """What a tracking run says of these events."""
    notes: list[Event] = []
    folder.mkdir(exist_ok=True)
    tracking = Tracking(names.split(","), None, RunFolder(folder), notes.append)
    with tracking:
        for event in events:
            tracking(event)
            if status is not None and isinstance(event, Step):
                tracking.__exit__(status)
                return [note.sentence for note in notes if isinstance(note, Note)]
    return [note.sentence for note in notes if isinstance(note, Note)]


STEP = Step(3, 2.5, 1e-3, 0.5, 100, 50, 0.1, 1000.0, 10**6, {"rewards/margins": 0.25})
BEGUN = TrainingBegun(3, 2, {"rank": 4, "lora_plus_ratio": 1.0})
ENDED = (
    STEP,
    HeldOutLoss(3, 2.25, 60, metrics={"accuracy": 0.5}),
    TrainingEnded(3, False, 10**6),
    RunMeasured(3, 1.0, 10**6, 10**6, 0.1, 0.2, 3.0, 2.25),
)


def test_each_tracker_gets_steps_options_and_the_end(
    wandb: Calls, mlflow: Calls, tensorboard: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    folder = tmp_path / "run 1"
    said = heard("wandb,mlflow,tensorboard,wandb", folder, BEGUN, *ENDED)
    assert said == [
        "tracked by wandb: run run 1 of project mine",
        "tracked by mlflow: run run 1 of experiment nybble",
        f"tracked by tensorboard: tensorboard --logdir '{folder}/tensorboard'",
    ]
    [begun] = wandb.of("init")
    assert (begun["project"], begun["name"], begun["config"]) == ("mine", "run 1", BEGUN.options)
    assert wandb.of("axis") == [{"at": ("*",), "step_metric": "step"}]
    step, held_out = (call["at"][0] for call in wandb.of("log"))
    assert step["step"] == 3 and step["train/loss"] == 2.5 and step["train/rewards/margins"] == 0.25
    assert held_out == {"step": 3, "eval/loss": 2.25, "eval/supervised_tokens": 60, "eval/accuracy": 0.5}
    assert wandb.of("summary")[0]["at"][0].items() >= {"final/loss_after": 2.25, "status": "finished"}.items()
    assert wandb.of("finish") == [{"exit_code": 0}]

    options, first, second, final = mlflow.of("batch")
    assert options == {"at": ("run 0 run 1",), "params": [("rank", "4"), ("lora_plus_ratio", "1.0")]}
    assert {(name, figure, at) for name, figure, _, at in second["metrics"]} >= {("eval/accuracy", 0.5, 3)}
    assert {(name, at) for name, _, _, at in first["metrics"]} >= {("train/lr", 3), ("train/rewards/margins", 3)}
    assert {(name, figure) for name, figure, *_ in final["metrics"]} >= {("final/peak_bytes", 10**6)}
    assert mlflow.of("terminated") == [{"at": ("run 0 run 1", "FINISHED")}]

    assert tensorboard.of("open")[0] == {"at": (folder / "tensorboard",), "purge_step": 3, "flush_secs": 10}
    assert "lora-plus-ratio: 1.0" in tensorboard.of("text")[0]["at"][1]
    assert {call["at"] for call in tensorboard.of("scalar")} >= {("train/loss", 2.5, 3), ("eval/loss", 2.25, 3)}
    assert tensorboard.of("text")[1]["at"] == ("status", "finished", 3) and len(tensorboard.of("close")) == 1

    heard("wandb,mlflow", folder, BEGUN, STEP, status=KeyboardInterrupt)  # goes on, and is stopped
    assert wandb.of("init")[1]["id"] == begun["id"], "the folder keeps it"
    assert [each["at"] for each in mlflow.of("update")] == [("run 0 run 1",)] and len(mlflow.of("batch")[4:]) == 2
    assert mlflow.of("terminated")[1]["at"][1] == "KILLED"
    heard("wandb,mlflow", folder, TrainingBegun(3), STEP, status=ValueError)  # a new run in its place
    assert wandb.of("init")[2]["id"] != begun["id"] and wandb.of("finish")[2] == {"exit_code": 1}
    assert mlflow.of("terminated")[2]["at"] == ("run 1 run 1", "FAILED")
    heard("wandb", folder, TrainingEnded(0, True, 1))  # interrupted before the first step
    assert len(wandb.of("init")) == 3


def test_a_tracker_that_hangs_is_waited_for_so_long(
    trackio: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_module, "FINISH_S", 0.2)
    monkeypatch.setattr(tracking_module, "SOON_S", 0.05)
    goes_on = threading.Event()
    sys.modules["trackio"].init().log = lambda figures, step: goes_on.wait(10)
    said = heard("trackio", tmp_path, BEGUN, *ENDED)
    goes_on.set()
    assert said[1:] == [
        "waiting for trackio to take what is left, 0.2 s at most",
        "trackio has not taken everything; the run folder has it",
    ]


def test_an_id_that_is_damaged_is_made_anew(trackio: Calls, tmp_path: Path) -> None:
    write_complete(RunFolder(tmp_path).tracking_id, "what?\n")
    heard("trackio", tmp_path, BEGUN)
    assert len(RunFolder(tmp_path).tracking_id.read_text()) == 33


def test_a_tracker_that_is_not_there_is_refused_before_anything(
    tiny_model: Path, data: Path, tmp_path: Path, wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    train = ("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run")
    result = typed([*train, "--track", "trackio"])
    assert result.exit_code == 2 and "`pip install trackio`" in result.stderr, result.output
    broken = Calls()("MlflowClient", failing=OSError("no such database"))
    stand_in(monkeypatch, "mlflow", MlflowClient=broken)
    stand_in(monkeypatch, "mlflow.entities", Metric=None, Param=None)
    result = typed([*train, "--track", "mlflow"])
    assert result.exit_code == 2 and "OSError: no such database." in result.stderr and "Mend" in result.stderr
    result = typed([*train, "--track", "comet"])
    assert result.exit_code == 2 and "Some of trackio, tensorboard, wandb, mlflow" in result.stderr
    result = typed([*train, "--track-project", "sums"])
    assert result.exit_code == 2 and "Add --track" in result.stderr
    wandb.setup.settings.mode = "online"  # type: ignore[attr-defined]
    result = typed([*train, "--track", "wandb"])
    assert result.exit_code == 2 and "WANDB_MODE=offline" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not (ENVIRONMENT / ".installed").exists(), reason="no trackers: `make .venv-trackers/.installed` needs PyPI"
)
def test_the_libraries_themselves_take_it(tiny_model: Path, tmp_path: Path) -> None:
    """A run with all four, that is gone on with, in a process of its own; each library is asked what it has."""
    [packages] = (ENVIRONMENT / "lib").glob("python*/site-packages")
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{packages}:{TESTS}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    own |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    own |= {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns"}
    asked = options(tiny_model, make_data(tmp_path / "rows.jsonl"), tmp_path / "tracked", max_steps=2)
    asked["track"] = "trackio,tensorboard,wandb,mlflow"
    done = subprocess.run(
        [sys.executable, READER], input=json.dumps(asked), capture_output=True, text=True, env=own, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected: dict[str, dict[str, float]] = {"train/loss": {}, "eval/loss": {}}
    for figures, step in logged(tmp_path / "tracked" / "events.jsonl"):
        for name in expected.keys() & figures:
            expected[name][str(step)] = figures[name]
    assert len(expected["train/loss"]) == STEPS
    for name, read in found.items():
        assert read["rank"] == "2", name
        for metric, steps in expected.items():
            assert read[metric] == pytest.approx(steps, rel=1e-6), (name, metric)
    assert not [note for note in read_events(tmp_path / "tracked" / "events.jsonl", "note") if note["warning"]]
