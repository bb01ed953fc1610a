"""Embeddings: losses and gradients against plain formulas over transformers' own states, however a step is cut; runs
and what others read of them; against sentence-transformers itself.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from tiny import make_data
from tiny_encoders import make_encoder
from torch import Tensor
from transformers import AutoTokenizer
from typed import typed

import nybble
from nybble.data.embedding_rows import COMPARED_ROWS, ComparedTexts, compared_of
from nybble.data.field_names import FieldNames
from nybble.data.prepare import prepare
from nybble.data.template import ChatTemplate
from nybble.data.text_rows import encode_texts, texts_of
from nybble.errors import ConfigError, ExportError, ModelError
from nybble.evaluation.embeddings import embed_texts
from nybble.exporting.consumers import widen
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
from nybble.layers.embedded import EmbeddedModel
from nybble.options.verbs import load_config
from nybble.planning.report import method_rows
from nybble.runs.events import read_events
from nybble.runs.open_run import load_frozen, open_run
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.sentences import write_pooling
from nybble.sources.task import STATES, Task
from nybble.training.accumulation import forward_backward
from nybble.training.embed import Embedding, same_texts, spearman
from nybble.training.loop import validation_loss
from nybble.training.session import train

PYTHON = Path(__file__).parents[2] / ".venv-oracles" / "bin" / "python"
READER = Path(__file__).with_name("embed_with_sentence_transformers.py")
POOLINGS = ("mean", "cls", "last", "max")
SAID = [  # the second and the last have negatives; the third says what the first says
    ("what is two", "a number"),
    ("the sea", "much salted water", "dry land"),
    ("what is two?", "a number"),
    ("who", "a person, or several"),
    ("the sky", "blue", "green", "a hat"),
]
SCORED = [("a cat", "a kitten", 4.5), ("a cat", "a car", 1), ("to run", "to walk", 3), ("x", "y", 1)]
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
ROWS = [{"anchor": f"{n} {COLOURS[n % 8]}", "positive": f"it is {COLOURS[n % 8]} {n}"} for n in range(40)]
STEPS = 6
CPU = torch.device("cpu")


def rows_of(tokenizer: Any, said: Sequence[Sequence[Any]]) -> list[ComparedTexts]:
    """Numbered rows of these texts; a number at the end is a score."""
    made = []
    for number, row in enumerate(said):
        texts = [encode_texts(tokenizer, [text], f"rows:{number}") for text in row if isinstance(text, str)]
        score = None if isinstance(row[-1], str) else float(row[-1])
        made.append(ComparedTexts.of(texts, score=score, number=number))
    return made


def loaded(folder: Path, adapters: bool = True) -> Any:
    source = open_model(str(folder)).for_task(STATES)
    model = load_model(source, BaseFormats() if adapters else None, torch.float32, narrow_ends=adapters)
    if adapters:
        attach_adapters(model, quantizable_linears(model), rank=4, alpha=8.0)
        torch.manual_seed(0)
        for adapter in adapters_of(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
    return model


# ---- the plain formulas --------------------------------------------------------------------------


def pandas_spearman(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return pd.Series(ours).rank().corr(pd.Series(theirs).rank())


def alone(model: Any, ids: Tensor, pooling: str) -> Tensor:
    """The embedding of one text, by transformers' own forward."""
    states = model(input_ids=ids.long()[None], attention_mask=torch.ones(1, len(ids)).long()).last_hidden_state[0]
    by = {"mean": states.mean(0), "cls": states[0], "last": states[-1], "max": states.max(0).values}
    return by[pooling] / by[pooling].norm()


def plain(model: Any, rows: Sequence[ComparedTexts], pooling: str, scale: float) -> tuple[Tensor, list[float]]:
    """Loss and metrics: of each anchor a softmax over its own positive and what says something else."""
    texts = [[alone(model, text.input_ids, pooling) for text in row.texts] for row in rows]
    said = [[tuple(text.input_ids.tolist()) for text in row.texts] for row in rows]
    if rows[0].score is not None:
        cosines = torch.stack([pair[0] @ pair[1] for pair in texts])
        scores = [row.score or 0.0 for row in rows]
        wrong = [torch.exp(scale * (cosines[i] - cosines[j])) for i in range(len(rows)) for j in range(len(rows))
                 if scores[i] < scores[j]]  # fmt: skip
        return torch.log(1 + torch.stack(wrong).sum()), [pandas_spearman(cosines.tolist(), scores)]
    losses, ranks = [], []
    for i, row in enumerate(texts):
        own, near = row[0] @ row[1], {said[i][0], *(each[1] for each in said if each[0] == said[i][0])}
        others = [row[0] @ text for j, other in enumerate(texts) for k, text in enumerate(other[1:], 1)
                  if said[j][k] not in near]  # fmt: skip
        others = torch.stack(others)
        losses.append(-torch.log(torch.exp(scale * own) / (torch.exp(scale * own) + torch.exp(scale * others).sum())))
        ranks.append(1 + int((others >= own).sum()))
    told = [sum(rank == 1 for rank in ranks) / len(ranks), sum(1 / rank for rank in ranks) / len(ranks)]
    return torch.stack(losses).mean(), told


WAYS = [("llama", "last"), ("bert", "mean")]
SLOW = [("llama", pooling) for pooling in POOLINGS[:2] + POOLINGS[3:]] + [("bert", pooling) for pooling in POOLINGS[1:]]
SLOW += [("roberta", "cls"), ("modernbert", "mean"), ("deberta-v2", "max"), ("distilbert", "mean")]


@pytest.mark.parametrize(("kind", "pooling"), [*WAYS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_step_is_the_formula_however_it_is_cut(kind: str, pooling: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny_model if kind == "llama" else make_encoder(tmp_path / kind, kind)
    model = loaded(folder)
    ours, tokenizer = EmbeddedModel.of(model), AutoTokenizer.from_pretrained(folder)
    assert ours.verdict.path == ("blocks" if kind == "llama" else "generic") and ours.packed == (kind == "llama")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for said in (SAID, SCORED):
        rows = rows_of(tokenizer, said)
        objective = Embedding(None, 9.0, Task("states", pooling=pooling), scored=said is SCORED)
        model.eval()
        expected, told = plain(model, rows, pooling, 9.0)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        for size in (2, 5):
            model.zero_grad(set_to_none=True)
            model.training = True  # and its modules are not: nothing is dropped
            totals = objective.totals(ours, rows, size)
            batches = [objective.collate(rows[start : start + size], ours) for start in range(0, len(rows), size)]
            parts = [forward_backward(objective, ours, batch, totals) for batch in batches]
            assert sum(part.loss.item() for part in parts) == pytest.approx(expected.item(), rel=1e-4)
            metrics = sum(part.metrics for part in parts if part.metrics is not None)
            assert metrics.tolist() == pytest.approx(told, abs=1e-6)
            for parameter, gradient in zip(parameters, wanted, strict=True):
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found, torch.zeros_like(found) if gradient is None else gradient,
                                           rtol=2e-3, atol=2e-5)  # fmt: skip
        measured = validation_loss(objective, ours, rows, 2)
        assert [measured.loss, *measured.metrics.values()] == pytest.approx([expected.item(), *told], rel=1e-4)


def test_what_is_dropped_is_dropped_again(tmp_path: Path) -> None:
    """The gradient is that of one pass over the whole step with the same random numbers."""
    folder = make_encoder(tmp_path / "bert", hidden_dropout_prob=0.3)
    model = loaded(folder)
    ours = EmbeddedModel.of(model).train()
    rows = rows_of(AutoTokenizer.from_pretrained(folder), SAID)
    objective = Embedding(None, 20.0, Task("states", pooling="mean"))
    batch = objective.collate(sorted(rows, key=lambda row: -len(row)), ours)
    parameters = [p for p in model.parameters() if p.requires_grad]

    torch.manual_seed(3)
    embeddings = ours.embeddings(batch, "mean").double()
    loss = objective.terms_of(embeddings, [rows[number] for number in batch.numbers])[0].mean()
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    torch.manual_seed(3)
    part = forward_backward(objective, ours, batch, objective.totals(ours, rows, 5))
    assert part.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_what_says_the_same_is_no_negative(tiny_model: Path) -> None:
    rows = rows_of(AutoTokenizer.from_pretrained(tiny_model), [("a", "b", "c"), ("d", "b"), ("a", "e"), ("b", "a")])
    candidates = ["b", "c", "b", "e", "a"]
    same = [{"b", "a", "e"}, {"b", "d"}, {"e", "a", "b"}, {"a", "b"}]  # of "a" both "b" and "e" are positives
    assert same_texts(rows).tolist() == [[each in texts for each in candidates] for texts in same]


def test_ranks_are_correlated_as_pandas_does() -> None:
    ours, theirs = [3.0, 1.0, 1.0, 2.0, 9.0, 1.0], [1.0, 0.0, 2.0, 2.0, 7.0, 0.5]
    assert spearman(ours, theirs) == pytest.approx(pandas_spearman(ours, theirs))
    assert spearman(ours, [1.0] * 6) == 0.0


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def run(model: Path, rows: Any, out: Path, **more: Any) -> Path:
    data = make_data(out.parent / f"{out.name}.jsonl", rows)
    options = {"model": str(model), "data": str(data), "out": str(out), "objective": "embed", "max_steps": STEPS}
    options |= {"rows_per_step": 8, "micro_batch_size": 3, "rank": 4, "lr": 3e-3, "eval_every": STEPS}
    options |= {"compute_dtype": "fp32", "save_every": STEPS // 2, "keep_checkpoints": 9, "validation_fraction": 0.2}
    train(load_config(None, options | more))
    return out


@pytest.fixture(scope="module")
def bert_run(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(encoder, ROWS, tmp_path_factory.mktemp("bert") / "run", memory="4GB")


def test_it_learns_and_goes_on_to_the_bit(bert_run: Path) -> None:
    first, last = read_events(bert_run / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and last["mrr"] >= first["mrr"] and 0 <= last["accuracy"] <= 1
    whole = (bert_run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(bert_run / "checkpoints" / f"step-{STEPS}")
    train(load_config(bert_run / "config.yaml", {"out": str(bert_run), "resume": True}))
    assert (bert_run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert json.loads((bert_run / "task.json").read_text())["pooling"] == "mean"


def test_peft_gives_the_same_embeddings(bert_run: Path) -> None:
    opened = open_run(bert_run)
    base = load_frozen(opened, torch.float32, CPU)
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base.float(), opened.run.adapter).eval()
    assert isinstance(theirs, peft.PeftModelForFeatureExtraction)
    texts = ["3 red", "it is brown"]
    with torch.no_grad():
        ids = [torch.tensor(opened.template.tokenizer(text)["input_ids"]) for text in texts]
        wanted = torch.stack([alone(theirs, each, "mean") for each in ids])
    torch.testing.assert_close(
        nybble.open_run(bert_run, compute_dtype="fp32").embed(texts), wanted, rtol=1e-4, atol=1e-5
    )


def test_evaluated_merged_and_asked(bert_run: Path, tmp_path: Path) -> None:
    found: Any = nybble.evaluate(bert_run)
    first, *_, last = read_events(bert_run / "events.jsonl", "eval")
    report = json.loads((bert_run / "report" / "report.json").read_text())
    for arm, event in (("base", first), ("tuned", last)):
        assert report["recall@1"][arm]["value"] == pytest.approx(event["accuracy"])
        assert report["mrr"][arm]["value"] == pytest.approx(event["mrr"], abs=1e-6)
    assert (bert_run / "report" / "cosines.png").exists() and "recall@1" in (bert_run / "adapter/README.md").read_text()
    assert found.figures()["recall@10"][1].value >= found.figures()["recall@1"][1].value
    merged = nybble.merge(bert_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    assert open_model(str(merged.folder)).pooling == "mean"
    assert json.loads((merged.folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 130
    opened = nybble.open_run(bert_run)
    with pytest.raises(ConfigError, match=r"(?s)is of --objective embed.*embed\(texts\)"):
        opened.classify(["red"])
    for odd in ("red", [None], [("red", "blue")]):
        with pytest.raises(ConfigError, match=r"stands by itself|cannot be asked"):
            opened.embed(odd)
    with pytest.raises(ConfigError, match=r"does not write answers(?s:.*)embed\(texts\)"):
        opened.generate("red")
    with pytest.raises(ExportError, match="language models"):
        nybble.export(bert_run, to="gguf", out=tmp_path / "gguf")
    assert "a model that embeds texts" in typed(["chat", "--run", bert_run, "--prompt", "Hello"]).output


def test_a_decoder_learns_the_order_of_scores(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": f"{n}", "sentence2": "+" * (1 + n % 4) + f"{n}", "score": -(n % 4)} for n in range(40)]
    out = run(tiny_model, rows, tmp_path / "run", pooling="mean", similarity_scale=10)
    first, last = read_events(out / "events.jsonl", "eval")
    assert last["loss"] < first["loss"] and last["spearman"] > first["spearman"]
    found: Any = nybble.evaluate(out)
    base, tuned = found.figures()["spearman"]
    assert (base.value, tuned.value) == pytest.approx((first["spearman"], last["spearman"]), abs=1e-6)


# ---- what the model's files say ------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_read_from_the_models_files(pooling: Any, encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    data = nybble.check_data(model=encoder, data=make_data(tmp_path / "r.jsonl", ROWS), objective="embed")
    assert Embedding(None, 20.0).settled(data, open_model(str(folder)), None).task.pooling == "mean"
    write_pooling(folder, pooling, 64, 100)
    source = open_model(str(folder)).for_task(STATES)
    assert Embedding(None, 20.0).settled(data, source, None).task.pooling == pooling
    assert Embedding("cls", 20.0).settled(data, source, None).task.pooling == "cls"
    config = folder / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": "weightedmean"}))
    with pytest.raises(ModelError, match=r"the pooling weightedmean(?s:.*)lasttoken"):
        Embedding(None, 20.0).settled(data, source, None)
    config.write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": "lasttoken"}))
    assert source.pooling == "last"
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "x.models.Dense", "path": "3_Dense"}]))
    with pytest.raises(ModelError, match=r"names a module Dense"):
        assert source.pooling
    prompts = {"prompts": {"query": "query: ", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert any("prompts (query)" in note for note in open_model(str(folder)).for_task(STATES).notes)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no oracles: `make .venv-oracles/.installed` needs PyPI")
def test_sentence_transformers_gives_the_same(bert_run: Path, encoder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Embeddings of a merged run, and of folders of every pooling; losses of theirs and ours over the same rows."""
    texts = ["3 red", "it is a rather long text, which is brown", "a"]
    rows = [(*row[:2], row[2] if len(row) > 2 else f"no {n}") for n, row in enumerate(SAID) if n != 2]
    merged = nybble.merge(bert_run, out=tmp_path / "merged").folder
    folders = {}
    for base in (encoder, tiny_model):
        for pooling in POOLINGS:
            folder = tmp_path / f"{base.name}-{pooling}"
            shutil.copytree(base, folder)
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.pad_token = "<|endoftext|>"
            tokenizer.save_pretrained(folder)
            write_pooling(folder, pooling, 64, 100)
            folders[str(folder)] = pooling
    asked = {"folders": [*folders, str(merged)], "texts": texts, "rows": rows}
    asked |= {"pairs": [row[:2] for row in SCORED], "scores": [row[2] for row in SCORED]}
    done = subprocess.run([PYTHON, READER], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout)
    wanted = nybble.open_run(bert_run).embed(texts)
    torch.testing.assert_close(torch.tensor(theirs[str(merged)]["embeddings"]), wanted, rtol=0, atol=0.01)
    for folder, pooling in folders.items():
        model, tokenizer = EmbeddedModel.of(loaded(Path(folder), adapters=False)), AutoTokenizer.from_pretrained(folder)
        found = embed_texts(model, [encode_texts(tokenizer, [text], "row") for text in texts], pooling)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.tensor(theirs[folder]["embeddings"]), found, rtol=1e-4, atol=1e-5)
        for name, said in (("contrast", rows), ("cosent", SCORED)):
            objective = Embedding(None, 20.0, Task("states", pooling=pooling), scored=name == "cosent")  # type: ignore[arg-type]
            loss = validation_loss(objective, model, rows_of(tokenizer, said), 2).loss
            assert loss == pytest.approx(theirs[folder][name], rel=1e-4)


# ---- rows ----------------------------------------------------------------------------------------


def audited(model: Path, folder: Path, rows: Sequence[Any], fields: FieldNames | None = None, **more: Any) -> Any:
    template = ChatTemplate(AutoTokenizer.from_pretrained(model), "none")
    options = {"validation_fraction": 0, "max_seq_len": 128, "fields": fields, "kind": COMPARED_ROWS} | more
    return prepare(str(make_data(folder / "r.jsonl", rows)), template, **options)


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"anchor": "a", "positive": "b"}, [["a", "b"]]),
        ({"query": "a", "document": "b"}, [["a", "b"]]),
        ({"question": "a", "answer": "b"}, [["a", "b"]]),
        ({"sentence1": "a", "sentence2": "b"}, [["a", "b"]]),
        ({"anchor": "a", "positive": "b", "negative": "c"}, [["a", "b", "c"]]),
        ({"query": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, [["a", "b", "c", "d"]]),
        ({"query": "a", "pos": ["b", "c"], "neg": ["d"]}, [["a", "b", "d"], ["a", "c", "d"]]),
        ({"anchor": "a", "positive": "b", "negatives": []}, [["a", "b"]]),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, [["a", "b"]]),
    ],
)
def test_every_form_of_rows_is_read(row: Any, texts: list[list[str]], encoder: Path, tmp_path: Path) -> None:
    data = audited(encoder, tmp_path, [row])
    decode = AutoTokenizer.from_pretrained(encoder).decode
    found = [[decode(t.input_ids, skip_special_tokens=True) for t in each.texts] for each in compared_of(data.train)]
    assert found == texts
    assert [each.score for each in compared_of(data.train)] == [row.get("score")] * len(texts)
    assert not {"unread-columns", "unread-lesson"} & {each.id for each in data.audit.findings}


def test_own_names_of_columns_are_taken(encoder: Path, tmp_path: Path) -> None:
    row = {"name": "a", "doc": "b", "other": "c", "near": "0.3"}
    (triplet,) = compared_of(audited(encoder, tmp_path, [row], FieldNames(text="name,doc,other")).train)
    assert len(triplet.lengths) == 3 and triplet.score is None
    (pair,) = compared_of(audited(encoder, tmp_path, [row], FieldNames(text="name,doc", label="near")).train)
    assert len(pair.lengths) == 2 and pair.score == 0.3
    with pytest.raises(ConfigError, match="--prompt-field is given, and rows are texts that are compared"):
        audited(encoder, tmp_path, [row], FieldNames(prompt="name", completion="doc"))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"positive": "7"}, "equal-texts"),
        ({"negative": "n 7"}, "equal-texts"),
        ({"anchor": " "}, "empty-text"),
        ({"positive": 3.5, "negative": None, "anchor": ["a", "b"]}, "not-text"),
    ],
)
def test_bad_rows_are_named_counted_and_left_out(change: Any, finding: str, encoder: Path, tmp_path: Path) -> None:
    rows = [{"anchor": f"{n}", "positive": f"n {n}", "negative": "x"} for n in range(24)]
    rows[7] |= change
    audit = audited(encoder, tmp_path, rows).audit
    found = {each.id: each for each in audit.findings}
    assert found[finding].rows == ("r.jsonl:8",) and found[finding].level == "warning" and audit.num_dropped == 1


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([{"sentence1": f"{n}", "sentence2": "y", "score": 1} for n in range(9)], "one-score"),
        ([{"anchor": "a", "positive": "b"}], "one-pair"),
    ],
)
def test_training_stops_where_nothing_would_be_learnt(rows: Any, finding: str, encoder: Path, tmp_path: Path) -> None:
    assert finding in {found.id for found in audited(encoder, tmp_path, rows).audit.errors}


@pytest.mark.parametrize("more", [{}, {"score": 0.5}, {"negative": "far"}])
def test_a_pair_that_is_held_out_alone_is_named(more: Any, encoder: Path, tmp_path: Path) -> None:
    """Its loss is 0; with a negative beside it, it is not."""
    rows = [{"anchor": f"{n}", "positive": f"n {n}"} | more for n in range(9)]
    rows = [row | {"score": n / 9} if "score" in row else row for n, row in enumerate(rows)]
    held_out = make_data(tmp_path / "one.jsonl", [{"anchor": "u", "positive": "v"} | more])
    found = {each.id for each in audited(encoder, tmp_path, rows, validation_source=str(held_out)).audit.findings}
    assert ("one-held-out-pair" in found) == ("negative" not in more)


def test_scores_that_only_some_have_stop_the_run(encoder: Path, tmp_path: Path) -> None:
    scored = make_data(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    audit = audited(encoder, tmp_path, ROWS, validation_source=str(scored)).audit
    (found,) = audit.errors
    assert found.id == "mixed-scores" and found.rows == ("s.jsonl:1",)
    odd = [{"sentence1": f"{n}", "sentence2": "b", "score": n if n != 3 else "near"} for n in range(24)]
    (found,) = (each for each in audited(encoder, tmp_path, odd).audit.findings if each.id == "odd-score")
    assert found.rows == ("r.jsonl:4",) and "'near'" in found.detail


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "sentence2": "b", "label": 1}, r"(?s)label.*--label-field label"),
        ({"text": "a"}, r"(?s)without two texts.*--text-field"),
    ],
)
def test_what_is_not_known_is_refused_in_words(row: Any, message: str, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(nybble.NybbleError, match=message):
        audited(encoder, tmp_path, [row])


def test_a_step_of_one_pair_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows-per-step is 1, and objective is embed"):
        nybble.plan(model=encoder, objective="embed", rows_per_step=1)
    with pytest.raises(ConfigError, match=r"pooling"):
        nybble.plan(model=encoder, objective="embed", pooling="median")
    with pytest.raises(ConfigError, match=r"pooling is mean, and objective is sft"):
        nybble.plan(model=encoder, pooling="mean")


def test_long_texts_lose_their_end_and_keep_what_is_around_them(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    (row,) = rows_of(tokenizer, [("x" * 40, "short", "y" * 30)])
    for text, said in zip(row.truncate(16).texts, ("x" * 40, "short", "y" * 30), strict=True):
        assert text.input_ids.tolist() == tokenizer(said, truncation=True, max_length=16)["input_ids"]
    assert row.truncate(16).num_truncated == (42 - 16) + (32 - 16) and len(texts_of([row])) == 3


def test_a_pass_more_is_planned_for(tiny_model: Path) -> None:
    sizes = {"max_seq_len": 256, "keep": "everything", "stream_base": "never", "rank": 4, "machine": "rtx-4090"}
    compared = nybble.plan(model=tiny_model, objective="embed", rows_per_step=8, micro_batch_size=2, **sizes).chosen
    scored = nybble.plan(model=tiny_model, objective="reward", rows_per_step=8, micro_batch_size=2, **sizes).chosen
    assert compared is not None and scored is not None and compared.step_s > scored.step_s
    methods = {row[0]: row[-1] for row in method_rows(nybble.plan(model=tiny_model, objective="embed", **sizes).plans)}
    assert methods["full"] == "--objective embed trains adapters" and methods["lora"] == "fits: --method lora"
    assert "room for logits" not in compared.components
