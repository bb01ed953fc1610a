"""TRL's GRPOTrainer over a base in four bits: python examples/grpo.py BASE prompts.jsonl OUT.

The trainer samples answers, and what the reward function likes of a prompt's answers becomes likelier. Of a script with
BitsAndBytesConfig one line is another, that with `NybbleConfig`, and one is new: `nybble.accelerate`. Answers are
sampled through the model's own layers; the steps that learn from them go through nybble's blocks.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import nybble


def share_of_letters(completions: list[str], **columns: Any) -> list[float]:
    """Of each answer, 0 to 1: a reward to be replaced by one's own."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]


def make_trainer(base: Path, data: Path, out: Path, *, fast: bool = True, **arguments: Any) -> GRPOTrainer:
    """A trainer of rows with `prompt`; `arguments` are GRPOConfig's."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nybble.NybbleConfig(format="nf4"))
    if fast:
        nybble.accelerate(model)
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in data.read_text("utf-8").splitlines()]
    return GRPOTrainer(
        model,
        share_of_letters,
        args=GRPOConfig(str(out), **{"learning_rate": 1e-4, "report_to": "none"} | arguments),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


if __name__ == "__main__":
    trainer = make_trainer(*map(Path, sys.argv[1:4]), max_steps=int(sys.argv[4]) if sys.argv[4:] else -1)
    trainer.train()
    trainer.save_model()
    rewards = [each["reward"] for each in trainer.state.log_history if "reward" in each]
    print(f"reward {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
