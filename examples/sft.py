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


def fine_tune(base: Path, data: Path, out: Path, *, resume: bool = False, fast: bool = True, **arguments: Any) -> Any:
    """The trainer, once it is done; `arguments` are SFTConfig's."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nybble.NybbleConfig(format="nf4"))
    if fast:
        nybble.accelerate(model)
    trainer = SFTTrainer(
        model,
        SFTConfig(str(out), learning_rate=1e-3, report_to="none", **arguments),
        train_dataset=Dataset.from_list([json.loads(line) for line in data.read_text("utf-8").splitlines()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    done = fine_tune(*map(Path, sys.argv[1:4]), max_steps=int(sys.argv[4]) if sys.argv[4:] else -1)
    print(f"loss {done.state.log_history[-1]['train_loss']:.3f}")
