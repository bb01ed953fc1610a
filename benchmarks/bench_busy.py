"""Times steps and answers beside other busy programs, with OpenMP's ways of waiting and with no waiting at all.

    python benchmarks/bench_busy.py [--quick] [--data train.jsonl] [--spins 1000 10000]

A laptop always has something else to do. Beside none, one and two programs that only compute, SmolLM2-135M takes
steps of 4 rows of 256 tokens and answers a prompt:
    as nybble sets it    threads sleep at once (`nybble.openmp`); `--spins` adds numbers of rounds to spin before
    as it comes          GNU's default: threads spin for milliseconds
    no barriers          as many processes of one thread as there are cores, which never wait for one another
Steps of the last are what the cores can do at all beside those programs; its figure is the sum of its processes'.
All take turns, one computes while the others sleep.
"""

import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import BENCHMARKS, Contender, Spread, Table, about_machine, model_options, options, report, wait_for_quiet
from inputs import describe_rows, prepare_inputs, read_steps

from nybble.openmp import VARIABLES

LOADS = (0, 1, 2)  # busy programs
WARM_UP = 2
NEW_TOKENS = 48
PROMPT = list(range(1000, 1064))  # any 64 tokens
OURS, DEFAULT, APART = "as nybble sets it", "as it comes", "no barriers"
BUSY = "while True: pass"

WORKS: dict[str, dict[str, Any]] = {"steps": {"work": "train", "keep": "everything"}, "answers": {"work": "answer"}}

GNU_DEFAULT = {"GOMP_SPINCOUNT": "300000"}  # said aloud: a contender to whom nothing is said sets nybble's own

Group = list[Contender]  # of one way: one process, or several of one thread each


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that use all of a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def ways(spins: Sequence[int]) -> dict[str, dict[str, str]]:
    """Name -> the variables that set it."""
    others = {f"{count} rounds": VARIABLES | {"GOMP_SPINCOUNT": str(count)} for count in spins}
    return {OURS: VARIABLES, DEFAULT: GNU_DEFAULT} | others


def tokens_per_s(group: Group, tokens: int, **request: Any) -> float:
    """Of all processes of a group, which are asked at the same time."""
    answers: list[dict[str, Any]] = [{} for _ in group]

    def ask(place: int) -> None:
        answers[place] = group[place].ask(**request)

    asking = [threading.Thread(target=ask, args=(place,)) for place in range(len(group))]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return sum(tokens / answer["seconds"] for answer in answers)


Rates = dict[int, dict[str, list[float]]]  # busy programs -> way -> tokens/s, a round each


def measure(groups: dict[str, Group], rounds: int, tokens: Sequence[int], requests: Sequence[dict[str, Any]]) -> Rates:
    """Every way beside every number of busy programs, in turn, in alternating order."""
    rates: Rates = {load: {name: [] for name in groups} for load in LOADS}
    for number in range(WARM_UP + rounds):
        for load in LOADS if number >= WARM_UP else LOADS[:1]:
            with busy_programs(load):
                for name in groups if number % 2 else reversed(groups):
                    rate = tokens_per_s(groups[name], tokens[number], **requests[number])
                    if number >= WARM_UP:
                        rates[load][name].append(rate)
                    print(f"round {number}, beside {load} busy, {name}: {rate:.1f} tokens/s", flush=True)
    return rates


def table(caption: str, rates: Rates) -> Table:
    """A row a way: tokens/s beside each load, and how they compare in pairs of one round."""
    names = list(rates[0])
    rows = []
    for name in names:
        row = [name]
        for load in LOADS:
            of = rates[load]
            row.append(f"{statistics.median(of[name]):.0f}")
            row += [
                "" if name == to or to not in of else _ratio(of[to], of[name]) for to in (DEFAULT, APART) if to in names
            ]
        rows.append(row)
    columns = ["threads wait"]
    for load in LOADS:
        beside = f"beside {load} busy"
        columns += [f"tokens/s {beside}", *(f"time, times {to}" for to in (DEFAULT, APART) if to in names)]
    return Table(caption, columns, rows)


def _ratio(to: Sequence[float], own: Sequence[float]) -> str:
    return Spread.of([a / b for a, b in zip(to, own, strict=True)]).show()


def main() -> None:
    parser = model_options(options(__doc__, rounds=9))
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="numbers of rounds to spin that are tried too")
    parser.add_argument("--only", choices=WORKS, help="one of the works")
    arguments = parser.parse_args()
    rounds = min(arguments.rounds, 2) if arguments.quick else arguments.rounds
    inputs = prepare_inputs(arguments.model, arguments.data, arguments.scratch, WARM_UP + rounds + 2)
    steps = read_steps(inputs.full)
    torch.set_num_threads(arguments.threads)
    others = wait_for_quiet(arguments.wait)

    def start(name: str, work: dict[str, Any], waiting: dict[str, str], threads: int) -> Contender:
        command = [sys.executable, BENCHMARKS / "contender_nybble.py"]
        settings = {"base": str(inputs.base), "adapter": str(inputs.adapter), "steps": str(inputs.full)} | work
        log = arguments.scratch / "logs" / f"busy-{work['work']}-{name.replace(' ', '-')}.log"
        return Contender(name, command, settings, threads, log, waiting)

    tables, samples = [], {}
    for unit in [arguments.only] if arguments.only else list(WORKS):
        work = WORKS[unit]
        groups = {name: [start(name, work, set_, arguments.threads)] for name, set_ in ways(arguments.spins).items()}
        if unit == "steps":
            apart = [start(f"{APART} {i}", work, VARIABLES, 1) for i in range(arguments.threads)]
            groups[APART] = apart
            tokens = [sum(len(row["input_ids"]) for row in rows) for rows in steps]
            requests: list[dict[str, Any]] = [{"step": number} for number in range(WARM_UP + rounds)]
            about = describe_rows(steps)
            caption = f"**steps**: {about['rows_per_step']} rows of {about['longest']} tokens, keeping everything."
        else:
            tokens = [NEW_TOKENS] * (WARM_UP + rounds)
            requests = [{"prompt": PROMPT, "new_tokens": NEW_TOKENS}] * (WARM_UP + rounds)
            caption = f"**answers**: {NEW_TOKENS} tokens to a prompt of {len(PROMPT)}."
        rates = measure(groups, rounds, tokens, requests)
        for contender in (one for group in groups.values() for one in group):
            contender.close()
        tables.append(table(f"{caption} Medians of {rounds} rounds, ratios with quartiles.", rates))
        samples[unit] = rates
    about = about_machine(arguments.threads) | {"others_share_of_a_core_before": others, "set by nybble": VARIABLES}
    report(arguments, "busy", "Beside busy programs", about, tables, samples)


if __name__ == "__main__":
    main()
