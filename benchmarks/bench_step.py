"""Times whole training steps against TRL, PEFT and bitsandbytes: tokens a second of the same work.

    python benchmarks/bench_step.py [--quick] [--data train.jsonl] [--only answers] [--peers .venv-peers/bin/python]

Every contender is a process of its own that loads the same 16-bit base, starts from the same adapter and takes the
same rows, step by step. They take turns: one computes, the others wait (and are seen to use no processor time), in
alternating order, so that a ratio comes from two measurements a few seconds apart. The first step of each is compared
first: loss and gradients of every B must agree with nybble's, or the contender is out.

Two works:
    answers   8 rows of questions and answers a step, answers supervised. Peer: TRL's SFTTrainer with PEFT and
              bitsandbytes (NF4, double quantisation), recomputing activations (its default), and at the fastest of a
              few settings, tried one after another against nybble first.
    full      4 rows of 256 tokens, all supervised. Peers: a bare loop over PEFT with bitsandbytes, and over PEFT with
              the base not quantised; each at its fastest setting.

All compute in bf16 where the processor multiplies it, else in fp32; then there is no autocast among the settings.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_attention import matmul_rate
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
from inputs import DTYPE, DTYPE_NAME, Inputs, describe_rows, prepare_inputs, read_steps
from safetensors.torch import load_file

from nybble.kernels.backends.cpp import library

LOSS_TOLERANCE = 0.01  # relative, of the first step: bf16, and scales that bitsandbytes rounds a little otherwise
GRADIENT_COSINE = 0.98  # least, over the gradients of every B together
WARM_UP, TRIAL_STEPS = 2, 2  # a contender's first steps, which allocate; steps by which settings are compared

RECOMPUTING, KEEPING = "nybble, keeping nothing", "nybble, keeping everything"
OURS: dict[str, dict[str, Any]] = {
    RECOMPUTING: {"work": "train", "keep": "nothing"},
    KEEPING: {"work": "train", "keep": "everything"},
}


def trl(checkpointing: bool, autocast: bool, padding_free: bool = False, accumulation: int = 1) -> dict[str, Any]:
    return {
        "work": "trl", "checkpointing": checkpointing, "autocast": autocast and DTYPE is torch.bfloat16,
        "padding_free": padding_free, "accumulation": accumulation, "dtype": DTYPE_NAME,
    }  # fmt: skip


def bare(bits: int, autocast: bool, adapter_dtype: str) -> dict[str, Any]:
    given = {"autocast": autocast, "adapter_dtype": adapter_dtype}
    plain = {"autocast": False, "adapter_dtype": "fp32"}
    return {"work": "bare", "bits": bits, "dtype": DTYPE_NAME} | (given if DTYPE is torch.bfloat16 else plain)


def different(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of settings that are the same in this dtype the first."""
    return {
        name: given for name, given in settings.items() if next(n for n in settings if settings[n] == given) == name
    }


def bare_settings(bits: int) -> dict[str, dict[str, Any]]:
    return {
        "adapters in fp32": bare(bits, False, "fp32"),
        "adapters in bf16": bare(bits, False, "bf16"),
        "autocast": bare(bits, True, "fp32"),
    }


# work -> contender -> its settings by name; of several the fastest that agrees is measured
PEERS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "answers": {
        "TRL + bitsandbytes, recomputing": {"as it comes": trl(checkpointing=True, autocast=True)},
        "TRL + bitsandbytes, best": {
            "no autocast": trl(False, False),
            "autocast": trl(False, True),
            "padding-free": trl(False, True, padding_free=True),
            "4 x 2 rows": trl(False, True, accumulation=4),
        },
    },
    "full": {
        "bare loop, PEFT + bitsandbytes": bare_settings(4),
        "bare loop, PEFT on the whole base": bare_settings(16),
    },
}


class Work:
    """One work: its rows, and how contenders for it are started and checked."""

    def __init__(self, name: str, inputs: Inputs, arguments: argparse.Namespace):
        self.name, self.inputs, self.arguments = name, inputs, arguments
        self.steps_path = getattr(inputs, name)
        self.steps = read_steps(self.steps_path)
        self.tokens = [sum(len(row["input_ids"]) for row in rows) for rows in self.steps]
        self.logs = arguments.scratch / "logs"

    def start(self, name: str, settings: dict[str, Any], check: bool = True) -> Contender:
        """A contender that has loaded; with `check` it keeps the gradients of its first step in a file."""
        ours = settings["work"] in ("train", "train_pairs")
        program = (sys.executable, "contender_nybble.py") if ours else (self.arguments.peers, "contender_peers.py")
        command = [program[0], BENCHMARKS / program[1]]
        files = {"base": self.inputs.base, "adapter": self.inputs.adapter, "steps": self.steps_path}
        if check:
            files["gradients"] = self.gradients(name)
        given = settings | {key: str(path) for key, path in files.items()}
        return Contender(name, command, given, self.arguments.threads, self.logs / f"{_slug(name)}.log")

    def gradients(self, name: str) -> Path:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self.logs / f"{self.name}-{_slug(name)}.safetensors"

    def disagreement(self, name: str, loss: float, own_name: str, own_loss: float) -> dict[str, float]:
        """Relative difference of the first losses, and cosine of the first gradients."""
        own, other = load_file(self.gradients(own_name)), load_file(self.gradients(name))
        assert own.keys() == other.keys(), "adapters sit on other layers"
        a, b = (torch.cat([grads[key].double().flatten() for key in sorted(grads)]) for grads in (own, other))
        return {"loss": abs(loss - own_loss) / own_loss, "cosine": float(a @ b / (a.norm() * b.norm()))}


def agrees(found: dict[str, float]) -> bool:
    return found["loss"] <= LOSS_TOLERANCE and found["cosine"] >= GRADIENT_COSINE


def fastest_setting(
    work: Work, ours: Contender, peer: str, settings: dict[str, dict[str, Any]], patience_s: float
) -> dict[str, Any]:
    """Try each setting against nybble over the same few steps; those that do not agree are out.

    A peer on a 16-bit base is timed against nybble's four bits, and must agree with nybble on that 16-bit base.
    """
    twin = ours
    if any(given.get("bits") == 16 for given in settings.values()):
        twin = work.start("nybble, 16 bits", OURS[KEEPING] | {"bits": 16})
        twin.close()
    tried: dict[str, dict[str, Any]] = {}
    for setting, given in settings.items():
        name = f"{peer}: {setting}"
        contender, first, turns = work.start(name, given), Turns(), Turns(patience_s)
        first.ask([ours, contender], step=0)
        for step in range(1, 1 + TRIAL_STEPS):
            turns.ask([ours, contender], step=step)
        contender.close()
        found = work.disagreement(name, first.rounds[0][name]["loss"], twin.name, twin.hello["loss"])
        tried[setting] = {"ratio": turns.ratio(name, ours.name).median, "agrees": agrees(found), **found}
        print(f"{name}: {tried[setting]}", flush=True)
    good = {setting: result["ratio"] for setting, result in tried.items() if result["agrees"]}
    if not good:
        raise SystemExit(f"{peer}: no setting agrees with nybble's loss and gradients.")
    return {"chosen": min(good, key=lambda setting: good[setting]), "tried": tried}


def take_turns(
    what: str, contenders: Sequence[Contender], warm_up: int, arguments: argparse.Namespace, first: int = 0
) -> tuple[Turns, dict[str, int]]:
    """Ask all for one step after the other, from the `first`, and end them: what they answered after `warm_up` steps,
    and each one's peak of memory."""
    turns = Turns(arguments.wait)
    for step in range(first, warm_up + arguments.rounds):
        (turns if step >= warm_up else Turns()).ask(contenders, step=step)
        print(f"{what}, step {step}", flush=True)
    peaks = {contender.name: contender.peak_rss_bytes() for contender in contenders}
    for contender in contenders:
        contender.close()
    return turns, peaks


def measure(work: Work, arguments: argparse.Namespace) -> tuple[list[Table], dict[str, Any]]:
    ours = {name: work.start(name, settings) for name, settings in OURS.items()}
    choices: dict[str, dict[str, Any]] = {}
    contenders = list(ours.values())
    for peer, settings in PEERS[work.name].items():
        offered = different(settings)
        offered = dict(list(offered.items())[:2]) if arguments.quick else offered
        choices[peer] = fastest_setting(work, ours[KEEPING], peer, offered, arguments.wait / 10)
    for peer, choice in choices.items():
        contenders.append(work.start(peer, PEERS[work.name][peer][choice["chosen"]]))

    turns, peaks = take_turns(work.name, contenders, WARM_UP, arguments)
    tokens = [work.tokens[WARM_UP + i] for i in turns.quiet_rounds()]
    rows = []
    for contender in contenders:
        seconds = turns.seconds(contender.name)
        to = [turns.ratio(contender.name, own).show() if contender.name not in OURS else "" for own in OURS]
        rows.append([
            contender.name, Spread.of(seconds).show(), f"{sum(tokens) / sum(seconds):.0f}", *to,
            f"{peaks[contender.name] / 1e9:.2f}",
        ])  # fmt: skip
    about = describe_rows(work.steps)
    caption = (
        f"**{work.name}**: {about['rows_per_step']} rows a step, {about['mean_tokens']:.0f} tokens a row on average, "
        f"at most {about['longest']}, {about['supervised_part']:.0%} of them supervised. {arguments.rounds} steps."
    )
    columns = ["contender", "s a step", "tokens/s", f"times {RECOMPUTING}", f"times {KEEPING}", "peak RSS, GB"]
    tables = [Table(caption, columns, rows), choice_table(work, choices)]
    samples = turns.record() | {
        "tokens": work.tokens[WARM_UP : WARM_UP + arguments.rounds], "choices": choices, "peak_rss": peaks,
        "load": turns.load(), "versions": contenders[-1].hello["versions"],
    }  # fmt: skip
    return tables, samples


def choice_table(work: Work, choices: dict[str, dict[str, Any]]) -> Table:
    """What each peer's settings gave."""
    rows = [
        [
            f"{peer}: {setting}" + (" (chosen)" if setting == choice["chosen"] else ""),
            f"{found['ratio']:.2f}",
            f"{found['loss']:.2%}",
            f"{found['cosine']:.4f}",
            "yes" if found["agrees"] else "no: left out",
        ]
        for peer, choice in choices.items()
        for setting, found in choice["tried"].items()
    ]
    caption = (
        f"Settings tried, {TRIAL_STEPS} steps each, and how the first step compares with nybble's (allowed: loss "
        f"within {LOSS_TOLERANCE:.0%}, cosine of the gradients at least {GRADIENT_COSINE})."
    )
    return Table(caption, ["setting", f"times {KEEPING}", "loss differs by", "cosine", "agrees"], rows)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def main() -> None:
    parser = model_options(options(__doc__, rounds=16))
    parser.add_argument("--only", choices=PEERS, help="one of the works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 3)
    works = [arguments.only] if arguments.only else list(PEERS)
    inputs = prepare_inputs(arguments.model, arguments.data, arguments.scratch, WARM_UP + arguments.rounds + 2)
    torch.set_num_threads(arguments.threads)
    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "compute dtype": DTYPE_NAME,
        "GFLOP/s of a 2048^3 product in it": matmul_rate(DTYPE, time.perf_counter) / 1e9,
        "kernels": library.describe()["isa"],
    }
    for name in works:
        tables, samples = measure(Work(name, inputs, arguments), arguments)
        check_losses(samples)
        conditions = {f"load during {name}": samples["load"], "peers": samples["versions"]}
        title = "Training steps against TRL, PEFT and bitsandbytes"
        report(arguments, f"step-{name}", title, about | conditions, tables, {name: samples})


def check_losses(samples: dict[str, Any]) -> None:
    losses = [answer["loss"] for answers in samples["rounds"] for answer in answers.values()]
    assert all(map(math.isfinite, losses)), "a contender's loss is not finite"


if __name__ == "__main__":
    main()
