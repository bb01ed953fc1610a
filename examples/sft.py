"""TRL's SFTTrainer over a base in four bits: python examples/sft.py BASE examples.jsonl OUT.

Of a script with BitsAndBytesConfig one line is another, that with `NybbleConfig`, and one is new: `nybble.accelerate`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import nybble


def make_trainer(base: Path, data: Path, out: Path, *, fast: bool = True, **arguments: Any) -> SFTTrainer:
    """A trainer of rows with `prompt` and `completion`; `arguments` are SFTConfig's."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nybble.NybbleConfig(format="nf4"))
    if fast:
        nybble.accelerate(model)
    return SFTTrainer(
        model,
        SFTConfig(str(out), **{"learning_rate": 1e-3, "report_to": "none"} | arguments),
        train_dataset=Dataset.from_list([json.loads(line) for line in data.read_text("utf-8").splitlines()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


if __name__ == "__main__":
    trainer = make_trainer(*map(Path, sys.argv[1:4]), max_steps=int(sys.argv[4]) if sys.argv[4:] else -1)
    trainer.train()
    trainer.save_model()
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.3f}")
