"""Times DPO steps against TRL's DPOTrainer with PEFT and bitsandbytes, and measures the memory that they take.

    python benchmarks/bench_preference.py --data pairs.jsonl [--quick] [--only pairs] [--peers .venv-peers/bin/python]

Pairs come from make_pairs.py. Every contender is a process of its own that loads the same 16-bit base into four bits,
starts from the same adapter and takes the same pairs, step by step, in turns; each asks its reference in the step, its
adapters off. Loss and gradients of every B in the first step must agree with nybble's. Peak RSS is what the system says
at the end (VmHWM), libraries and other file-backed pages included.

Two works:
    pairs     4 pairs a step, of natural length.
    full      2 pairs a step, whose documents have 256 tokens each, the last 192 of them answer.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bench_attention import matmul_rate
from bench_step import GRADIENT_COSINE, LOSS_TOLERANCE, Work, agrees, check_losses, take_turns, trl
from common import Contender, Spread, Table, Turns, about_machine, model_options, options, report, wait_for_quiet
from inputs import DTYPE, DTYPE_NAME, Inputs, prepare_base, read_steps

from nybble.data.preference_rows import EncodedPair
from nybble.data.preferences import PAIR_ROWS
from nybble.data.prepare import prepare
from nybble.data.sampler import StepSampler
from nybble.data.template import ChatTemplate
from nybble.kernels.backends.cpp import library
from nybble.sources.open import open_model

BETA, WARM_UP = 0.1, 1
PAIRS_PER_STEP, MAX_SEQ_LEN = 4, 512
FULL_PAIRS, FULL_PROMPT, FULL_ANSWER = 2, 64, 192

RECOMPUTING, KEEPING = "nybble, keeping nothing", "nybble, keeping everything"
OURS = {
    RECOMPUTING: {"work": "train_pairs", "keep": "nothing", "beta": BETA},
    KEEPING: {"work": "train_pairs", "keep": "everything", "beta": BETA},
}
PEERS = {
    "TRL + bitsandbytes, recomputing": trl(True, True) | {"work": "trl_pairs", "beta": BETA},
    "TRL + bitsandbytes, keeping": trl(False, False) | {"work": "trl_pairs", "beta": BETA},
}
PAIRED = dict(zip(PEERS, OURS, strict=True))  # the same work with the same saving
Step = list[dict[str, list[int]]]


class PairWork(Work):
    """Steps of pairs as token ids, which the same contenders take."""

    def __init__(self, name: str, inputs: Inputs, steps: Path, arguments: argparse.Namespace):
        self.name, self.inputs, self.arguments, self.steps_path = name, inputs, arguments, steps
        self.steps = read_steps(steps)
        self.tokens = [sum(map(_tokens, rows)) for rows in self.steps]
        self.logs = arguments.scratch / "logs"


def _tokens(pair: dict[str, list[int]]) -> int:
    return 2 * len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"])


def write_steps(inputs: Inputs, data: str, num_steps: int) -> dict[str, Path]:
    """The pairs of each work, as a file."""
    tokenizer = open_model(str(inputs.base)).load_tokenizer()
    prepared = prepare(data, ChatTemplate(tokenizer), max_seq_len=MAX_SEQ_LEN, kind=PAIR_ROWS, validation_fraction=0)
    prepared.audit.check()
    rows = [_as_ids(row) for row in prepared.train if isinstance(row, EncodedPair)]
    sampler = StepSampler(len(rows), PAIRS_PER_STEP, seed=0)
    works = {
        "pairs": [[rows[row] for row in sampler.next_step()] for _ in range(num_steps)],
        "full": _full_steps(rows, num_steps, tokenizer.eos_token_id),
    }
    paths = {name: inputs.base.parent / f"preference-{name}.json" for name in works}
    for name, steps in works.items():
        paths[name].write_text(json.dumps(steps))
    return paths


def _as_ids(pair: EncodedPair) -> dict[str, list[int]]:
    """Up to the end of turn: what templates put behind it TRL would take for a part of the answer."""
    prompt = pair.prompt_ids
    answers = (document.input_ids[document.supervised].tolist() for document in pair.documents)
    return {"prompt": prompt} | dict(zip(("chosen", "rejected"), answers, strict=True))


def _full_steps(rows: Step, num_steps: int, end: int) -> list[Step]:
    """Pairs of equal length, of the same text, one after another; `end` closes each answer, which TRL does else."""
    stream = [token for row in rows for side in ("chosen", "rejected") for token in (*row["prompt"], *row[side])]
    size = FULL_PROMPT + 2 * FULL_ANSWER
    pieces = [stream[start : start + size] for start in range(0, len(stream) - size, size)]
    first, second = FULL_PROMPT, FULL_PROMPT + FULL_ANSWER
    pairs = [
        {
            "prompt": piece[:first],
            "chosen": [*piece[first : second - 1], end],
            "rejected": [*piece[second : size - 1], end],
        }
        for piece in pieces
    ]
    return [[pairs[(step * FULL_PAIRS + i) % len(pairs)] for i in range(FULL_PAIRS)] for step in range(num_steps)]


def measure(work: PairWork, arguments: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    ours = [work.start(name, settings) for name, settings in OURS.items()]
    peers = [work.start(name, settings) for name, settings in PEERS.items()]
    contenders: list[Contender] = [*ours, *peers]
    found, twin, first = {}, ours[1], Turns()
    first.ask(contenders, step=0)
    for peer in peers:
        loss = first.rounds[0][peer.name]["loss"]
        found[peer.name] = work.disagreement(peer.name, loss, twin.name, twin.hello["loss"])
        print(peer.name, found[peer.name], peer.hello, flush=True)
        if not agrees(found[peer.name]):
            raise SystemExit(f"{peer.name} does not agree with nybble's loss and gradients.")
    turns, peaks = take_turns(work.name, contenders, WARM_UP, arguments, first=1)
    tokens = [work.tokens[WARM_UP + i] for i in turns.quiet_rounds()]
    rows = []
    for contender in contenders:
        name, seconds = contender.name, turns.seconds(contender.name)
        own = PAIRED.get(name)
        rows.append([
            name, Spread.of(seconds).show(), f"{sum(tokens) / sum(seconds):.0f}",
            turns.ratio(name, own).show() if own else "", f"{peaks[name] / 1e9:.2f}",
            f"{peaks[own] / peaks[name]:.2f}" if own else "",
        ])  # fmt: skip
    pairs = [pair for step in work.steps[: WARM_UP + arguments.rounds] for pair in step]
    caption = (
        f"**{work.name}**: {len(work.steps[0])} pairs a step, {sum(map(_tokens, pairs)) / len(pairs):.0f} tokens a "
        f"pair, {sum(2 * len(pair['prompt']) for pair in pairs) / sum(map(_tokens, pairs)):.0%} of them prompt. "
        f"{arguments.rounds} steps. First steps: loss within {LOSS_TOLERANCE:.0%}, cosine at least {GRADIENT_COSINE}."
    )
    columns = ["contender", "s a step", "tokens/s", "times nybble's", "peak RSS, GB", "nybble's share of the peak"]
    samples = turns.record() | {"peaks": peaks, "agreement": found, "load": turns.load()}
    return Table(caption, columns, rows), samples | {"versions": contenders[-1].hello["versions"]}


def main() -> None:
    parser = model_options(options(__doc__, rounds=6))
    parser.add_argument("--only", choices=("pairs", "full"), help="one of the works")
    arguments = parser.parse_args()
    arguments.rounds = min(arguments.rounds, 3) if arguments.quick else arguments.rounds
    inputs = prepare_base(arguments.model, arguments.scratch)
    steps = write_steps(inputs, arguments.data, WARM_UP + arguments.rounds + 1)
    torch.set_num_threads(arguments.threads)
    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "compute dtype": DTYPE_NAME,
        "GFLOP/s of a 2048^3 product in it": matmul_rate(DTYPE, time.perf_counter) / 1e9,
        "kernels": library.describe()["isa"],
    }
    for name in [arguments.only] if arguments.only else list(steps):
        table, samples = measure(PairWork(name, inputs, steps[name], arguments), arguments)
        check_losses(samples)
        conditions = {f"load during {name}": samples["load"], "peers": samples["versions"]}
        title = "DPO against TRL, PEFT and bitsandbytes"
        report(arguments, f"preference-{name}", title, about | conditions, [table], {name: samples})


if __name__ == "__main__":
    main()
