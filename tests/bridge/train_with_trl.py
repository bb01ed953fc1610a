"""Trains as examples/ do, a job after the other, for test_trainers.py; runs where TRL can be imported.

Reads a JSON list of jobs on stdin, writes what each logged, as JSON, into its `result`. Of a job:

    program: of examples/. base, data, out: its arguments. given: what else `make_trainer` takes.
    fp32: the adapter learns in fp32, where TRL makes it bf16 over a base in few bits.
    resume: go on from the last checkpoint in `out`.
    evaluate: so many rows are evaluated before each step, random numbers put back.
    adapter: a folder whose adapter training begins with.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


class Evaluate(TrainerCallback):
    """Evaluates before each step."""

    def __init__(self, trainer: Any, rows: int):
        self.trainer, self.rows = trainer, trainer.train_dataset.select(range(rows))

    def on_step_begin(self, *args: Any, **keywords: Any) -> None:
        with torch.random.fork_rng():
            self.trainer.evaluate(self.rows)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """What a job logged, and what its layers were."""
    make_trainer = importlib.import_module(job["program"]).make_trainer
    trainer = make_trainer(Path(job["base"]), Path(job["data"]), Path(job["out"]), **job["given"])
    if "adapter" in job:
        set_peft_model_state_dict(trainer.model, load_peft_weights(job["adapter"]))
    learning = [each for each in trainer.model.parameters() if each.requires_grad]
    for parameter in learning if job.get("fp32") else ():
        parameter.data = parameter.data.float()
    if "evaluate" in job:
        trainer.add_callback(Evaluate(trainer, job["evaluate"]))
    trainer.train(resume_from_checkpoint=job.get("resume", False))
    trainer.save_model()
    layers = trainer.model.get_base_model().model.layers
    return {
        "log": [each for each in trainer.state.log_history if "loss" in each],
        "evaluated": [each for each in trainer.state.log_history if "eval_loss" in each],
        "layers": [type(layer).__name__ for layer in layers],
        "dtypes": sorted({str(parameter.dtype) for parameter in learning}),
    }


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        Path(job["result"]).write_text(json.dumps(train(job)), encoding="utf-8")
