"""Reward models: losses and gradients against TRL's formula over transformers' own scores; a run and what others read
of it; rows with margins.
"""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import make_data
from tiny_encoders import make_encoder
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, pipeline
from typed import typed

import nybble
from nybble.data.prepare import PreparedData, prepare
from nybble.data.reward_rows import pairs_of
from nybble.data.row_kinds import ROW_KINDS
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, DataError, ExportError
from nybble.exporting.consumers import widen
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
from nybble.layers.scored import ScoredModel, own_scores
from nybble.layers.trained import train_modules, trained_modules
from nybble.options.verbs import load_config
from nybble.runs.events import read_events
from nybble.runs.open_run import load_frozen, open_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.task import REWARD
from nybble.training.accumulation import forward_backward
from nybble.training.loop import validation_loss
from nybble.training.reward import RewardModelling
from nybble.training.session import train

PAIRS = [{"prompt": f"{n}?", "chosen": f"yes {n * 7 % 10} yes", "rejected": f"no {n * 3 % 10} no"} for n in range(40)]
MARGINS = [row | {"margin": n / 4} for n, row in enumerate(PAIRS[:5])]
CPU = torch.device("cpu")


def prepared(folder: Path, rows: Any, file: Path, **more: Any) -> PreparedData:
    template = ChatTemplate(AutoTokenizer.from_pretrained(folder))
    options = {"max_seq_len": 128, "validation_fraction": 0} | more
    return prepare(str(make_data(file, rows)), template, kind=ROW_KINDS["reward"], **options)


@pytest.mark.parametrize("kind", ["llama", pytest.param("deberta-v2", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_trls_formula(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Over transformers' scores of each conversation alone, however the step is cut; prompts are computed once."""
    folder = tiny_model if kind == "llama" else make_encoder(tmp_path / kind, kind)
    source = open_model(str(folder)).for_task(REWARD)
    model = load_model(source, BaseFormats(), torch.float32)
    attach_adapters(model, quantizable_linears(model), rank=4, alpha=8.0)
    train_modules(model, source.head_modules)
    torch.manual_seed(0)
    whole = [p for module in trained_modules(model).values() for p in module.trained.parameters()]
    for parameter in [*(adapter.lora_B for adapter in adapters_of(model).values()), *whole]:
        torch.nn.init.normal_(parameter, std=0.2)
    ours, objective = ScoredModel.of(model), RewardModelling(0.3)
    rows = pairs_of(prepared(folder, MARGINS, tmp_path / "rows.jsonl").train)

    scores = []
    for text in (text for row in rows for text in row.texts):
        ids = text.input_ids.long()[None]
        scores.append(own_scores(model, ids, torch.ones_like(ids))[0, 0])
    chosen, rejected = torch.stack(scores).view(-1, 2).T
    margins = torch.arange(5) / 4
    expected = -logsigmoid(chosen - rejected - margins).mean() + 0.3 * torch.mean((chosen + rejected) ** 2)
    expected.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [p.grad for p in parameters]
    told = [chosen.mean(), rejected.mean(), (chosen - rejected).mean(), (chosen > rejected).float().mean()]

    for size in (2, 5):
        model.zero_grad(set_to_none=True)
        totals = objective.totals(ours, rows, size)
        batches = [objective.collate(rows[start : start + size], ours) for start in range(0, 5, size)]
        parts = [forward_backward(objective, ours, batch, totals) for batch in batches]
        assert sum(part.loss.item() for part in parts) == pytest.approx(expected.item(), rel=1e-5)
        metrics = sum(part.metrics for part in parts if part.metrics is not None)
        assert metrics.tolist() == pytest.approx([each.item() for each in told], rel=1e-4, abs=1e-5)
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
        tokens = sum(sum(row.lengths) - (row.shared_tokens if kind == "llama" else 0) for row in rows)
        assert sum(batch.num_tokens for batch in batches) == tokens
    measured = validation_loss(objective, ours, rows, 2)
    assert [measured.loss, *measured.metrics.values()] == pytest.approx(
        [expected.item(), *(each.item() for each in told)], rel=1e-4
    )


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    options = {"model": str(tiny_model), "data": str(make_data(folder / "p.jsonl", PAIRS)), "out": str(folder / "run")}
    options |= {"objective": "reward", "max_steps": 12, "rows_per_step": 8, "rank": 4, "lr": 1e-2, "eval_every": 12}
    options |= {"compute_dtype": "fp32", "validation_fraction": 0.2, "memory": "4GB", "max_seq_len": 64}
    train(load_config(None, options))
    return folder / "run"


def test_it_learns_and_tells_what(run: Path) -> None:
    first, last = read_events(run / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and last["rewards/accuracies"] > 0.9
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    assert all("rewards/margins" in step for step in read_events(run / "events.jsonl", "step"))
    assert json.loads((run / "task.json").read_text())["labels"] == ["reward"]
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_evaluated_asked_and_merged(run: Path, tmp_path: Path) -> None:
    judged = nybble.evaluate(run, compute_dtype="fp32")
    last = list(read_events(run / "events.jsonl", "eval"))[-1]
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["loss"]["value"] == judged.loss().value == pytest.approx(last["loss"], rel=1e-3)
    assert report["accuracy"]["value"] == pytest.approx(last["rewards/accuracies"])
    assert (run / "report" / "margins.png").exists() and "margin" in (run / "adapter" / "README.md").read_text()
    opened = nybble.open_run(run)
    turns = [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "yes 1 yes"}]
    good, bad = opened.rewards([turns, ("3?", "no 9 no")])
    assert good > bad and opened.rewards([("3?", "yes 1 yes")]) == pytest.approx([good])
    merged = nybble.merge(run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    asked = pipeline("text-classification", model=str(merged.folder))
    text = AutoTokenizer.from_pretrained(merged.folder).apply_chat_template(turns, tokenize=False)
    assert asked(text)[0]["score"] == pytest.approx(good, rel=0.02)


def test_peft_gives_the_same_rewards(run: Path) -> None:
    opened = open_run(run)
    base = load_frozen(opened, torch.float32, CPU)
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base.float(), opened.run.adapter).eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    turns = [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "no 2 no"}]
    ids = torch.tensor([opened.template.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)])
    with torch.no_grad():
        assert nybble.open_run(run).rewards([turns]) == pytest.approx([own_scores(theirs, ids, None).item()], rel=1e-3)


def test_what_it_does_not_give_is_refused_in_words(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    opened = nybble.open_run(run)
    with pytest.raises(ConfigError, match=r"(?s)is of --objective reward.*rewards\(conversations\)"):
        opened.classify(["yes"])
    with pytest.raises(ExportError, match="language models"):
        nybble.export(run, to="gguf", out=tmp_path / "gguf")
    assert "does not write answers" in typed(["chat", "--run", run, "--prompt", "Hello"]).output
    with pytest.raises(DataError, match=r"(?s)of \d+ tokens.*up to 64"):
        opened.rewards([("3?", "y" * 60)])
    with pytest.raises(DataError, match="does not end in an answer"):
        opened.rewards([[{"role": "user", "content": "3?"}]])
    with pytest.raises(ConfigError, match="A conversation is 'Hello'"):
        opened.rewards(["Hello"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="rank is auto"):
        nybble.plan(model=tiny_model, objective="reward", rank="auto")
    with pytest.raises(ConfigError, match="objective is reward"):
        nybble.load_data("rows.jsonl", open_model(str(tiny_model)), objective="reward")


# ---- rows ----------------------------------------------------------------------------------------


def test_texts_are_whole_conversations_of_the_models_template(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "2?"), ("assistant", "4"), ("assistant", "5")))
    forms = [
        {"prompt": "2?", "chosen": "4", "rejected": "5", "margin": 1},
        {"chosen": [user, good], "rejected": [user, bad], "margin": "0.5"},
        {"prompt": [user], "chosen": [good], "rejected": [bad], "margin": None},
    ]
    for form, margin in zip(forms, (1.0, 0.5, 0.0), strict=True):
        (row,) = pairs_of(prepared(tiny_model, [form], tmp_path / "rows.jsonl").train)
        for text, answer in zip(row.texts, (good, bad), strict=True):
            assert text.input_ids.tolist() == tokenizer.apply_chat_template([user, answer], return_dict=False)
        assert row.margin == margin and row.texts[0].target == margin


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"margin": "far"}, "odd-margin"),
        ({"margin": math.inf}, "odd-margin"),
        ({"rejected": "yes"}, "equal-answers"),
        ({"chosen": " "}, "empty-answer"),
        ({"chosen": "y" * 200}, "too-long"),
    ],
)
def test_bad_pairs_are_named_counted_and_left_out(change: Any, finding: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(12)]
    data = prepared(tiny_model, [*rows, rows[0] | change], tmp_path / "rows.jsonl")
    found = {each.id: each.rows for each in data.audit.findings}
    assert found[finding] == ("rows.jsonl:13",) and data.audit.num_dropped == 1 and len(data.train) == 12
    data.audit.check()


def test_two_texts_a_pair_are_planned_for(tiny_model: Path) -> None:
    """As twice as many texts that are told apart."""
    sizes = {"max_seq_len": 256, "keep": "everything", "stream_base": "never", "rank": 4, "machine": "rtx-4090"}
    pairs = nybble.plan(model=tiny_model, objective="reward", rows_per_step=8, micro_batch_size=2, **sizes).chosen
    texts = nybble.plan(model=tiny_model, objective="classify", rows_per_step=16, micro_batch_size=4, **sizes).chosen
    assert pairs is not None and texts is not None
    head = "modules trained whole"
    assert pairs.components.pop(head) < texts.components.pop(head), "one number, not two"
    assert pairs.components == pytest.approx(texts.components, rel=0.01)
