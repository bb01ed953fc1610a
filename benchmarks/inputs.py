"""What every contender of one comparison starts from: the same base, adapter and rows, and the dtype to compute in."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.data.examples import EncodedExample
from nybble.data.prepare import prepare
from nybble.data.sampler import StepSampler
from nybble.data.template import ChatTemplate
from nybble.formats.safetensors import staged_folder
from nybble.layers.convert import attach_adapters, quantizable_linears
from nybble.layers.precision import resolve_compute_dtype
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.sources.load import load_model
from nybble.sources.open import open_model

RANK, ALPHA = 16, 32.0
ROWS_PER_STEP, MAX_SEQ_LEN = 8, 512
FULL_ROWS, FULL_LENGTH = 4, 256
IGNORE = -100
# What nybble computes in here, and the peers too: where a processor does not multiply bf16, that is slow for all.
DTYPE = resolve_compute_dtype("auto", torch.device("cpu"))
DTYPE_NAME = str(DTYPE).removeprefix("torch.")


@dataclass(frozen=True)
class Inputs:
    """Files that contenders read.

    Args:
        base: Hugging Face folder in bf16.
        adapter: PEFT folder, B = 0.
        answers, full: JSON, a list of steps, each a list of {"input_ids", "labels"}: questions with supervised
            answers, and rows of equal length in which every token is supervised.
    """

    base: Path
    adapter: Path
    answers: Path
    full: Path


def prepare_base(model: str, scratch: Path) -> Inputs:
    """Write what is missing of the base and the adapter."""
    folder = scratch / re.sub(r"\W+", "-", model).strip("-")
    inputs = Inputs(folder / "base", folder / "adapter", folder / "answers.json", folder / "full.json")
    if not inputs.adapter.is_dir():
        _write_model(model, inputs)
    return inputs


def prepare_inputs(model: str, data: str, scratch: Path, num_steps: int) -> Inputs:
    """Write what is missing of the base and the adapter, and the rows of `num_steps` steps."""
    inputs = prepare_base(model, scratch)
    tokenizer = open_model(str(inputs.base)).load_tokenizer()
    prepared = prepare(data, ChatTemplate(tokenizer, "auto"), max_seq_len=MAX_SEQ_LEN)
    prepared.audit.check()
    _write_steps(inputs.answers, _answer_steps(prepared.train, num_steps))
    _write_steps(inputs.full, _full_steps(prepared.train, num_steps))
    return inputs


def read_steps(path: Path) -> list[list[dict[str, list[int]]]]:
    steps: list[list[dict[str, list[int]]]] = json.loads(path.read_text())
    return steps


def describe_rows(steps: list[list[dict[str, list[int]]]]) -> dict[str, Any]:
    """How long the rows are, and how much of them is supervised."""
    lengths = [len(row["input_ids"]) for rows in steps for row in rows]
    supervised = sum(label != IGNORE for rows in steps for row in rows for label in row["labels"])
    return {
        "rows_per_step": len(steps[0]),
        "mean_tokens": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "supervised_part": supervised / sum(lengths),
    }


def _write_model(model: str, inputs: Inputs) -> None:
    source = open_model(model)
    dense = load_model(source, None, torch.bfloat16)
    if not inputs.base.is_dir():
        with staged_folder(inputs.base) as folder:
            dense.save_pretrained(folder)
            source.load_tokenizer().save_pretrained(folder)
    attach_adapters(dense, quantizable_linears(dense), rank=RANK, alpha=ALPHA)
    with staged_folder(inputs.adapter) as folder:
        write_adapter(dense, folder, adapter_config(dense, str(inputs.base)))


def _answer_steps(rows: list[EncodedExample], num_steps: int) -> list[list[dict[str, list[int]]]]:
    sampler = StepSampler(len(rows), ROWS_PER_STEP, seed=0)
    return [[_as_row(rows[row]) for row in sampler.next_step()] for _ in range(num_steps)]


def _as_row(example: EncodedExample) -> dict[str, list[int]]:
    labels = example.input_ids.masked_fill(~example.supervised, IGNORE)
    return {"input_ids": example.input_ids.tolist(), "labels": labels.tolist()}


def _full_steps(rows: list[EncodedExample], num_steps: int) -> list[list[dict[str, list[int]]]]:
    """Real text, one row after another, cut into rows of equal length; repeated where there is too little of it."""
    stream = torch.cat([row.input_ids for row in rows])
    needed = num_steps * FULL_ROWS * FULL_LENGTH
    stream = stream.repeat(-(-needed // len(stream)))[:needed]
    return [
        [{"input_ids": row, "labels": row} for row in step]
        for step in stream.view(num_steps, FULL_ROWS, FULL_LENGTH).tolist()
    ]


def _write_steps(path: Path, steps: list[list[dict[str, list[int]]]]) -> None:
    path.write_text(json.dumps(steps))
