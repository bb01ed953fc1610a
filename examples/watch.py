"""What happens in a run, as it happens.

python examples/watch.py MODEL DATA OUT     train, and be told by a listener
python examples/watch.py OUT                follow the run of another process, by its events.jsonl
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nybble


def show(kind: str, fields: dict[str, Any]) -> None:
    numbers = {name: value for name, value in fields.items() if isinstance(value, (int, float, str))}
    print(f"{kind:10}", *(f"{name}={value}" for name, value in numbers.items()), flush=True)


def listener(event: nybble.Event) -> None:
    """Called with every event; those with a kind are what events.jsonl holds too."""
    if event.kind:
        show(event.kind, event.fields())


def follow(out: Path, every_s: float = 0.2) -> Iterator[dict[str, Any]]:
    """The events of the run in `out` from its first to its "end"; its folder may still have to appear.

    Until it trains a run lies in `.starting/` of its folder. Where it was resumed, its last session is followed.
    """
    seen = 0
    while True:
        logs = [log for log in (out / ".starting" / "events.jsonl", out / "events.jsonl") if log.is_file()]
        if not logs and seen:
            return  # it was refused before it trained
        for event in last_session(logs[0])[seen:] if logs else []:
            seen += 1
            yield event
            if event["event"] == "end":
                return
        time.sleep(every_s)


def last_session(log: Path) -> list[dict[str, Any]]:
    try:
        events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:  # it has just moved
        return []
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    return events[starts[-1] :] if starts else []


def main(arguments: list[str]) -> None:
    if len(arguments) == 1:
        for event in follow(Path(arguments[0])):
            show(event.pop("event"), event)
    else:
        model, data, out = arguments
        nybble.train(model=model, data=data, out=out, max_steps=20, on_event=listener)


if __name__ == "__main__":
    main(sys.argv[1:])
