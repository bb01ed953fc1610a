"""nybble as a contender of the benchmarks: each of its works, on a tiny model, answers what it is asked."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the benchmarks read /proc")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import contender_nybble  # noqa: E402
from inputs import Inputs, prepare_base  # noqa: E402


class Asked:
    """A channel whose requests are there already."""

    def __init__(self, requests: list[dict[str, Any]]):
        self.requests, self.answers = iter(requests), []

    def send(self, **answer: Any) -> None:
        self.answers.append(answer)

    def receive(self) -> dict[str, Any]:
        request = next(self.requests, None)
        if request is None:
            raise SystemExit(0)
        return request


@pytest.fixture
def inputs(tiny_model: Path, tmp_path: Path) -> Inputs:
    return prepare_base(str(tiny_model), tmp_path)


STEPS = {
    "train": [[{"input_ids": [5, 6, 7, 8, step], "labels": [-100, 6, 7, 8, step]}] for step in (9, 10, 11)],
    "train_pairs": [[{"prompt": [5, 6], "chosen": [7, 8, step], "rejected": [9, 12]}] for step in (9, 10, 11)],
}


@pytest.mark.parametrize("work", STEPS)
def test_steps_after_the_gradients_of_the_first_are_kept(work: str, inputs: Inputs, tmp_path: Path) -> None:
    steps, gradients = tmp_path / "steps.json", tmp_path / "gradients.safetensors"
    steps.write_text(json.dumps(STEPS[work]))
    files = {"base": inputs.base, "adapter": inputs.adapter, "steps": steps, "gradients": gradients}
    channel = Asked([{"step": number} for number in range(3)])
    given = {"keep": "everything", "beta": 0.1} | {name: str(path) for name, path in files.items()}
    with pytest.raises(SystemExit):
        getattr(contender_nybble, work)(given, channel)
    ready, *answers = channel.answers
    assert gradients.is_file() and math.isclose(ready["loss"], answers[0]["loss"], rel_tol=1e-5)
    assert len(answers) == 3 and all(math.isfinite(a["loss"]) and a["seconds"] > 0 for a in answers)


def test_an_answer(inputs: Inputs) -> None:
    channel = Asked([{"prompt": [5, 6, 7], "new_tokens": 4}])
    with pytest.raises(SystemExit):
        contender_nybble.answer({"base": str(inputs.base)}, channel)
    assert len(channel.answers[1]["ids"]) == 4
