"""What the benchmark programs share: pairs, turns, quiet rounds, contenders in processes of their own."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the benchmarks read /proc")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import common  # noqa: E402
from bench_generate import common_beginning  # noqa: E402
from common import Contender, Spread, Table, Turns  # noqa: E402

ECHO = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from common import Channel
channel = Channel()
print("noise that a library prints")
channel.send(ready=True)
while True:
    request = channel.receive()
    if request.get("work"):
        end = time.process_time() + request["work"]
        while time.process_time() < end: pass
    channel.send(seconds=request["seconds"])
"""


def turns_of(ours: list[float], peer: list[float], foreign: list[float]) -> Turns:
    rounds = [{"ours": {"seconds": a}, "peer": {"seconds": b}} for a, b in zip(ours, peer, strict=True)]
    return Turns(rounds=rounds, foreign=foreign, idle=[0.0] * len(rounds))


def test_spread_is_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_ratio_is_of_pairs_and_not_of_medians():
    turns = turns_of([1.0, 10.0, 2.0], [2.0, 20.0, 8.0], [0.0] * 3)
    assert turns.ratio("peer", "ours").median == 2.0  # the medians' ratio is 4


def test_disturbed_rounds_do_not_count():
    turns = turns_of([1.0] * 4, [3.0, 3.0, 3.0, 90.0], [0.0, 0.0, 0.0, 1.5])
    assert turns.seconds("peer") == [3.0] * 3
    assert turns.load()["rounds used"].startswith("3 of 4")


def test_all_rounds_count_where_too_few_were_quiet():
    turns = turns_of([1.0] * 3, [3.0] * 3, [0.0, 1.5, 1.5])
    assert len(turns.seconds("peer")) == 3


def test_busy_waiting_contenders_stop_the_run():
    turns = turns_of([1.0], [1.0], [0.0])
    turns.idle = [0.5]
    with pytest.raises(SystemExit, match="50"):
        turns.load()


def test_order_alternates_and_own_work_is_not_foreign():
    order: list[str] = []

    def call(name: str) -> dict[str, float]:
        order.append(name)
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return {"seconds": 0.1}

    turns = Turns()
    for _ in range(2):
        turns.take({"a": lambda: call("a"), "b": lambda: call("b")}, lambda: {"": time.process_time()})
    assert order == ["b", "a", "a", "b"]
    assert all(share < 2 for share in turns.foreign)


@pytest.fixture
def contender(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(benchmarks=str(Path(common.__file__).parent)))
    started = Contender("echo", [sys.executable, script], {}, threads=1, log=tmp_path / "log")
    yield started
    if started.process.poll() is None:
        started.close()


def test_contender_answers_and_its_noise_goes_to_the_log(contender):
    assert contender.hello == {"ready": True}
    assert contender.ask(seconds=1.5) == {"seconds": 1.5}
    contender.close()
    assert "noise" in contender.log.read_text()


def test_contenders_processor_time_and_memory_are_its_own(contender):
    before = contender.cpu_seconds()
    contender.ask(seconds=0, work=0.2)
    assert 0.15 < contender.cpu_seconds() - before < 1
    time.sleep(0.2)
    assert contender.cpu_seconds() - before < 1, "a waiting contender sleeps"
    assert 1e6 < contender.peak_rss_bytes() < 1e9


def test_contender_that_dies_names_its_log(contender):
    with pytest.raises(SystemExit, match=str(contender.log)):
        contender.ask(nonsense=1)


def test_report_is_kept_unless_quick(tmp_path, capsys):
    table = Table("Caption.", ["name", "s"], [["a", "1"]])
    for quick in (True, False):
        common.report(argparse.Namespace(quick=quick, results=tmp_path), "x", "Title", {"cpu": "c"}, [table], [1])
        assert (tmp_path / "x.md").exists() is not quick
    assert "| a | 1 |" in (tmp_path / "x.md").read_text()
    assert json.loads((tmp_path / "x.json").read_text())["samples"] == [1]
    assert "Caption." in capsys.readouterr().out


def test_common_beginning():
    assert common_beginning([1, 2, 3], [1, 2, 4]) == 2
    assert common_beginning([1, 2], [1, 2, 4]) == 2
