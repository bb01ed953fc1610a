"""Measures peak memory and loading time of training, against TRL, PEFT and bitsandbytes on the same work.

    python benchmarks/bench_memory.py [--quick] [--data train.jsonl]

Each contender starts afresh, alone: it loads the 16-bit base into four bits and takes a few of the steps that
bench_step.py times (8 rows of questions and answers). Peak RSS is what the system says at the end (VmHWM), libraries
and other file-backed pages included; `loading` is the same figure when training is about to begin. Loading time runs
from opening the folder to the model in memory, with its files in the page cache and libraries imported.
"""

from typing import Any

from bench_step import KEEPING, OURS, PEERS, RECOMPUTING, Work
from common import Spread, Table, about_machine, model_options, options, report, wait_for_quiet
from inputs import describe_rows, prepare_inputs

from nybble.kernels.backends.cpp import library

STEPS = 3
TRL_RECOMPUTING, TRL_KEEPING = "TRL + bitsandbytes, recomputing", "TRL + bitsandbytes, keeping"
CONTENDERS = OURS | {
    TRL_RECOMPUTING: PEERS["answers"][TRL_RECOMPUTING]["as it comes"],
    TRL_KEEPING: PEERS["answers"]["TRL + bitsandbytes, best"]["no autocast"],
}
PAIRS = {TRL_RECOMPUTING: RECOMPUTING, TRL_KEEPING: KEEPING}  # the same work with the same saving


def run(work: Work, name: str) -> dict[str, Any]:
    """One contender from its start to its end."""
    contender = work.start(name, CONTENDERS[name], check=False)
    loading = contender.peak_rss_bytes()
    losses = [contender.ask(step=step)["loss"] for step in range(STEPS)]
    peak = contender.peak_rss_bytes()
    contender.close()
    return {"load_s": contender.hello["load_s"], "start_s": contender.start_s, "loading": loading, "peak": peak,
            "losses": losses, "versions": contender.hello["versions"]}  # fmt: skip


def main() -> None:
    parser = model_options(options(__doc__, rounds=3))
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    work = Work("answers", prepare_inputs(arguments.model, arguments.data, arguments.scratch, STEPS + 2), arguments)
    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "kernels": library.describe()["isa"],
    }

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS if number % 2 else reversed(CONTENDERS):
            runs[name].append(run(work, name))

    def spread(name: str, key: str, factor: float = 1.0) -> Spread:
        return Spread.of([found[key] * factor for found in runs[name]])

    rows = []
    for name in CONTENDERS:
        against = next((peer for peer, own in PAIRS.items() if own == name), None)
        share = f"{spread(name, 'peak').median / spread(against, 'peak').median:.2f}" if against else ""
        rows.append([
            name, spread(name, "peak", 1e-9).show(), share, spread(name, "loading", 1e-9).show(),
            spread(name, "load_s").show(), spread(name, "start_s").show(1),
        ])  # fmt: skip
    described = describe_rows(work.steps)
    caption = (
        f"{STEPS} steps of {described['rows_per_step']} rows, {described['mean_tokens']:.0f} tokens a row on average, "
        f"at most {described['longest']}; {rounds} fresh processes each."
    )
    columns = ["contender", "peak RSS, GB", "share of TRL's", "after loading, GB", "loading, s", "start to ready, s"]
    about |= {"peers": runs[TRL_RECOMPUTING][0]["versions"], "nybble": runs[KEEPING][0]["versions"]}
    report(arguments, "memory", "Peak memory and loading time", about, [Table(caption, columns, rows)], runs)


if __name__ == "__main__":
    main()
