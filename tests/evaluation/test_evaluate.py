"""`nybble eval` on a trained tiny run: the figures are those of transformers, the files are whole."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typed import typed

from nybble.evaluation.evaluation_rows import evaluation_rows
from nybble.runs.open_run import open_run


def run(*arguments: object) -> tuple[int, str]:
    result = typed(arguments, env={"COLUMNS": "250"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> tuple[Path, str]:
    code, shown = run("eval", "--run", trained, "--compute-dtype", "fp32", "--answers", 4)
    assert code == 0, shown
    return trained, shown


def report(path: Path) -> dict:
    return json.loads((path / "report" / "report.json").read_text())


def test_losses_are_transformers_own(evaluated: tuple[Path, str]) -> None:
    path, _ = evaluated
    rows = evaluation_rows(open_run(path))
    model = AutoModelForCausalLM.from_pretrained(path.parent / "base", dtype=torch.bfloat16).float().eval()
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            log_p = model(input_ids=row.input_ids[None].long()).logits[0].log_softmax(-1)
        at = row.supervised[1:].nonzero().squeeze(1)
        total -= log_p[at, row.input_ids[at + 1].long()].double().sum().item()
        count += len(at)
    found = report(path)
    assert found["supervised_tokens"] == count and found["rows"] == len(rows)
    assert found["arms"]["base, 16 bits"]["loss"]["value"] == pytest.approx(total / count, rel=1e-4)
    arms = found["arms"]
    assert arms["tuned"]["loss"]["value"] < arms["base, as trained on"]["loss"]["value"] - 0.5
    assert arms["tuned"]["perplexity"] == pytest.approx(math.exp(arms["tuned"]["loss"]["value"]))
    change = found["loss_change"]["base, as trained on"]
    expected = arms["tuned"]["loss"]["value"] - arms["base, as trained on"]["loss"]["value"]
    assert change["value"] == pytest.approx(expected) and change["high"] < 0
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    after = [event["loss"] for event in events if event["event"] == "eval"][-1]
    assert arms["tuned"]["loss"]["value"] == pytest.approx(after, rel=1e-3), "as the training's own evaluation"


def test_forgetting_is_measured_from_the_16_bit_base(evaluated: tuple[Path, str]) -> None:
    kl = {name: arm["kl_general_text"] for name, arm in report(evaluated[0])["arms"].items()}
    assert kl["base, 16 bits"] == 0 < kl["base, as trained on"] < kl["tuned"]


def test_answers_and_rows(evaluated: tuple[Path, str]) -> None:
    found = report(evaluated[0])
    assert len(found["samples"]) == 4 and set(found["samples"][0]["answers"]) == set(found["arms"])
    assert set(found["arms"]["tuned"]["scores"]) == {"exact", "f1", "number"}
    assert found["arms"]["tuned"]["scores"]["f1"]["value"] > found["arms"]["base, 16 bits"]["scores"]["f1"]["value"]
    best, worst = found["best_rows"][0]["loss_change"], found["worst_rows"][0]["loss_change"]
    assert best < worst
    assert sum(bucket["rows"] for bucket in found["length_buckets"]) == found["rows"]


def test_the_page_needs_nothing_else(evaluated: tuple[Path, str]) -> None:
    page = (evaluated[0] / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "What is" in page and "&lt;script" not in page


def test_the_model_card(evaluated: tuple[Path, str]) -> None:
    path, _ = evaluated
    card = (path / "adapter" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == str(path.parent / "base")
    assert header["license"] == "unknown" and header["library_name"] == "peft"
    (path.parent / "base" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\n")
    run("eval", "--run", path, "--metric", "none")
    card = (path / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "| rank | 8 |" in card and "num train" in card and "| tuned |" in card
    base = AutoModelForCausalLM.from_pretrained(path.parent / "base", dtype=torch.float32)
    assert PeftModel.from_pretrained(base, path / "adapter") is not None, "the card beside it does not disturb PEFT"


def test_rows_of_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "What is 1 plus 1?", "completion": "It is 2."}) + "\n")
    code, shown = run("eval", "--run", trained, "--data", tmp_path / "other.jsonl", "--metric", "exact")
    assert code == 0 and "1 held-out rows" in shown
    assert report(trained)["samples"][0]["origin"].endswith("other.jsonl:1")


def test_what_is_missing_is_said_first(trained: Path, tmp_path: Path) -> None:
    code, shown = run("eval", "--run", trained, "--data", tmp_path / "absent.jsonl")
    assert code == 2 and "absent.jsonl" in shown
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        code, shown = run("eval", "--run", trained, "--lm-eval", "arc_easy")
        assert code == 2 and "pip install lm-eval" in shown
