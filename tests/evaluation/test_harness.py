"""lm-eval itself on a trained tiny run, with a task of our own so that nothing is downloaded."""

import json
from pathlib import Path

import pytest
from typed import typed

pytest.importorskip("lm_eval")
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|im_start|>user\n{{{{question}}}}<|im_end|>\n<|im_start|>assistant\n"
target_delimiter: ""
doc_to_choice: ["It is", "7 Wrong?"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def evaluate(run: Path, task: object) -> tuple[int, str]:
    command = ["eval", "--run", str(run), "--metric", "none", "--lm-eval", str(task)]
    result = typed(command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


@pytest.mark.slow
def test_tasks_of_the_harness(trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {n} plus {n}?"}) + "\n" for n in range(8)))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data))
    code, shown = evaluate(trained, tmp_path / "sums.yaml")
    assert code == 0, shown
    report = json.loads((trained / "report" / "report.json").read_text())
    assert report["lm_eval"]["sums"]["acc,none"] == 1.0, "a run that learnt to say It is"
    assert "acc" in (trained / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_unknown_tasks_are_refused(trained: Path, tmp_path: Path) -> None:
    code, shown = evaluate(trained, tmp_path / "absent.yaml")
    assert code == 2 and "absent.yaml" in shown
