"""The README.md of what was trained: what it is, what it learnt from, how it was made and how well it does."""

import json
from pathlib import Path
from typing import Any

import yaml

from nybble.options.adapter_groups import AdapterOptions
from nybble.options.option import flat
from nybble.runs.events import read_events
from nybble.runs.open_run import OpenRun

SETTINGS = (
    *(
        "objective",
        "method",
        "format",
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "rslora",
        "dora",
        "init",
        "lr",
        "schedule",
        "warmup",
        "epochs",
    ),
    *("max_steps", "rows_per_step", "max_seq_len", "seed"),
)


def write_card(opened: OpenRun, report: dict[str, Any]) -> None:
    """Write the card into the folder of what was trained; `report` is the contents of report.json."""
    (opened.trained / "README.md").write_text(card_text(opened, report), encoding="utf-8")


def card_text(opened: OpenRun, report: dict[str, Any]) -> str:
    """YAML header as the hub reads it, then Markdown."""
    first, *_ = report["lm_eval"].items() or [None]
    harness = f"\n## Benchmarks\n\n```json\n{json.dumps(report['lm_eval'], indent=2)}\n```\n" if first else ""
    change = _estimate(report["loss_change"]["base, as trained on"], "+.4f")
    own = _by_objective(report.get("preferences") or report.get("distillation"))
    return f"""{card_head(opened)}## Results

{report["rows"]} held-out rows, {report["supervised_tokens"]} supervised tokens. In brackets: 95 % confidence intervals.
The last column but scores: KL divergence from the base in 16 bits on general text, nats a token.

{_results(report["arms"])}

{own}Loss of the tuned model minus that of its base as trained on, row by row: {change}.
{harness}"""


def card_head(opened: OpenRun) -> str:
    """The card up to its results."""
    licence = opened.source.licence or "unknown"
    library, tags = ("transformers", ["nybble"]) if opened.full else ("peft", ["lora", "nybble"])
    header = {"base_model": opened.source.name, "library_name": library, "license": licence, "tags": tags}
    options, unused = flat(opened.config), AdapterOptions.model_fields if opened.full else {}
    for name in (name for name in ("lr", "rank") if options[name] == "auto"):
        *_, chosen = read_events(opened.run.events, name)  # what the run found
        options[name] = f"{chosen[name]:g}, found by the run"
    settings = "\n".join(f"| {name} | {options[name]} |" for name in SETTINGS if name not in unused)
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

{_what_it_is(opened)} The licence above
is the base's; the data may add conditions of their own.

## Data

{_data(opened.run.audit)}

## Settings

| option | value |
|---|---|
{settings}

"""


def _what_it_is(opened: OpenRun) -> str:
    name, format = opened.source.name, opened.config.weights.format
    if opened.full:
        return f"# {name}, fine-tuned\n\nTrained with nybble, every weight of it."
    belongs = f"Trained with nybble on a frozen base in {format}. It belongs to that base and no other."
    return f"# An adapter for {name}\n\n{belongs}"


def _data(audit: Path) -> str:
    if not audit.is_file():
        return "Not recorded."
    found = json.loads(audit.read_text(encoding="utf-8"))
    return "\n".join(
        f"- {key.replace('_', ' ')}: {found[key]}"
        for key in ("source", "layout", "num_train", "num_validation", "supervised_tokens", "num_truncated")
        if key in found
    )


def _results(arms: dict[str, Any]) -> str:
    metrics = list(dict.fromkeys(metric for arm in arms.values() for metric in arm["scores"]))
    lines = ["| model | loss | perplexity | KL, general text |" + "".join(f" {metric} |" for metric in metrics)]
    lines += ["|---|---|---|---|" + "---|" * len(metrics)]
    for name, arm in arms.items():
        scores = [_estimate(arm["scores"][metric], ".3f") if metric in arm["scores"] else "" for metric in metrics]
        cells = [name, _estimate(arm["loss"], ".4f"), f"{arm['perplexity']:.3f}"]
        cells.append("" if arm["kl_general_text"] is None else f"{arm['kl_general_text']:.4f}")
        lines.append("| " + " | ".join([*cells, *scores]) + " |")
    return "\n".join(lines)


def _by_objective(found: dict[str, Any] | None) -> str:
    """A table of its own, and an empty line; nothing of a run that learnt from examples to follow."""
    if found is None:
        return ""
    told = {arm: {"loss": found[arm]["loss"], **found[arm]["metrics"]} for arm in ("base", "tuned")}
    lines = [f"| {found['objective']}, {found['rows']} held-out rows | base | tuned |", "|---|---|---|"]
    lines += [f"| {name} | {told['base'][name]:.4f} | {value:.4f} |" for name, value in told["tuned"].items()]
    lines.append(f"| KL of the tuned model from its base, nats a token | | {_estimate(found['kl'], '.4f')} |")
    return "\n".join(lines) + "\n\n"


def _estimate(estimate: dict[str, float], form: str) -> str:
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
