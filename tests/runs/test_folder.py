import json
import os
import signal

import pytest

from nybble.errors import RunError
from nybble.files.disk import complete_folder
from nybble.runs.events import EventLog, read_events
from nybble.runs.folder import RunFolder
from nybble.training.interrupt import InterruptOnce
from nybble.training.plots import draw_loss


def finished_run(path):
    path.mkdir()
    (path / "config.yaml").write_text("model: m\n")
    (path / "adapter").mkdir()
    (path / "adapter" / "weights").write_text("precious")
    return path


def test_an_earlier_run_is_refused_untouched_and_replaced_only_when_asked(tmp_path):
    run = RunFolder(finished_run(tmp_path / "run"))
    with pytest.raises(RunError, match="--overwrite"):
        run.clear(overwrite=False)
    assert (run.adapter / "weights").read_text() == "precious"
    run.check_free(overwrite=True)
    with run.locked(), run.started():
        assert (run.adapter / "weights").read_text() == "precious"
        run.clear(overwrite=True)
        assert list(run.path.iterdir()) == [run.starting.path]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="holds files, but no run"):
            RunFolder(tmp_path).clear(overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_file_or_an_unwritable_parent_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunFolder(tmp_path / "file").check_free(False)
    with pytest.raises(RunError, match="cannot be written to"):
        RunFolder(tmp_path / "file" / "run").check_free(False)
    run = RunFolder(tmp_path.__class__("/proc/nybble-run"))
    with pytest.raises(RunError, match="cannot be"), run.locked(), run.started():
        pass


def test_what_was_started_and_never_trained_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path / "new" / "run")
    with pytest.raises(ZeroDivisionError), run.locked(), run.started():
        run.starting.events.write_text("{}")
        run.starting.base.mkdir()
        with pytest.raises(RunError, match="Another process"), RunFolder(run.path).locked():
            pass
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_finished_blocks_of_a_base_wait_for_the_next_run_and_other_remains_do_not(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked(), run.started():
        run.starting.resumable.mkdir()
        run.starting.events.write_text("{}")
    assert list(run.starting.path.iterdir()) == [run.starting.resumable]
    run.starting.config.write_text("left by a crash")
    run.check_free(overwrite=False)
    with run.locked(), run.started():
        assert list(run.starting.path.iterdir()) == [run.starting.resumable]
        run.starting.resumable.rmdir()
    assert list(run.path.iterdir()) == []


def test_a_run_moves_in_with_its_log(tmp_path):
    run = RunFolder(tmp_path / "run")
    for kept_bytes, expected in ((0, ["first", "then"]), (19, ["first", "first", "then"])):
        with run.locked(), run.started(), EventLog(run.starting.events) as log:
            log.write("first")
            run.starting.config.write_text(str(kept_bytes))
            run.starting.base_record.write_text("{}")
            run.starting.resumable.mkdir()
            run.move_in(log, kept_bytes)
            assert not run.starting.path.exists()
            log.write("then")
        events = [json.loads(line)["event"] for line in run.events.read_text().splitlines()]
        assert events == expected and run.config.read_text() == str(kept_bytes)
        assert sorted(run.path.iterdir()) == sorted([run.config, run.base_record, run.events])


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError), complete_folder(target) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert not target.exists()
    for text in ("first", "second"):
        with complete_folder(target) as folder:
            (folder / "weights").write_text(text)
        assert (target / "weights").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "adapter"
    with complete_folder(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError), complete_folder(target) as folder:
        (folder / "weights").write_text("new")
        raise OSError("disk full")
    assert (target / "weights").read_text() == "old"


def test_events_are_json_lines_even_when_numbers_are_not_finite(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("step", step=1, loss=float("nan"))
    log.write("eval", step=1, loss=2.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"event": "step", "step": 1, "loss": "nan"}, {"event": "eval", "step": 1, "loss": 2.5}]
    assert list(read_events(path, "eval")) == [{"event": "eval", "step": 1, "loss": 2.5}]
    log.close()


def test_the_loss_plot_is_a_picture(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 6):
        log.write("step", step=step, loss=3.0 / step)
        log.write("eval", step=step, loss=3.5 / step)
    log.close()
    draw_loss(tmp_path / "events.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_ctrl_c_is_a_request_and_the_second_stops():
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), InterruptOnce() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous
