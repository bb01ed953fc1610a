"""transformers' own Trainer over a base in four bits, an adapter of PEFT's beside it.

    python examples/trainer.py BASE examples.jsonl OUT

Of a script that trained a base in 16 bits two lines are new, those with `nybble`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import nybble


def make_trainer(base: Path, data: Path, out: Path, **arguments: Any) -> Trainer:
    """A trainer of rows with `prompt` and `completion`; `arguments` are TrainingArguments'."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nybble.NybbleConfig(format="nf4"))
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    nybble.accelerate(model)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"]).input_ids
        answer = tokenizer(row["completion"] + tokenizer.eos_token).input_ids
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = [encode(json.loads(line)) for line in data.read_text(encoding="utf-8").splitlines()]
    given = TrainingArguments(str(out), **{"learning_rate": 1e-3, "report_to": "none"} | arguments)
    return Trainer(
        model,
        given,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=Dataset.from_list(rows),
    )


if __name__ == "__main__":
    trainer = make_trainer(*map(Path, sys.argv[1:4]), max_steps=int(sys.argv[4]) if sys.argv[4:] else -1)
    trainer.train()
    trainer.save_model()
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.3f}")
