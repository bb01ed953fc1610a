"""Labels of tokens, and several labels a text: losses and gradients, whole runs, what others read of them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from short_runs import STEPS, classify, tensors_after
from tiny import make_data
from tiny_encoders import make_encoder, with_head
from torch import Tensor
from transformers import AutoTokenizer, pipeline

import nybble
from nybble.data.text_rows import TextRow, encode_texts
from nybble.data.token_labels import encode_words
from nybble.errors import ConfigError, DataError, NybbleError, RunError
from nybble.exporting.consumers import widen
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.scored import ScoredModel, own_scores
from nybble.options.verbs import load_config
from nybble.quantization.folder import quantize_folder
from nybble.runs.events import read_events
from nybble.runs.open_run import load_frozen, load_tuned, open_run
from nybble.sources.open import open_model
from nybble.sources.task import SCORES, TAGS, Task
from nybble.training.classify import objective_for, settle_task
from nybble.training.session import train

CPU = torch.device("cpu")
SEVERAL = replace(SCORES, problem="multi_label_classification")


def marked(n: int) -> dict[str, Any]:
    """A text whose numbers are entities of one kind, and whose capitals are of another."""
    number, name = str(n * 7919 % 1000), "ABC"[: 1 + n % 3]
    text = f"of {number} by {name} so"
    spans = [{"start": 3, "end": 3 + len(number), "label": "NUM"}]
    start = text.index(name)
    return {"text": text, "spans": [*spans, {"start": start, "end": start + len(name), "label": "CAP"}]}


MARKED = [marked(n) for n in range(40)]
WORDS = [{"tokens": ["is", str(n), "A", "so"], "ner_tags": ["O", "B-NUM", "B-CAP", "O"]} for n in range(30)]
KINDS = {"red": ("bad", "good"), "wet": ("no", "yes")}
LISTS = [[kind for m, kind in enumerate(KINDS) if n >> m & 1] for n in range(48)]
TOLD = [
    {"text": " ".join(words[kind in kinds] for kind, words in KINDS.items()) + f" {n}", "labels": kinds}
    for n, kinds in enumerate(LISTS)
]


# ---- losses --------------------------------------------------------------------------------------


def compared(model: Any, task: Task, rows: Sequence[TextRow], labels: Sequence[Tensor], weights: Sequence[int]) -> Any:
    """Our loss and gradients of all rows together, against transformers' own loss of each row alone."""
    ours, objective = ScoredModel.of(model), objective_for(task)
    batch = objective.collate(rows, ours)
    part = objective.loss(ours, batch, objective.totals(ours, rows, len(rows)))
    part.loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in parameters])
    model.zero_grad()
    total = torch.zeros(())
    for row, label, weight in zip(rows, labels, weights, strict=True):
        types = {} if row.token_types is None else {"token_type_ids": row.token_types.long()[None]}
        loss = model(input_ids=row.input_ids.long()[None], labels=label[None], **types).loss
        total = total + loss * weight / sum(weights)
    total.backward()
    own = torch.cat([p.grad.flatten() for p in parameters])
    assert part.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert float((found - own).norm() / own.norm()) < 1e-5
    return ours


CASES = [
    ("llama", "blocks"),
    ("bert", "generic"),
    *(
        pytest.param(each, "generic", marks=pytest.mark.slow)
        for each in ("roberta", "deberta-v2", "modernbert", "distilbert", "gpt2")
    ),
]


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_losses_of_tokens_are_transformers_own(kind: str, path: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny_model if kind == "llama" else make_encoder(tmp_path / kind, kind)
    task = replace(TAGS, labels=("B-X", "I-X", "O", "P"))
    model, tokenizer = with_head(open_model(str(folder)).for_task(task)), AutoTokenizer.from_pretrained(folder)
    said = (["short"], ["a", "longer", "text", "than", "that"], ["two", "words"])
    rows, labels = [], []
    for words in said:
        row = encode_words(tokenizer, words, "row")
        assert row.units is not None
        target = torch.tensor([float((len(word) + n) % 4) for n, word in enumerate(words)])
        rows.append(replace(row, target=target))
        wanted = torch.full((len(row),), -100)
        wanted[row.places] = target.long()
        labels.append(wanted)
    ours = compared(model, task, rows, labels, [len(words) for words in said])
    assert ours.verdict.path == path and ours.packed == (kind == "llama")


@pytest.mark.parametrize(("kind", "path"), CASES[:2])
def test_losses_of_several_labels_are_transformers_own(kind: str, path: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny_model if kind == "llama" else make_encoder(tmp_path / kind, kind)
    task = replace(SEVERAL, labels=("x", "y", "z"))
    model, tokenizer = with_head(open_model(str(folder)).for_task(task)), AutoTokenizer.from_pretrained(folder)
    targets = [torch.tensor([[1.0, 0, 1]]), torch.zeros(1, 3), torch.tensor([[0.0, 1, 0]])]
    said = [("short",), ("a longer text than that",), ("first of two", "and the second")]
    rows = [encode_texts(tokenizer, text, "row", target=each) for text, each in zip(said, targets, strict=True)]
    compared(model, task, rows, [target[0] for target in targets], [1, 1, 1])


def test_a_decoder_drops_states_in_front_of_its_head_as_transformers_does(tiny_model: Path) -> None:
    model = with_head(open_model(str(tiny_model)).for_task(TAGS))
    ours = ScoredModel.of(model)
    row = encode_words(AutoTokenizer.from_pretrained(tiny_model), ["a", "b"], "row")
    batch = ours.collate([row])
    ours.train()
    torch.manual_seed(3)
    scores = ours.scores(batch)
    torch.manual_seed(3)
    states = model.dropout(ours.hidden(batch))
    assert model.dropout.p == 0.1 and torch.equal(scores, model.score(states.float()))
    assert not torch.equal(scores, ours.eval().scores(batch))


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def tagged_run(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tags")
    return classify(
        encoder, make_data(folder / "d.jsonl", MARKED), folder / "run", max_steps=15, eval_every=15, save_every=8
    )


@pytest.fixture(scope="module")
def llama_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), folder / "base")
    return classify(folder / "base", make_data(folder / "d.jsonl", WORDS), folder / "run")


@pytest.fixture(scope="module")
def several_run(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    return classify(
        encoder, make_data(folder / "d.jsonl", TOLD), folder / "run", max_steps=40, eval_every=40, save_every=40
    )


def test_entities_are_learnt_and_a_run_goes_on_to_the_bit(tagged_run: Path) -> None:
    first, last = read_events(tagged_run / "events.jsonl", "eval")
    assert first["entity_f1"] < 0.3 and last["entity_f1"] > 0.9 and last["accuracy"] > 0.95
    whole = (tagged_run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tagged_run / "checkpoints" / "step-15")
    train(load_config(tagged_run / "config.yaml", {"out": str(tagged_run), "resume": True}))
    assert (tagged_run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    labels = json.loads((tagged_run / "task.json").read_text())["labels"]
    assert labels == ["B-CAP", "B-NUM", "I-CAP", "I-NUM", "O"]


def test_a_streamed_decoder_learns_the_same_tags(llama_run: Path, tmp_path: Path) -> None:
    data = llama_run.parent / "d.jsonl"
    other = classify(llama_run.parent / "base", data, tmp_path / "o", page_optimizer="always", stream_base="always")
    assert tensors_after(other, STEPS) == tensors_after(llama_run, STEPS)


@pytest.mark.parametrize("which", ["llama_run", "tagged_run", "several_run"])
def test_peft_gives_the_same_scores(which: str, request: pytest.FixtureRequest) -> None:
    opened = open_run(request.getfixturevalue(which))
    tuned, base = load_tuned(opened, torch.float32, CPU), load_frozen(opened, torch.float32, CPU)
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base.float(), opened.run.adapter).eval()
    of_tokens = which != "several_run"
    kind = peft.PeftModelForTokenClassification if of_tokens else peft.PeftModelForSequenceClassification
    assert isinstance(theirs, kind)
    row = encode_words(opened.template.tokenizer, ["is", "12", "AB"], "row")
    row = row if of_tokens else replace(row, units=None)
    model = ScoredModel.of(tuned)
    with torch.no_grad():
        scores, own = model.scores(model.collate([row])), own_scores(theirs, row.input_ids.long()[None], None)
    torch.testing.assert_close(own[0, row.places] if of_tokens else own, scores, rtol=1e-4, atol=1e-4)


def test_tags_are_evaluated_asked_and_merged(tagged_run: Path, tmp_path: Path) -> None:
    judged: Any = nybble.evaluate(tagged_run)
    report = json.loads((tagged_run / "report" / "report.json").read_text())
    hits = said = there = 0
    for ours, theirs in judged.found:
        hits, said, there = hits + len(ours & theirs), said + len(ours), there + len(theirs)
    assert there == 2 * report["rows"] == 16
    assert report["entity_f1"]["value"] == pytest.approx(2 * hits / (said + there))
    assert [(each["label"], each["entities"]) for each in report["classes"]] == [("CAP", 8), ("NUM", 8)]
    assert (tagged_run / "report" / "confusion.png").exists()
    text = "of 4711 by AB so"
    (found,) = nybble.open_run(tagged_run).tag([text])
    merged = nybble.merge(tagged_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    theirs = pipeline("token-classification", model=str(merged.folder), aggregation_strategy="simple")(text)
    assert found == [(each["entity_group"], each["start"], each["end"]) for each in theirs] and len(found) == 2
    with pytest.raises(ConfigError, match=r"tag\(texts\)"):
        nybble.open_run(tagged_run).classify([text])


def test_words_are_tagged_one_each(llama_run: Path, tmp_path: Path) -> None:
    (tags,) = nybble.open_run(llama_run).tag([["is", "7", "A", ""]])
    assert len(tags) == 4 and tags[3] is None and {*tags[:3]} <= {"O", "B-NUM", "B-CAP"}
    assert nybble.merge(llama_run, out=tmp_path / "merged").outcome == "verified"


def test_several_labels_are_learnt_evaluated_asked_and_merged(several_run: Path, tmp_path: Path) -> None:
    first, last = read_events(several_run / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and last["micro_f1"] > 0.9 and last["macro_f1"] > 0.9
    judged: Any = nybble.evaluate(several_run)
    report = json.loads((several_run / "report" / "report.json").read_text())
    chosen, true = judged.scores > 0, judged.targets > 0
    micro = 2 * int((chosen & true).sum()) / int(chosen.sum() + true.sum())
    assert report["micro_f1"]["value"] == pytest.approx(micro) and "confusion" not in report
    for number, each in enumerate(report["classes"]):
        own, said, hit = true[:, number].sum(), chosen[:, number].sum(), (true & chosen)[:, number].sum()
        assert each["texts"] == own and each["f1"] == pytest.approx(float(2 * hit / (own + said)))
    text = "good no 77"
    (found,) = nybble.open_run(several_run).classify([text])
    assert [label for label, _ in found] == ["red"]
    merged = nybble.merge(several_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    (theirs,) = pipeline("text-classification", model=str(merged.folder), top_k=None)([text])
    likely = {each["label"]: each["score"] for each in theirs if each["score"] > 0.5}
    assert dict(found) == pytest.approx(likely, abs=0.02)


def test_labels_that_a_run_does_not_know_are_named(tagged_run: Path, several_run: Path, tmp_path: Path) -> None:
    strange = make_data(
        tmp_path / "s.jsonl", [TOLD[1], {"text": "a", "labels": ["odd"]}, {"text": "b", "labels": ["odd"]}]
    )
    with pytest.raises(DataError, match=r"s\.jsonl:2: 'odd', which the run does not know \(2 rows\)"):
        nybble.evaluate(several_run, data=strange)
    with pytest.raises(DataError, match="labels of another form"):
        nybble.evaluate(tagged_run, data=make_data(tmp_path / "w.jsonl", TOLD[:4]))


def test_a_run_does_not_go_on_under_another_head(tagged_run: Path, several_run: Path, tmp_path: Path) -> None:
    """Whatever is allowed to change; and the refusal leaves the run as it was."""
    whole = make_data(tmp_path / "w.jsonl", [{"text": f"row {n}", "label": n % 2} for n in range(40)])
    odd = make_data(tmp_path / "o.jsonl", [{"text": f"at {n}", "spans": [[0, 2, "ODD"]]} for n in range(40)])
    pairs = make_data(tmp_path / "p.jsonl", [{"anchor": f"one {n}", "positive": f"two {n}"} for n in range(40)])
    cases: list[tuple[Path, str, Path, type[NybbleError], str]] = [
        (tagged_run, "classify", whole, DataError, "labels of another form, which the run does not know"),
        (several_run, "classify", whole, DataError, "labels of another form, which the run does not know"),
        (tagged_run, "classify", odd, DataError, "'B-ODD', which the run does not know"),
        (tagged_run, "embed", pairs, RunError, r"gives scores of tokens \(B-CAP, .*; .* would be a model that embeds"),
    ]
    for out, objective, data, error, words in cases:
        kept = {name: (out / name).read_bytes() for name in ("config.yaml", "task.json", "base.json")}
        options = {"out": str(out), "resume": True, "objective": objective, "data": str(data)}
        with pytest.raises(error, match=words):
            train(load_config(out / "config.yaml", options | {"allow_change": "config,data"}))
        assert kept == {name: (out / name).read_bytes() for name in kept}
    assert nybble.open_run(tagged_run).tag([marked(3)["text"]])


def test_what_cannot_be_asked_is_refused(tagged_run: Path, several_run: Path) -> None:
    words, whole = nybble.open_run(tagged_run), nybble.open_run(several_run)
    for ask, one in ((words.tag, "Anna"), (whole.classify, "Anna")):
        with pytest.raises(ConfigError, match="stands by itself"):
            ask(one)
    for ask, odd in ((words.tag, None), (words.tag, ["a", None]), (whole.classify, None), (whole.classify, ("a",) * 3)):
        with pytest.raises(ConfigError, match="cannot be asked"):
            ask([odd])


def test_a_head_for_tokens_is_taken_where_the_checkpoint_has_one(tmp_path: Path) -> None:
    from nybble.data.labels import Classes
    from nybble.training.classify import labels_of_head

    names = {"id2label": {0: "O", 1: "B-X"}, "label2id": {"O": 0, "B-X": 1}}
    folder = make_encoder(tmp_path / "m", head="tags", **names)
    classes = Classes({"B-X": 3, "O": 5}, {}, form="tokens")
    source = open_model(str(folder)).for_task(SCORES)
    task = settle_task(classes, labels_of_head(source, "tags"))
    assert task.kind == "tags" and task.labels == ("O", "B-X") and task.stored_head
    assert labels_of_head(source) == ()
