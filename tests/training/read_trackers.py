"""Run with the tests and the packages of `trackers.txt` on its path: trains by the options on stdin, goes on with the
run, and prints what each tracker has: {tracker: {"rank": of its options, metric: {step: figure}}}. The current folder
becomes theirs.
"""

import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from short_runs import resume

from nybble.options.verbs import load_config
from nybble.training.session import train

METRICS = ("train/loss", "eval/loss")


def trackio(out: Path) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("nybble")
    rows = SQLiteStorage.get_logs("nybble", name)
    config = SQLiteStorage.get_run_config("nybble", name)
    found = {metric: {row["step"]: row[metric] for row in rows if metric in row} for metric in METRICS}
    return found | {"rank": str(config["rank"])}


def tensorboard(out: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    rank = re.search(r"^    rank: (.*)$", text, re.MULTILINE)[1]
    return {"rank": rank, **{metric: {each.step: each.value for each in events.Scalars(metric)} for metric in METRICS}}


def wandb(out: Path) -> dict[str, Any]:
    """Of the files that `wandb sync` would send."""
    found: dict[str, Any] = {metric: {} for metric in METRICS}
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1, files  # two sessions of one run
    for record in (record for file in files for record in _records(file)):
        for update in record.run.config.update:
            if update.key == "rank":
                found["rank"] = update.value_json
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for metric in METRICS:
            if metric in items:
                found[metric][items["step"]] = items[metric]
    return found


def _records(file: Path) -> Iterator[Any]:
    """W&B's records of a file in the format of LevelDB's log: blocks of 32 KiB with parts of records, a header of seven
    bytes before the first.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = file.read_bytes(), 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:  # no header fits into what is left of the block
            place += 32768 - place % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or its last part
            yield Record.FromString(whole)
            whole = b""


def mlflow(out: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("nybble").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == out.name
    steps = {
        metric: {each.step: each.value for each in client.get_metric_history(run.info.run_id, metric)}
        for metric in METRICS
    }
    return {"rank": run.data.params["rank"], **steps}


if __name__ == "__main__":
    options = json.load(sys.stdin)
    train(load_config(None, options))
    out = Path(options["out"])
    resume(out, allow_change="config", max_steps=4)
    print(json.dumps({read.__name__: read(out) for read in (trackio, tensorboard, wandb, mlflow)}))
