"""Telling texts apart: losses and gradients, whole runs over decoders and encoders, what others read of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from short_runs import STEPS, classify, tensors_after
from tiny import make_data
from tiny_encoders import make_encoder, with_head
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typed import typed

import nybble
from nybble.data.row_kinds import ROW_KINDS
from nybble.data.text_rows import encode_texts
from nybble.errors import ConfigError, DataError, ExportError, ModelError
from nybble.exporting.consumers import widen
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.scored import ScoredModel, own_scores
from nybble.options.verbs import load_config
from nybble.quantization.folder import quantize_folder
from nybble.runs.events import read_events
from nybble.runs.open_run import load_frozen, load_tuned, open_run
from nybble.sizes import rules_for
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.task import SCORES, Task
from nybble.training.classify import Classification, objective_for
from nybble.training.session import train

WORDS = {"no": "bad", "so so": "fair", "yes": "good"}
ROWS = [{"text": f"{word} {n * 7 % 60} {word}", "label": label} for n in range(20) for label, word in WORDS.items()]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("texts") / "texts.jsonl", ROWS)


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "bert",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("roberta", "deberta-v2", "modernbert", "distilbert")),
    ],
)
def test_losses_and_gradients_are_the_models_own(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Of texts and pairs of different lengths together, in four bits, against transformers on each text alone."""
    folder = tiny_model if kind == "llama" else make_encoder(tmp_path / kind, kind)
    source = open_model(str(folder)).for_task(Task("scores", ("a", "b", "c"), "single_label_classification"))
    model = with_head(source)
    ours = ScoredModel.of(model)
    assert ours.verdict.path == ("blocks" if kind == "llama" else "generic") and ours.packed == (kind == "llama")
    if not ours.packed:
        ours.backbone.rules = rules_for("cpu", 2)  # rows are filled up as they are in 16 bits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [("short",), ("a longer text than that",), ("first of two", "and the second")]
    rows = [encode_texts(tokenizer, text, "row", target=float(n)) for n, text in enumerate(said)]
    objective = objective_for(source.task)
    batch = objective.collate(rows, ours)
    part = objective.loss(ours, batch, objective.totals(ours, rows, 3))
    part.loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in parameters]
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        ids, types = row.input_ids.long()[None], None if row.token_types is None else row.token_types.long()[None]
        scores = own_scores(model, ids, torch.ones_like(ids), types)
        total = total + F.cross_entropy(scores, torch.tensor([int(row.target or 0)])) / 3
    total.backward()
    assert part.loss.item() == pytest.approx(total.item(), rel=1e-4)
    for parameter, gradient in zip(parameters, found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def llama_run(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), folder / "base")
    return classify(folder / "base", texts, folder / "run")


@pytest.fixture(scope="module")
def bert_run(encoder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classify(encoder, texts, tmp_path_factory.mktemp("bert") / "run", max_steps=20, eval_every=20, memory="4GB")


def test_stopped_paged_or_streamed_the_bytes_are_the_same(llama_run: Path, texts: Path, tmp_path: Path) -> None:
    other = classify(llama_run.parent / "base", texts, tmp_path / "o", page_optimizer="always", stream_base="always")
    assert tensors_after(other, STEPS) == tensors_after(llama_run, STEPS)
    for step in range(2, STEPS + 1):
        shutil.rmtree(other / "checkpoints" / f"step-{step}")
    train(load_config(other / "config.yaml", {"out": str(other), "resume": True}))
    assert tensors_after(other, STEPS) == tensors_after(llama_run, STEPS)


def test_names_of_classes_are_nobodys_markup(encoder: Path, tmp_path: Path) -> None:
    """Neither the terminal's, which ended in its error or left part of the name out, nor the pictures'."""
    names = ("[/b]", "[red]x", "$_$", "a|b")
    rows = [{"text": f"{n % 4} {n}", "label": names[n % 4]} for n in range(40)]
    out = classify(encoder, make_data(tmp_path / "d.jsonl", rows), tmp_path / "run", max_steps=1, eval_every=1)
    shown = typed(["eval", "--run", out], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.exception
    assert all(f"│ {name} " in shown.stdout for name in names), shown.stdout
    assert (out / "report" / "confusion.png").stat().st_size > 1000
    assert "| a\\|b | " in (out / "adapter" / "README.md").read_text()


def test_an_encoder_learns_and_goes_on_to_the_bit(bert_run: Path) -> None:
    first, last = read_events(bert_run / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.9 and last["macro_f1"] > 0.9
    whole = (bert_run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(bert_run / "checkpoints" / "step-20")
    train(load_config(bert_run / "config.yaml", {"out": str(bert_run), "resume": True}))
    assert (bert_run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert json.loads((bert_run / "task.json").read_text())["labels"] == list(WORDS)


@pytest.mark.parametrize("which", ["llama_run", "bert_run"])
def test_peft_gives_the_same_scores(which: str, request: pytest.FixtureRequest) -> None:
    opened = open_run(request.getfixturevalue(which))
    tuned, base = load_tuned(opened, torch.float32, CPU), load_frozen(opened, torch.float32, CPU)
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base.float(), opened.run.adapter).eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    row = encode_texts(opened.template.tokenizer, ("good 1 good",), "row")
    model = ScoredModel.of(tuned)
    with torch.no_grad():
        scores = model.scores(model.collate([row]))
        torch.testing.assert_close(own_scores(theirs, row.input_ids.long()[None], None), scores, rtol=1e-4, atol=1e-4)


def test_evaluated_asked_and_merged(bert_run: Path, tmp_path: Path) -> None:
    judged = nybble.evaluate(bert_run)
    matrix = judged.confusion  # type: ignore[union-attr]
    report = json.loads((bert_run / "report" / "report.json").read_text())
    assert matrix.sum() == report["rows"] == 12
    hits = sum(matrix[i][i] for i in range(3))
    assert report["accuracy"]["value"] == pytest.approx(hits / 12) and (bert_run / "report" / "confusion.png").exists()
    for number, each in enumerate(report["classes"]):
        own, chosen, hit = matrix[number].sum(), matrix[:, number].sum(), matrix[number][number]
        assert each["f1"] == pytest.approx(2 * hit / (own + chosen))
    answers = nybble.open_run(bert_run).classify(["good 77 good", "bad 78 bad"])
    assert [label for label, _ in answers] == ["yes", "no"]
    merged = nybble.merge(bert_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    asked = pipeline("text-classification", model=str(merged.folder))
    for (label, probability), found in zip(answers, asked(["good 77 good", "bad 78 bad"]), strict=True):
        assert found["label"] == label and found["score"] == pytest.approx(probability, abs=0.02)
    with pytest.raises(ExportError, match="language models"):
        nybble.export(bert_run, to="gguf", out=tmp_path / "gguf")
    with pytest.raises(ConfigError, match="does not write answers"):
        nybble.open_run(bert_run).generate("Hello")
    assert "does not write answers" in typed(["chat", "--run", bert_run, "--prompt", "Hello"]).output
    asked = typed(["chat", "--model", merged.folder, "--prompt", "Hello"])
    assert asked.exit_code == 2 and "is an encoder, which writes no answers" in asked.output


def test_a_merged_decoder_scores_padded_texts_as_the_run_does(llama_run: Path, tmp_path: Path) -> None:
    merged = nybble.merge(llama_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    said = ["good 77 good", "bad"]
    ours = nybble.open_run(llama_run).classify(said)
    theirs = pipeline("text-classification", model=str(merged.folder))(said, batch_size=2)
    assert [each["score"] for each in theirs] == pytest.approx([probability for _, probability in ours], abs=0.02)


def test_numbers_are_learnt_where_labels_are_fractions(encoder: Path, tmp_path: Path) -> None:
    rows = [{"sentence": f"{'+-'[n % 2] * 6} {n}", "score": 0.05 + 0.9 * (n % 2)} for n in range(40)]
    out = classify(encoder, make_data(tmp_path / "n.jsonl", rows), tmp_path / "run", max_steps=15, eval_every=15)
    first, last = read_events(out / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and "accuracy" not in last
    ((label, number),) = nybble.open_run(out).classify(["++++++ 3"])
    assert label == "score" and isinstance(number, float)
    assert "correlation" in json.dumps(nybble.evaluate(out).figures())  # type: ignore[union-attr]


def test_a_head_in_the_checkpoint_is_taken_where_it_fits(tmp_path: Path) -> None:
    names = {"id2label": {0: "yes", 1: "no", 2: "so so"}, "label2id": {"yes": 0, "no": 1, "so so": 2}}
    folder = make_encoder(tmp_path / "m", head=True, **names)
    source = open_model(str(folder)).for_task(SCORES)
    data = nybble.check_data(model=folder, data=make_data(tmp_path / "t.jsonl", ROWS), objective="classify")
    taken = Classification().settled(data, source, None).task
    assert taken.labels == ("yes", "no", "so so") and taken.stored_head
    own = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded = load_model(source.for_task(taken), None, torch.float32)
    assert torch.equal(loaded.classifier.weight, own.classifier.weight)
    others = make_data(tmp_path / "o.jsonl", [row | {"label": f"{row['label']}!"} for row in ROWS])
    data = nybble.check_data(model=folder, data=others, objective="classify")
    anew = source.for_task(Classification().settled(data, source, None).task)
    assert set(anew.fresh) == {"classifier.weight", "classifier.bias"}
    assert 0 < load_model(anew, None, torch.float32).classifier.weight.std() < 0.1


# ---- rows ----------------------------------------------------------------------------------------


def audited(model: Path, folder: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    return nybble.check_data(model=model, data=make_data(folder / "r.jsonl", rows), objective="classify", **more).audit


def test_classes_and_their_counts_are_said(encoder: Path, tmp_path: Path) -> None:
    audit = audited(encoder, tmp_path, ROWS, validation_fraction=0.2)
    assert any(notice.startswith("3 classes: no ") and "(held out " in notice for notice in audit.notices)
    assert not audit.errors


@pytest.mark.parametrize(
    ("change", "finding", "level"),
    [
        (lambda n: {"label": "one"}, "one-label", "error"),
        (lambda n: {"label": 0.5 if n == 7 else "x" if n % 2 else "y"}, "mixed-labels", "error"),
        (lambda n: {"label": None if n == 7 else n % 2}, "missing-label", "warning"),
        (lambda n: {"label": "rare" if n == 7 else n % 2}, "rare-label", "warning"),
        (lambda n: {"text": " " if n == 7 else f"text {n}"}, "empty-text", "warning"),
    ],
)
def test_what_is_wrong_with_labels_is_named(change, finding, level, encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": str(n % 2)} | change(n) for n in range(24)]
    audit = audited(encoder, tmp_path, rows, validation_data=str(make_data(tmp_path / "v.jsonl", ROWS[:1])))
    found = next(found for found in audit.findings if found.id == finding)
    assert found.level == level and (finding == "one-label" or found.rows == ("r.jsonl:8",))


def test_labels_that_only_held_out_rows_have_stop_the_run(encoder: Path, texts: Path, tmp_path: Path) -> None:
    held_out = make_data(tmp_path / "v.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "new"}])
    with pytest.raises(DataError, match=r"unseen-label: 1 x .*v\.jsonl:2 \('new'\)"):
        classify(encoder, texts, tmp_path / "run", validation_data=str(held_out))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"--label-field(?s:.*)--text-field"),
        ({"tokens": ["a"], "other": [0]}, r"known forms: (?s:.*)ner_tags"),
    ],
)
def test_what_is_not_learnt_is_refused_in_words(row, message, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        audited(encoder, tmp_path, [row])


def test_options_of_conversations_are_refused(encoder: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train-on is last"):
        classify(encoder, texts, tmp_path / "run", train_on="last")
    with pytest.raises(ConfigError, match="encoder"):
        classify(encoder, texts, tmp_path / "run", quality="calibrated")


def test_an_encoder_that_is_to_write_is_told_what_it_can_learn(encoder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"It is an encoder.*--objective classify"):
        classify(encoder, data, tmp_path / "run", objective="sft")


def test_long_texts_are_cut_as_transformers_cuts_them(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for said in (("x" * 40,), ("ab" * 20, "cd" * 4), ("ab" * 3, "cd" * 30), ("ab" * 30, "cd" * 30)):
        row = encode_texts(tokenizer, said, "row").truncate(16)
        theirs = tokenizer(*said, truncation=True, max_length=16)
        assert row.input_ids.tolist() == theirs["input_ids"] and row.token_types is not None
        assert row.token_types.tolist() == theirs["token_type_ids"] and row.num_truncated > 0


def test_names_of_classes_come_from_data_sets_that_have_them(encoder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["off", "on"])})
    columns = {"text": [f"t {n}" for n in range(9)], "label": [n % 2 for n in range(8)] + [-1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    data = nybble.check_data(model=encoder, data=str(tmp_path / "saved"), objective="classify")
    assert any(notice.startswith("2 classes: off ") for notice in data.audit.notices)
    assert any(found.id == "missing-label" and found.num_rows == 1 for found in data.audit.findings)


def test_the_plan_has_no_logits(tiny_model: Path) -> None:
    plans = {name: nybble.plan(model=tiny_model, objective=name, memory="4GB").chosen for name in ("sft", "classify")}
    parts = {name: plan.components for name, plan in plans.items() if plan is not None}
    assert "room for logits" in parts["sft"] and "room for logits" not in parts["classify"]
    assert parts["classify"]["modules trained whole"] > 0
    assert ROW_KINDS["classify"].documents == 1
