"""One tiny model of a type through whole runs, as users have them: trained by each task and gone on with, its adapter
read by PEFT, its merged folder verified as `nybble merge` does. Before its first step a run compares losses and
gradients with those of the model's own forward (`layers/probe.py`), and is refused where they differ.
"""

import json
import shutil
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables import words_of

import nybble
from nybble.errors import NybbleError
from nybble.sources.inventory import take_inventory
from nybble.sources.open import open_model
from nybble.sources.skeleton import stored_task

DTYPES = ("fp32", "bf16")
STEPS = 4
USUAL = {"rank": 4, "lr": 1e-2, "rows_per_step": 8, "validation_fraction": 0.3, "max_steps": STEPS, "save_every": 2}


@dataclass(frozen=True)
class Lesson:
    """A task, and what a run learns it from.

    Args:
        name: of the task, as the table has it.
        data: rows, or a folder of pictures.
        options: of the run beside the usual ones.
    """

    name: str
    data: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def outcome(model: Path, lessons: Sequence[Lesson], out: Path, dtypes: Sequence[str] = DTYPES) -> list[str]:
    """The cells of a type's line, with one of each dtype. What a run is written to, and how it goes on, is asked in the
    first dtype.
    """
    plans, said, checked = [], [], []
    for dtype in dtypes:
        ends = {}
        for lesson in lessons:
            run = out / f"{lesson.name}-{dtype}"
            ends[lesson.name] = _said_by(_train, model, lesson, run, dtype)
            if ends[lesson.name] == "trains":
                plans.append(json.loads((run / "plan.json").read_text())["chosen"]["path"])
                if dtype == dtypes[0]:
                    checked.append([_said_by(check, run) for check in CHECKS])
        said.append(_of_lessons(ends))
    cells = [
        ", ".join(lesson.name for lesson in lessons),
        _together("decoder blocks" if plan.startswith("decoder blocks") else "generic" for plan in plans),
        _together("padded" if "not packed" in plan else "packed" for plan in plans),
        _said_by(in_four_bits, model),
        *said,
        *(_together(cells) for cells in (zip(*checked, strict=True) if checked else [()] * len(CHECKS))),
    ]
    return [cell.replace(f"{model.parent}/", "") for cell in cells]


def _train(model: Path, lesson: Lesson, out: Path, dtype: str) -> str:
    nybble.train(model=model, data=lesson.data, out=out, compute_dtype=dtype, **USUAL, **lesson.options)
    return "trains"


def _go_on(run: Path) -> str:
    """Its last steps anew from the checkpoint before: whether the adapter has the same bytes."""
    adapter = run / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS}")
    adapter.unlink()
    nybble.train(config=run / "config.yaml", out=run, resume=True)
    return "to the bit" if adapter.read_bytes() == whole else "wrong: other bytes"


def _read_by_peft(run: Path) -> str:
    found = nybble.export(run, to="peft", out=run / "peft").outcome
    return "the same" if found == "verified" else f"wrong: {found}"


def _merged(run: Path) -> str:
    found = nybble.merge(run, out=run / "merged").outcome
    return found if found == "verified" else f"wrong: {found}"


CHECKS = (_go_on, _read_by_peft, _merged)


def _said_by(ask: Callable[..., str], *about: Any) -> str:
    """What it gave, or how it ended."""
    try:
        return ask(*about)
    except NybbleError as error:
        return f"refused: {words_of(error)}"
    except Exception as error:  # the table shows it, and the test fails on it
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"crash: {type(error).__name__}: {words_of(error)} ({Path(last.filename).name})"


def in_four_bits(model: Path) -> str:
    """Which share of the weights of the blocks' matrices is, and the largest of what is not."""
    source = open_model(str(model))
    inventory = take_inventory(source.for_task(stored_task(source.config)).skeleton)
    share = f"{1 - inventory.dense_share:.0%}"
    others = sorted(inventory.dense, key=lambda part: -part[1])
    names = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name, _ in others)
    return share if not names else f"{share}, not {', '.join([*names][:2])}"


def _together(said: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(said))


def _of_lessons(ends: Mapping[str, str]) -> str:
    """How they ended in one dtype: of several that did not train what the worst of them said."""
    failed = {name: end for name, end in ends.items() if end != "trains"}
    if not failed:
        return "trains"
    worst = max(failed.values(), key=lambda end: end.startswith("crash"))
    return worst if len(failed) == len(ends) else f"trains, but {', '.join(failed)}: {worst}"
