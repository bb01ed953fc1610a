"""Is nybble right on this GPU, how fast is it, and how much memory does it take? One answer in under eight minutes.

    make gpu-check                                                            (GPU_CHECK=--record keeps the record)
    PYTHONPATH=src python benchmarks/gpu_check.py --out build/gpu-check       from a source tree, nothing installed

Needs an NVIDIA card of compute capability 8.0 or above with 24 GB, PyTorch for CUDA, transformers and pytest; what else
is installed (PEFT, bitsandbytes, compute-sanitizer) is made use of. Nothing is downloaded: weights are random bytes in
the shapes of Llama 3.

Each phase is a process of its own with a limit; it appends lines of JSON to OUT/gpu-check.jsonl, and one that fails or
takes too long stops no other. A report to be pasted into an issue comes last. `--device cpu --tiny` rehearses all of it
on small shapes.

Steps are compared with two times made of ceilings that are measured in the same call: L0, the matrix products of base
and head alone, and L1, the ideal step, with attention and every byte that must move (`ideal_step`).
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import BENCHMARKS, ROOT, about_machine, report
from gpu.check import Check
from gpu.correctness import facts, gradients, right
from gpu.generation import generation
from gpu.report import card_name, tables_of
from gpu.speed import ceilings, kernels, peers, step, streaming

# What phases of a rehearsal share; nybble first, which says how threads wait before torch is loaded.
IMPORTED = ["nybble.layers.causal_lm", "nybble.planning.shape", "transformers.models.llama.modeling_llama"]
PHASES: dict[str, tuple[Callable[[Check], None], int]] = {  # seconds, of 450 in all
    "facts": (facts, 20),
    "ceilings": (ceilings, 35),
    "right": (right, 65),
    "gradients": (gradients, 45),
    "kernels": (kernels, 40),
    "step": (step, 95),
    "generation": (generation, 30),
    "peers": (peers, 65),
    "70B": (streaming, 55),
}


def in_process(phase: Callable[[Check], None], check: Check) -> None:
    """A phase in a process of its own, whose words go to a file."""
    os.setsid()  # so that those which it starts end with it
    words = os.open(check.out / f"{check.phase}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if check.kernels:
        os.environ["NYBBLE_KERNELS"] = check.kernels
    phase(check)


def run_phase(context: Any, phase: Callable[[Check], None], check: Check) -> str:
    """Run a phase until its end or its limit; what became of it is a line of the record, and returned."""
    started = time.time()
    process = context.Process(target=in_process, args=(phase, check))
    process.start()
    process.join(max(0.0, check.ends - started))
    out_of_time = process.is_alive()
    if out_of_time:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    wrong = [line for line in check.lines("test", check.phase) if not line["passed"]]
    result = "out of time" if out_of_time else "failed" if process.exitcode else "wrong" if wrong else "ok"
    words = ""
    if result in ("out of time", "failed"):
        log = check.out / f"{check.phase}.log"
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        words = said[-1] if said else f"exit status {process.exitcode}"
    check.say("phase", result=result, seconds=round(time.time() - started, 1), last_words=words[:300])
    return result


def run(arguments: argparse.Namespace, context: Any) -> Check:
    """All phases, one after the other, within the time there is."""
    names = arguments.only.split(",") if arguments.only else list(PHASES)
    check = Check("", arguments.device, arguments.tiny, arguments.out.resolve())
    check.out.mkdir(parents=True, exist_ok=True)
    forget(check.out / "gpu-check.jsonl", names)
    ends = time.time() + arguments.seconds
    for name in names:
        phase, limit = PHASES[name]
        now = time.time()
        kernels = next((line["use"] for line in reversed(check.lines("kernels"))), "") if name == "step" else ""
        until = min(ends, now + limit * arguments.seconds / sum(seconds for _, seconds in PHASES.values()))
        result = run_phase(context, phase, replace(check, phase=name, ends=until, kernels=kernels))
        print(f"{name}: {result}, {time.time() - now:.0f} s", flush=True)
        if name == "facts" and check.lines("lacking"):
            break
    return check


def forget(record: Path, phases: Sequence[str]) -> None:
    """What an earlier run found in phases that run again."""
    lines = record.read_text().splitlines(keepends=True) if record.exists() else []
    record.write_text("".join(line for line in lines if json.loads(line)["phase"] not in phases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, a moment each: a rehearsal")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="for lines, logs and the report")
    parser.add_argument("--seconds", type=float, default=450, help="for all phases together (450)")
    parser.add_argument("--only", default="", help=f"some of {','.join(PHASES)}; lines of the others are kept")
    parser.add_argument("--record", action="store_true", help="keep it in benchmarks/results, not in OUT")
    arguments = parser.parse_args()
    sys.path.insert(1, str(ROOT / "src"))  # nothing need be installed: phases have it from here, pytest from there
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    # A process that was forked cannot use CUDA where its parent has looked at it; a rehearsal saves the imports.
    context = multiprocessing.get_context("spawn" if arguments.device == "cuda" else "forkserver")
    if arguments.device == "cpu":
        context.set_forkserver_preload(IMPORTED)
    check = run(arguments, context)
    if lacking := check.lines("lacking"):
        print(lacking[0]["why"])
        raise SystemExit(2)
    record = check.out / "gpu-check.jsonl"
    about = about_machine(os.cpu_count() or 1)
    about |= {what: line for what in ("card", "versions") for line in check.lines(what)}
    to = argparse.Namespace(quick=False, results=BENCHMARKS / "results" if arguments.record else check.out)
    samples = [json.loads(line) for line in record.read_text().splitlines()]
    report(to, f"gpu-{card_name(check)}", "nybble on a GPU", about, tables_of(check), samples)
    raise SystemExit(any(line["result"] != "ok" for line in check.lines("phase")))


if __name__ == "__main__":
    main()
