"""Times greedy generation, one prompt at a time, against transformers with bitsandbytes.

    python benchmarks/bench_generate.py [--quick] [--data train.jsonl]

Both load the same 16-bit base into NF4 with double quantisation and answer the same prompts, in turns: one token first,
which times the reading of the prompt, then the whole answer. The answers are compared: greedy tokens are the same until
one near tie falls otherwise, so most prompts must agree on their beginnings.
"""

import statistics
import sys
from pathlib import Path

from common import (
    BENCHMARKS,
    Contender,
    Spread,
    Table,
    Turns,
    about_machine,
    model_options,
    options,
    report,
    wait_for_quiet,
)
from inputs import DTYPE_NAME, IGNORE, prepare_inputs, read_steps

from nybble.kernels.backends.cpp import library

NYBBLE, PEER = "nybble", "transformers + bitsandbytes"
COMMON_BEGINNING = 4  # tokens that half of the answers must share


def prompts_of(steps: Path, count: int) -> list[list[int]]:
    """The questions of the first rows: what comes before the first supervised token."""
    rows = [row for step in read_steps(steps) for row in step]
    beginnings = (next(i for i, label in enumerate(row["labels"]) if label != IGNORE) for row in rows)
    return [row["input_ids"][:end] for row, end in zip(rows[:count], beginnings, strict=False)]


def common_beginning(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def seconds_per_token(name: str, first: Turns, whole: Turns) -> list[float]:
    """Time of each token after the first, by answer."""
    quiet = sorted(set(first.quiet_rounds()) & set(whole.quiet_rounds()))
    return [
        (whole.rounds[i][name]["seconds"] - first.rounds[i][name]["seconds"]) / (len(whole.rounds[i][name]["ids"]) - 1)
        for i in quiet
    ]


def main() -> None:
    parser = model_options(options(__doc__, rounds=8))
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    inputs = prepare_inputs(arguments.model, arguments.data, arguments.scratch, rounds)
    settings = {"work": "answer", "base": str(inputs.base), "dtype": DTYPE_NAME}

    def start(name: str, python: str | Path, script: str) -> Contender:
        log = arguments.scratch / "logs" / f"generate-{name.split()[0]}.log"
        return Contender(name, [python, BENCHMARKS / script], settings, arguments.threads, log)

    contenders = [start(NYBBLE, sys.executable, "contender_nybble.py"),
                  start(PEER, arguments.peers, "contender_peers.py")]  # fmt: skip
    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "compute dtype": DTYPE_NAME,
        "kernels": library.describe()["isa"],
    }
    prompts = prompts_of(inputs.answers, rounds + 1)
    Turns().ask(contenders, prompt=prompts[-1], new_tokens=8)  # the first answer allocates and packs
    first, whole = Turns(arguments.wait), Turns(arguments.wait)
    for prompt in prompts[:rounds]:
        first.ask(contenders, prompt=prompt, new_tokens=1)
        whole.ask(contenders, prompt=prompt, new_tokens=arguments.new_tokens)
    for contender in contenders:
        contender.close()

    shared = [common_beginning(answers[NYBBLE]["ids"], answers[PEER]["ids"]) for answers in whole.rounds]
    if statistics.median(shared) < COMMON_BEGINNING:
        raise SystemExit(f"The answers differ from their beginnings on: {shared} tokens in common.")
    per_token = {name: seconds_per_token(name, first, whole) for name in (NYBBLE, PEER)}
    faster = Spread.of([peer / own for own, peer in zip(per_token[NYBBLE], per_token[PEER], strict=True)])
    rows = [
        [
            name,
            Spread.of([1 / seconds for seconds in per_token[name]]).show(1),
            faster.show() if name == NYBBLE else "1",
            Spread.of(first.seconds(name)).show(3),
            first.ratio(PEER, name).show(),
        ]
        for name in (NYBBLE, PEER)
    ]
    lengths = [len(prompt) for prompt in prompts[:rounds]]
    caption = (
        f"{rounds} prompts of {min(lengths)} to {max(lengths)} tokens, {arguments.new_tokens} new ones each (stop "
        f"tokens ignored); the two agree on the first {statistics.median(shared):.0f} tokens (median)."
    )
    samples = {"first": first.record(), "whole": whole.record(), "common_beginnings": shared}
    about |= {"load": whole.load(), **{c.name: c.hello["versions"] for c in contenders}}
    columns = ["contender", "tokens/s after the first", "times the peer", "first token, s", "times the peer"]
    report(arguments, "generate", "Greedy generation, batch 1", about, [Table(caption, columns, rows)], samples)


if __name__ == "__main__":
    main()
