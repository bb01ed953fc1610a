"""Encoder-decoders: losses and gradients, whole runs, what others read of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from short_runs import tensors_after
from tiny import make_data, tune
from tiny_encoders import make_encoder
from tiny_seq2seq import GATED, make_seq2seq
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typed import typed

import nybble
from nybble.data.examples import Example
from nybble.data.prompted_rows import PromptedRow
from nybble.data.prompts import PromptTemplate, encode_prompted
from nybble.errors import ConfigError, ExportError, ModelError
from nybble.exporting.consumers import widen
from nybble.formats.quant_spec import BaseFormats
from nybble.generation.generate import generate
from nybble.layers.seq2seq_lm import Seq2SeqLM
from nybble.options.option import build_options
from nybble.options.verbs import TrainConfig, load_config
from nybble.runs.events import read_events
from nybble.runs.open_run import load_frozen, load_tuned, open_run
from nybble.sizes import rules_for
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.task import SEQ2SEQ
from nybble.training.session import train

SAID = [("2 + 2?", "4"), ("What is the colour of snow?", "White, mostly."), ("Hi", "Hello")]


def rows_of(tokenizer: Any) -> list[Any]:
    template = PromptTemplate(tokenizer)
    examples = [Example("row", prompt=prompt, completion=answer) for prompt, answer in SAID]
    return [row for example in examples for row in encode_prompted(template, example)]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("t5", {}),
        ("bart", {}),
        *(
            pytest.param(kind, more, marks=pytest.mark.slow)
            for kind, more in (("t5", GATED), ("mt5", {}), ("umt5", {}), ("mbart", {}), ("pegasus", {}), ("marian", {}))
        ),
    ],
)
def test_losses_and_gradients_are_the_models_own(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Of padded rows together, in four bits, against transformers on each row alone, from its labels."""
    folder = make_seq2seq(tmp_path / kind, kind, **more)
    source = open_model(str(folder)).for_task(SEQ2SEQ)
    model = tune(load_model(source, BaseFormats(), torch.float32), rank=4, std=0.1, alpha=8.0)
    own = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight.float(), own.lm_head.weight.bfloat16().float())
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight) == (
        own.lm_head.weight is own.get_input_embeddings().weight
    )
    ours = Seq2SeqLM.of(model)
    assert ours.verdict.path == "generic" and not ours.packed
    ours.backbone.rules = rules_for("cpu", 2)  # rows are filled up as they are in 16 bits
    rows = rows_of(AutoTokenizer.from_pretrained(folder))
    loss = ours.loss(ours.collate(rows))
    loss.backward()
    parameters = ours.parameters()
    found = torch.cat([p.grad.flatten() for p in parameters])
    model.zero_grad()
    total, count = torch.zeros(()), sum(row.supervised_tokens for row in rows)
    for row in rows:
        labels = row.label_ids.long()[None]
        total = total + model(input_ids=row.encoder_ids.long()[None], labels=labels).loss * labels.numel() / count
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in parameters])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


# ---- whole runs ----------------------------------------------------------------------------------

WORDS = ("red", "green", "blue", "black")
ROWS = [{"prompt": f"{n * 7 % 60} {WORDS[n % 4]}", "completion": f"is {WORDS[n % 4]}."} for n in range(40)]
CPU = torch.device("cpu")


def short_run(model: Path, data: Path, out: Path, **more: Any) -> Path:
    options = {"model": str(model), "data": str(data), "out": str(out), "rank": 4, "lr": 2e-2, "compute_dtype": "fp32"}
    options |= {"rows_per_step": 8, "max_steps": 4, "eval_every": 4, "validation_rows": 8, "validation_fraction": 0.2}
    options |= {"save_every": 1, "keep_checkpoints": 9}
    train(build_options(TrainConfig, options | more))
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seq2seq(tmp_path_factory.mktemp("t5") / "base", dropout_rate=0.0)


@pytest.fixture(scope="module")
def t5_run(t5: Path, rows: Path) -> Path:
    return short_run(t5, rows, t5.parent / "run", max_steps=30, eval_every=30, memory="4GB", save_every=15)


def test_it_learns_and_goes_on_to_the_bit(t5_run: Path) -> None:
    first, last = read_events(t5_run / "events.jsonl", "eval")
    assert last["loss"] < 0.7 * first["loss"]
    whole = (t5_run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(t5_run / "checkpoints" / "step-30")
    train(load_config(t5_run / "config.yaml", {"out": str(t5_run), "resume": True}))
    assert (t5_run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert json.loads((t5_run / "task.json").read_text())["kind"] == "seq2seq"
    assert "packing: false" in (t5_run / "config.yaml").read_text()
    plan = json.loads((t5_run / "plan.json").read_text())
    assert plan["measured"]["peak_bytes"] <= plan["chosen"]["peak_bytes"]


def test_answers_are_transformers_own_and_peft_gives_the_same(t5_run: Path, t5: Path) -> None:
    opened = open_run(t5_run)
    tuned, base = load_tuned(opened, torch.float32, CPU), load_frozen(opened, torch.float32, CPU)
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base.float(), opened.run.adapter).eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    prompts = ["7 red", "a longer one, 21 green"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = generate(tuned, ids, stop_ids=opened.template.stop_ids, max_new_tokens=12)
    for prompt, answer in zip(ids, answers, strict=True):
        given = torch.tensor([prompt])
        own = theirs.generate(input_ids=given, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        assert answer == [token for token in own if token != tokenizer.eos_token_id] and answer
        labels = torch.tensor([[*answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = theirs(input_ids=given, labels=labels).logits
            torch.testing.assert_close(tuned(input_ids=given, labels=labels).logits, logits, rtol=1e-4, atol=1e-4)
    assert nybble.open_run(t5_run).generate("7 red", max_new_tokens=12) == tokenizer.decode(answers[0])


def test_evaluated(t5_run: Path) -> None:
    evaluation = nybble.evaluate(t5_run, answers=2)
    report = json.loads((t5_run / "report" / "report.json").read_text())
    assert report["arms"]["tuned"]["kl_general_text"] is None and report["answered_rows"] > 0
    assert evaluation.loss("tuned").value < evaluation.loss("base, as trained on").value  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["gguf", "gguf-lora", "nf4"])
def test_forms_of_decoders_alone_are_refused(kind: str, t5_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"decoders alone.*an encoder-decoder"):
        nybble.export(t5_run, to=kind, out=tmp_path / kind)


@pytest.mark.slow
def test_merged_it_answers_as_the_run(t5_run: Path, tmp_path: Path) -> None:
    merged = nybble.merge(t5_run, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    theirs = AutoModelForSeq2SeqLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    own = theirs.generate(**tokenizer("7 red", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(own[0], skip_special_tokens=True) == nybble.open_run(t5_run).generate("7 red")


@pytest.mark.slow
def test_exported_and_chatted_with(t5_run: Path, tmp_path: Path) -> None:
    exported = nybble.export(t5_run, to="peft", out=tmp_path / "peft")
    assert exported.outcome == "verified", exported.verification
    merged = nybble.merge(t5_run, out=tmp_path / "merged")
    for named in (["--run", t5_run], ["--model", merged.folder]):
        asked = typed(["chat", *named, "--prompt", "7 red", "--max-new-tokens", "12"])
        assert nybble.open_run(t5_run).generate("7 red", max_new_tokens=12) in asked.stdout, asked.output


def test_streamed_and_paged_the_bytes_are_the_same(tmp_path: Path, rows: Path) -> None:
    """From a four-bit folder whose blocks of both parts are read where they are used; BART's biases and all."""
    model = make_seq2seq(tmp_path / "bart", "bart", dropout=0.0)
    four_bit = nybble.quantize(model=model, out=tmp_path / "four").folder
    plain = short_run(four_bit, rows, tmp_path / "a")
    other = short_run(four_bit, rows, tmp_path / "b", stream_base="always", page_optimizer="always")
    assert tensors_after(other, 4) == tensors_after(plain, 4)


# ---- rows and options ----------------------------------------------------------------------------


def test_plans_are_made_and_of_encoders_refused(t5: Path, rows: Path, tmp_path: Path) -> None:
    """Without rows prompt and answer have --max-seq-len tokens each; padded each by themselves they are fewer."""
    most, asked = nybble.plan(model=t5, max_seq_len=128), nybble.plan(model=t5, data=rows)
    assert most.chosen.run.batches.longest_row == 128 and most.chosen.run.batches.documents == 2
    assert asked.chosen.run.batches.tokens < most.chosen.run.batches.tokens
    encoder, decoder = asked.chosen.run.sides
    assert encoder.model.num_layers + decoder.model.num_layers == asked.chosen.run.model.num_layers == 4
    assert encoder.batches.longest_row <= 12 and decoder.batches.longest_row <= 12
    bert = make_encoder(tmp_path / "bert")
    with pytest.raises(ModelError, match="is an encoder, which goes on with no text"):
        nybble.plan(model=bert)
    assert nybble.plan(model=bert, objective="classify").chosen.run.batches.longest_row == 130, "its positions"
    with pytest.raises(ConfigError, match="the model has positions for 130 tokens"):
        nybble.plan(model=bert, objective="classify", max_seq_len=131)


def test_prompts_keep_their_end_and_answers_lose_theirs() -> None:
    row = PromptedRow.of([*range(10, 20), 2], [*range(30, 38), 2], "row", kept_tokens=1)
    cut = row.truncate(6)
    assert cut.prompt_ids == [10, 11, 12, 13, 14, 2] and cut.answer_ids == [30, 31, 32, 33, 34, 35]
    assert cut.num_truncated == 8 and cut.supervised_tokens == 6 and row.truncate(11) is row


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")] * 2}, "not-one-prompt"),
        ({"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]}, "not-one-prompt"),
        ({"text": "on and on"}, "not-one-prompt"),
        ({"prompt": "x", "completion": " "}, "empty-answer"),
        ({"prompt": " ", "completion": "x"}, "empty-prompt"),
        ({"prompt": "<image> x", "completion": "y", "image": "data:image/png;base64,AAAA"}, "pictures-unread"),
    ],
)
def test_what_is_no_prompt_with_an_answer_is_named(row: Any, finding: str, t5: Path, tmp_path: Path) -> None:
    audit = nybble.check_data(model=t5, data=make_data(tmp_path / "r.jsonl", [row])).audit
    assert finding in [found.id for found in audit.findings]


def test_rows_of_each_form_are_learnt(t5: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    forms = [{"prompt": "a b", "completion": "c"}, {"question": "a b", "answer": "c"}, {"messages": turns}]
    forms.append({"instruction": "a b", "input": "", "output": "c"})
    for form in forms:
        found = nybble.check_data(model=t5, data=make_data(tmp_path / "r.jsonl", [form] * 3)).train[0]
        tokenizer = AutoTokenizer.from_pretrained(t5)
        assert found.answer_ids == tokenizer("c")["input_ids"] and found.answer_ids[-1] == tokenizer.eos_token_id
        assert found.prompt_ids == tokenizer("a b")["input_ids"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective": "dpo"}, "encoder-decoder, and objective is dpo"),
        ({"objective": "embed"}, "objective is embed"),
        ({"objective": "classify"}, "encoder-decoder, and objective is classify"),
        ({"train_on": "all"}, "train-on is all, and the model is an encoder-decoder"),
        ({"quality": "calibrated"}, "these are for no encoder-decoders"),
        ({"rank": "auto"}, "rank is auto, and the model is an encoder-decoder"),
        ({"neftune_alpha": 5.0}, "neftune-alpha"),
        ({"target_modules": "shared"}, "target_modules names 'shared'"),
    ],
)
def test_what_is_not_built_is_refused_in_words(more: Any, message: str, t5: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        short_run(t5, rows, tmp_path / "run", **more)
