"""Measures how far plans are from the truth: predicted against measured peak memory, over many small runs.

    python benchmarks/bench_plan.py [--part 1/4] [--folder DIR] [--again]     predicted against measured
    python benchmarks/bench_plan.py --limited [--part 1/4] [--folder DIR]     a spread of them under a hard limit

Each configuration is one `nybble train` of three steps in a process of its own, on a model of a published shape with
random weights (memory does not depend on their values) and rows of text of exactly the planned length. Measured is
the peak of anonymous memory (RssAnon), sampled every 20 ms by the run itself; the prediction was made before anything
was loaded. With --limited the budget is what was predicted, and a run that holds more than 1.05 times it is ended.
What is recorded already is passed over but with --again, so that a call that was cut short can be made once more; with
--part the configurations are dealt over several calls.
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

import torch
from common import BENCHMARKS, about_machine
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

RECORD = BENCHMARKS / "results" / "plan.json"
LIMIT = 1.05  # of its budget, more than which ends a run
Config = dict[str, Any]


def configurations() -> list[Config]:
    """Models, lengths, rows at once, ranks, what blocks keep, strategies."""
    found: list[Config] = []

    def add(model: str, **options: Any) -> None:
        common = {"model": model, "rows": 1, "rank": 16, "keep": "everything", "compute_dtype": "bf16"}
        found.append(common | options)

    for length, rank, keep in itertools.product((256, 2048), (8, 64), ("everything", "nothing")):
        add("tiny", length=length, rank=rank, keep=keep)
    for length, keep in itertools.product((128, 256, 512), ("everything", "attention", "nothing")):
        add("smollm2-135m", length=length, keep=keep)
    for rank, keep in itertools.product((4, 64), ("everything", "nothing")):
        add("smollm2-135m", length=256, rank=rank, keep=keep)
    for rows, keep in itertools.product((2, 4), ("everything", "nothing")):
        add("smollm2-135m", length=128, rows=rows, keep=keep)
    for keep in ("everything", "nothing"):
        add("smollm2-135m", length=256, keep=keep, page_optimizer="always", rank=64)
        add("smollm2-135m", length=256, keep=keep, stream_base="always", memory="1GB")
        add("smollm2-135m", length=256, keep=keep, stream_base="always", page_optimizer="always", memory="900MB")
        add("smollm2-135m", length=256, keep=keep, method="lora")
    for keep in ("attention", "nothing"):
        add("smollm2-135m", length=512, keep=keep, offload_activations="always")
    for rank, keep in itertools.product((8, 64), ("everything", "nothing")):
        add("smollm2-360m", length=256, rank=rank, keep=keep)
    add("smollm2-360m", length=256, stream_base="always", keep="nothing", memory="1GB")
    add("smollm2-360m", length=256, offload_activations="always", keep="nothing", page_optimizer="always")
    add("llama-3.2-1b", length=128)
    add("llama-3.2-1b", length=128, keep="nothing")
    add("llama-3.2-1b", length=128, keep="nothing", stream_base="always", page_optimizer="always", memory="1.3GB")
    for length, rank, keep in itertools.product((256, 2048), (8, 64), ("everything", "nothing")):
        add("tiny", length=length, rank=rank, keep=keep, compute_dtype="fp32")
    for length, keep in itertools.product((128, 256, 512), ("everything", "attention", "nothing")):
        add("smollm2-135m", length=length, keep=keep, compute_dtype="fp32")
    for keep in ("everything", "nothing"):
        add("smollm2-135m", length=256, keep=keep, rank=64, compute_dtype="fp32")
        add("smollm2-135m", length=128, rows=4, keep=keep, compute_dtype="fp32")
    add("smollm2-135m", length=256, keep="nothing", page_optimizer="always", rank=64, compute_dtype="fp32")
    add("smollm2-135m", length=256, keep="nothing", stream_base="always", memory="1GB", compute_dtype="fp32")
    add("smollm2-135m", length=512, keep="nothing", offload_activations="always", compute_dtype="fp32")
    for model, length, keep in (
        ("tiny", 256, "nothing"),
        ("tiny", 2048, "nothing"),
        ("tiny", 2048, "everything"),
        ("smollm2-135m", 256, "nothing"),
        ("smollm2-135m", 1024, "nothing"),
        ("smollm2-135m", 256, "everything"),
    ):  # dropout on the adapters' inputs leads through transformers' modules
        add(model, length=length, keep=keep, dropout=0.05, compute_dtype="fp32")
    add("smollm2-135m", length=256, rank=64, keep="nothing", dropout=0.05, compute_dtype="fp32")
    add("smollm2-135m", length=512, keep="everything", dropout=0.05, compute_dtype="fp32")
    for length, keep in ((256, "everything"), (256, "nothing"), (1024, "nothing")):
        add("smollm2-135m", length=length, keep=keep, dropout=0.05)
    add("smollm2-360m", length=256, keep="nothing", dropout=0.05)
    for keep in ("everything", "nothing"):
        add("smollm2-360m", length=256, rank=8, keep=keep, compute_dtype="fp32")
    add("smollm2-360m", length=256, keep="nothing", stream_base="always", memory="1.2GB", compute_dtype="fp32")
    return found


def rows_of(length: int, folder: Path) -> Path:
    """Eight rows of English text, of `length` tokens of a byte-level tokenizer each."""
    path = folder / f"rows-{length}.jsonl"
    text = "".join(c for c in pydoc.render_doc(json, renderer=pydoc.plaintext) * 20 if c.isascii())
    texts = [text[i * length : (i + 1) * length - 1] for i in range(8)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in texts))
    return path


def recorded() -> list[Config]:
    """Results so far, of configurations that there still are."""
    found: list[Config] = json.loads(RECORD.read_text())["results"] if RECORD.exists() else []
    return [result for result in found if any(same(result, config) for config in configurations())]


def measure(config: Config, folder: Path, part: int) -> Config:
    """Run one configuration; predicted and measured bytes."""
    plan = train(config, folder, folder / f"run-{part}")
    predicted, measured = plan["chosen"]["peak_bytes"], plan["measured"]["peak_bytes"]
    return config | {
        "strategy": plan["chosen"]["strategy"],
        "predicted": predicted,
        "measured": measured,
        "start": plan["measured"]["start_bytes"],
        "error": predicted / measured - 1,
        "components": plan["chosen"]["components"],
    }


def measure_limited(result: Config, folder: Path, part: int) -> Config:
    """Run a configuration again with what was predicted as its budget, under a hard limit of 1.05 times that."""
    config = {name: value for name, value in result.items() if name in OPTIONS} | {"memory": str(result["predicted"])}
    plan = train(config, folder, folder / f"run-{part}", limit=int(LIMIT * result["predicted"]))
    return {"limited_peak": plan["measured"]["peak_bytes"], "limit": int(LIMIT * result["predicted"])}


def train(config: Config, folder: Path, out: Path, limit: int | None = None) -> Config:
    """The plan.json of a run of three steps.

    Raises:
        CalledProcessError: the run did not come to its end.
    """
    model = folder / config["model"]
    if not model.exists():
        nybble("synth", "--shape", config["model"], "--out", str(model))
    if config.get("method") == "lora":
        model = in_16_bits(model)
    options = {name: str(value) for name, value in config.items() if name not in ("model", "length", "rows")}
    length, rows = config["length"], config["rows"]
    flags = {"model": model, "data": rows_of(length, folder), "out": out, "max_seq_len": length, "validation_rows": 1,
             "micro_batch_size": rows, "rows_per_step": 2 * rows, "max_steps": 3, "eval_every": 3}  # fmt: skip
    flags |= options
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    nybble("train", "--overwrite", *words, limit=limit)
    plan: Config = json.loads((out / "plan.json").read_text())
    return plan


def in_16_bits(model: Path) -> Path:
    """A model of the same shape whose random weights are in 16 bits."""
    dense = model.with_name(f"{model.name}-16bit")
    if not dense.exists():
        config = AutoConfig.from_pretrained(model)
        del config.quantization_config
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(dense)
        AutoTokenizer.from_pretrained(model).save_pretrained(dense)
    return dense


def nybble(*words: str, limit: int | None = None) -> None:
    """Run a verb; with `limit`, where more than so many bytes of anonymous memory end it."""
    program = ["-m", "nybble"] if limit is None else [str(BENCHMARKS / "limited.py"), str(limit)]
    subprocess.run([sys.executable, *program, *words], check=True, stdout=subprocess.DEVNULL)


def write(results: list[Config]) -> None:
    """The record, and its table beside it."""
    short = summary(results)
    RECORD.write_text(json.dumps({"about": about_machine(1), "summary": short, "results": results}, indent=1) + "\n")
    lines = [
        f"{short['configurations']} configurations: median error {short['median error, %']:.1f} %, "
        f"worst {short['worst error, %']:.1f} %, worst under-prediction {short['worst under-prediction, %']:.1f} %.",
        f"{short['limited']} of them ran again with the prediction as their budget, under a "
        "hard limit of 1.05 times that, and came to their end.",
        "",
        "| model | tokens | rows | rank | keep | products | strategy "
        "| predicted, MB | measured, MB | error | limited, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        limited = f"{r['limited_peak'] / 1e6:.0f}" if "limited_peak" in r else ""
        lines.append(
            f"| {r['model']} | {r['length']} | {r['rows']} | {r['rank']} | {r['keep']} | {r['compute_dtype']} "
            f"| {ways(r)} | {r['predicted'] / 1e6:.0f} | {r['measured'] / 1e6:.0f} | {100 * r['error']:+.1f} % "
            f"| {limited} |"
        )
    RECORD.with_suffix(".md").write_text("# Plans against the truth\n\n" + "\n".join(lines) + "\n")


def summary(results: list[Config]) -> dict[str, float]:
    """How far the plans were from the truth."""
    errors = sorted(100 * abs(result["error"]) for result in results)
    return {
        "configurations": len(results),
        "median error, %": statistics.median(errors),
        "worst error, %": errors[-1],
        "worst under-prediction, %": max(0.0, -min(100 * result["error"] for result in results)),
        "limited": sum("limited_peak" in result for result in results),
    }


def ways(result: Config) -> str:
    """The strategy in words, with what is moved out of memory beside it."""
    words = [result["strategy"]]
    words += ["optimizer paged"] if "page_optimizer" in result and "paged" not in result["strategy"] else []
    words += ["activations in a file"] if "offload_activations" in result else []
    words += ["dropout: transformers' modules"] if "dropout" in result else []
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="which share of the configurations, such as 2/4")
    parser.add_argument("--folder", type=Path, help="where models are kept between calls")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already, too")
    parser.add_argument("--limited", action="store_true", help="every third configuration under a hard limit")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        order = configurations()
        wanted = order[:: 3 if given.limited else 1][part - 1 :: parts]
        for config in wanted:
            known = next((r for r in recorded() if same(r, config)), None)
            if given.limited:
                if known is None or ("limited_peak" in known and not given.again):
                    continue
                result = known | measure_limited(known, folder, part)
            elif known is not None and not given.again:
                continue
            else:
                result = measure(config, folder, part)
            others = [r for r in recorded() if not same(r, config)]  # read now: another part may have added to it
            write(sorted([*others, result], key=lambda r: next(i for i, c in enumerate(order) if same(r, c))))
            print(f"{config} {100 * result['error']:+.1f} %", flush=True)


OPTIONS = {"model", "length", "rows", "rank", "keep", "page_optimizer", "stream_base", "offload_activations", "memory",
           "method", "compute_dtype", "dropout"}  # fmt: skip


def same(first: Config, second: Config) -> bool:
    return all(first.get(name) == second.get(name) for name in OPTIONS)


if __name__ == "__main__":
    main()
