"""Measures how far plans are from the truth: predicted against measured peak memory, over many small runs.

    python benchmarks/bench_plan.py [--part 1/4] [--folder DIR]

Each configuration is one `nybble train` of two steps in a process of its own, on a model of a published shape with
random weights (memory does not depend on their values) and rows of text of exactly the planned length. Measured is
the peak of anonymous memory (RssAnon), sampled every 20 ms by the run itself; the prediction was made before anything
was loaded. Runs with a budget cannot allocate more than 1.05 times it (RLIMIT_DATA).
With --part the configurations are dealt over several calls, which add to the same record.
"""

import argparse
import itertools
import json
import pydoc
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BENCHMARKS, about_machine

from nybble.options import parse_size

RECORD = BENCHMARKS / "results" / "plan.json"
LIMIT = 1.05  # runs with a budget may not allocate more than so much of it
Config = dict[str, Any]


def configurations() -> list[Config]:
    """Models, lengths, rows at once, ranks, what blocks keep, strategies."""
    found: list[Config] = []

    def add(model: str, **options: Any) -> None:
        found.append({"model": model, "rows": 1, "rank": 16, "keep": "everything"} | options)

    for length, rank, keep in itertools.product((256, 2048), (8, 64), ("everything", "nothing")):
        add("tiny", length=length, rank=rank, keep=keep)
    for length, keep in itertools.product((128, 512, 1024), ("everything", "attention", "nothing")):
        add("smollm2-135m", length=length, keep=keep)
    for rank, keep in itertools.product((4, 64), ("everything", "nothing")):
        add("smollm2-135m", length=256, rank=rank, keep=keep)
    for rows, keep in itertools.product((2, 4), ("everything", "nothing")):
        add("smollm2-135m", length=256, rows=rows, keep=keep)
    for keep in ("everything", "nothing"):
        add("smollm2-135m", length=512, keep=keep, page_optimizer="always", rank=64)
        add("smollm2-135m", length=512, keep=keep, stream_base="always", memory="1GB")
        add("smollm2-135m", length=512, keep=keep, stream_base="always", page_optimizer="always", memory="900MB")
        add("smollm2-135m", length=256, keep=keep, format="none")
    for rank, keep in itertools.product((8, 64), ("everything", "nothing")):
        add("smollm2-360m", length=384, rank=rank, keep=keep)
    add("smollm2-360m", length=384, stream_base="always", keep="nothing", memory="1GB")
    add("llama-3.2-1b", length=256)
    add("llama-3.2-1b", length=256, keep="nothing")
    add("llama-3.2-1b", length=256, keep="nothing", stream_base="always", page_optimizer="always", memory="1.3GB")
    return found


def rows_of(length: int, folder: Path) -> Path:
    """Eight rows of English text, of `length` tokens of a byte-level tokenizer each."""
    path = folder / f"rows-{length}.jsonl"
    text = "".join(c for c in pydoc.render_doc(json, renderer=pydoc.plaintext) * 20 if c.isascii())
    texts = [text[i * length : (i + 1) * length - 1] for i in range(8)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in texts))
    return path


def measure(config: Config, folder: Path) -> Config:
    """Run one configuration; predicted and measured bytes."""
    model = folder / config["model"]
    if not model.exists():
        nybble("synth", "--shape", config["model"], "--out", str(model))
    out = folder / "run"
    options = {name: str(value) for name, value in config.items() if name not in ("model", "length", "rows")}
    length, rows = config["length"], config["rows"]
    flags = {"model": model, "data": rows_of(length, folder), "out": out, "max_seq_len": length, "validation_rows": 1,
             "micro_batch_size": rows, "rows_per_step": 2 * rows, "max_steps": 2} | options  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    budget = config.get("memory")
    nybble("train", "--overwrite", *words, limit=None if budget is None else int(LIMIT * parse_size(budget)))
    plan = json.loads((out / "plan.json").read_text())
    predicted, measured = plan["chosen"]["peak_bytes"], plan["measured"]["peak_bytes"]
    return config | {
        "strategy": plan["chosen"]["strategy"],
        "predicted": predicted,
        "measured": measured,
        "start": plan["measured"]["start_bytes"],
        "error": predicted / measured - 1,
        "components": plan["chosen"]["components"],
    }


def nybble(*words: str, limit: int | None = None) -> None:
    """Run a verb; with `limit`, where allocations beyond so many bytes of anonymous memory fail."""
    program = ["-m", "nybble"] if limit is None else [str(BENCHMARKS / "limited.py"), str(limit)]
    subprocess.run([sys.executable, *program, *words], check=True, stdout=subprocess.DEVNULL)


def write(results: list[Config]) -> None:
    """The record, and its table beside it."""
    RECORD.write_text(json.dumps({"machine": about_machine(1), "results": results}, indent=1) + "\n")
    errors = sorted(100 * abs(result["error"]) for result in results)
    under = max(0.0, -min(100 * result["error"] for result in results))
    lines = [
        f"{len(results)} configurations: median error {statistics.median(errors):.1f} %, worst {errors[-1]:.1f} %, "
        f"worst under-prediction {under:.1f} %.",
        "",
        "| model | tokens | rows | rank | keep | strategy | predicted, MB | measured, MB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['model']} | {r['length']} | {r['rows']} | {r['rank']} | {r['keep']} | {r['strategy']} | "
            f"{r['predicted'] / 1e6:.0f} | {r['measured'] / 1e6:.0f} | {100 * r['error']:+.1f} % |"
        )
    RECORD.with_suffix(".md").write_text("# Plans against the truth\n\n" + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="which share of the configurations, such as 2/4")
    parser.add_argument("--folder", type=Path, help="where models are kept between calls")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    before = json.loads(RECORD.read_text())["results"] if RECORD.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for config in configurations()[part - 1 :: parts]:
            result = measure(config, folder)
            before = [r for r in before if any(r.get(key) != config.get(key) for key in {*r, *config} & OPTIONS)]
            before.append(result)
            print(f"{config} {100 * result['error']:+.1f} %", flush=True)
            write(before)


OPTIONS = {"model", "length", "rows", "rank", "keep", "page_optimizer", "stream_base", "memory", "format"}

if __name__ == "__main__":
    main()
