"""Runs of every kind of model and rows: stopped, paged or killed they end as one that never stopped, to the bit.

Runs over Llamas are in test_resume.py, those of other objectives in test_preference_runs.py.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hybrids import CONFIGS, SHAPE, make_hybrid
from processes import nybble as command_line
from short_runs import resume, tensors_after
from tiny import make_data, make_decoder
from tiny_multimodal import make_multimodal, make_rows
from tiny_pictures import make_pictures, make_vision
from tiny_seq2seq import make_seq2seq

import nybble
from nybble.events import Event
from nybble.runs.events import read_events
from nybble.training.events import Step

STEPS, STOPPED = 4, 2
MOST_DENSE = 0.2  # a small Mamba's share
USUAL = {"max_steps": STEPS, "rows_per_step": 6, "micro_batch_size": 4, "rank": 4, "lr": 1e-2, "eval_every": 2}
USUAL |= {"save_every": 1, "keep_checkpoints": 9, "quality": "absmax", "validation_fraction": 0.2}
USUAL |= {"max_dense_share": MOST_DENSE}
TEXTS = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}{'!' * (n % 5)}."} for n in range(24)]
EXPERTS = {"target_modules": "all-linear,experts"}
QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16}
GEMMA4 = {  # an input of its own for each layer, the last of which reads the keys of the one before
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_hidden_layers": 3, "head_dim": 8,
    "global_head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
}  # fmt: skip
PAGED = {"page_optimizer": "always"}
STREAMED = PAGED | {"stream_base": "always"}
ALL = STREAMED | {"offload_activations": "always", "keep": "attention"}  # of decoder blocks


@dataclass(frozen=True)
class Kind:
    """A kind of runs.

    Args:
        model: makes one in a folder.
        rows: makes what it learns from, in a folder.
        more: options of all its runs.
        paging: those of the run that is stopped; over a base in four bits where its blocks are streamed.
    """

    model: Callable[[Path], Path]
    rows: Callable[[Path], Path] = lambda folder: make_data(folder / "rows.jsonl", TEXTS)
    more: dict[str, Any] = field(default_factory=dict)
    paging: dict[str, Any] = field(default_factory=lambda: STREAMED)


def _decoder(model_type: str, sizes: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: make_decoder(folder, model_type, **SHAPE | {"max_position_embeddings": 256} | sizes)


def _pictured(kind: str, **more: Any) -> Kind:
    allowed: dict[str, Any] = {"allow": ("near-leak",)}
    return Kind(partial(make_multimodal, kind=kind), make_rows, allowed | more, PAGED)


AUGMENTED = {"objective": "classify", "augment": "crop-flip"}
KINDS: dict[str, Kind] = {
    "pictures within texts, packed": _pictured("qwen2_5_vl"),
    "pictures within texts, padded": _pictured("gemma3"),
    "pictures within texts, both towers": _pictured("llava", quantize_towers="all"),
    "pictures": Kind(
        partial(make_vision, hidden_dropout_prob=0.1), lambda folder: make_pictures(folder, each=8), AUGMENTED
    ),
    "t5": Kind(partial(make_seq2seq, kind="t5", dropout_rate=0.1)),
    "bart": Kind(partial(make_seq2seq, kind="bart", dropout=0.1)),
    "qwen3_moe": Kind(_decoder("qwen3_moe", QWEN3_MOE), more=EXPERTS, paging=ALL),
    "gpt_oss": Kind(_decoder("gpt_oss", GPT_OSS), more=EXPERTS),
    "gemma4_text": Kind(_decoder("gemma4_text", GEMMA4), paging=ALL),
    **{name: Kind(partial(make_hybrid, name=name)) for name in CONFIGS},
}
ALWAYS = {"pictures within texts, packed", "pictures", "t5", "qwen3_moe", "gemma4_text", "qwen3_5_text"}
ROUTED = {"jamba"}  # of random weights, whose tokens roundings to bf16 send elsewhere: refused before the first step
EACH = [
    pytest.param(name, dtype, marks=[] if name in ALWAYS and dtype == "fp32" else pytest.mark.slow)
    for name in KINDS
    for dtype in ("fp32", "bf16")
    if not (name in ROUTED and dtype == "bf16")
]


def history(out: Path) -> list[dict[str, Any]]:
    """Steps and evaluations, each with what it found."""
    measured = {"step_s", "tokens_per_s", "memory_bytes"}
    events = [event for kind in ("step", "eval") for event in read_events(out / "events.jsonl", kind)]
    return [{name: value for name, value in event.items() if name not in measured} for event in events]


def end_of(out: Path) -> dict[str, Any]:
    """All that a finished run holds: adapter, moments, PyTorch's generator, its place in the rows, what it found."""
    state = json.loads((out / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())
    places = {name: state[name] for name in ("progress", "sampler")}
    return tensors_after(out, STEPS) | places | {"history": history(out)}


def base_and_rows(kind: Kind, folder: Path) -> dict[str, Any]:
    (folder / "rows").mkdir()
    model, data = kind.model(folder / "model"), kind.rows(folder / "rows")
    if "stream_base" in kind.paging:
        model = nybble.quantize(model=model, out=folder / "four-bits", max_dense_share=MOST_DENSE).folder
    return {"model": model, "data": data}


def stop(event: Event) -> None:
    if isinstance(event, Step) and event.step == STOPPED:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_stopped_and_paged_it_ends_as_one_that_ran_through(name: str, dtype: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    options = USUAL | base_and_rows(kind, tmp_path) | {"compute_dtype": dtype} | kind.more
    whole, other = tmp_path / "whole", tmp_path / "other"
    nybble.train(out=whole, **options)
    stopped = nybble.train(out=other, on_event=stop, **options | kind.paging)
    assert stopped.steps == STOPPED
    resume(other)
    assert end_of(other) == end_of(whole)
    chosen = json.loads((other / "plan.json").read_text())["chosen"]
    assert chosen["paged"] and (chosen["resident_blocks"] is not None) == ("stream_base" in kind.paging)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pictures within texts, packed", "t5", "qwen3_5_text"])
def test_killed_it_ends_as_one_that_ran_through(name: str, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    nybble.train(out=whole, **USUAL | base_and_rows(KINDS[name], tmp_path) | KINDS[name].more)
    killed = command_line("train", whole / "config.yaml", "--out", out, output=tmp_path / "printed")
    killed.wait_for(out / "events.jsonl", f'"step": {STOPPED}')
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.end()[0] == -signal.SIGKILL
    resume(out)
    assert end_of(out) == end_of(whole)
