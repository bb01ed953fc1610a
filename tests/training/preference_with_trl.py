"""Losses, metrics and gradients of TRL's trainers, for test_preference_trl.py; runs in the peers' environment.

Standard input: JSON {model, out, objectives: {name: {trainer, options, rows, adapter (a file of PEFT's keys), config
(PEFT's)}}}. Standard output: JSON {name: {loss, metrics}}; gradients lie in <out>/<name>.safetensors.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


def measure(asked: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
    """One batch of all rows, through the trainer's own data pipeline, in their order."""
    own = asked["objectives"][name]
    trainer_class, config_class = TRAINERS[own["trainer"]]
    arguments = {"output_dir": folder, "per_device_train_batch_size": len(own["rows"]), "report_to": "none"}
    arguments |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": 512}
    arguments |= {"train_sampling_strategy": "sequential"} | own["options"]
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    tokenizer.pad_token = "<|endoftext|>"
    scores = {"num_labels": 1} if own["trainer"] == "reward" else {}
    model_class = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    trainer = trainer_class(
        model=model_class.from_pretrained(asked["model"], dtype=torch.float32, **scores),
        args=config_class(**arguments),
        train_dataset=Dataset.from_list(own["rows"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(**own["config"]),
    )
    set_peft_model_state_dict(trainer.model, load_file(own["adapter"]))
    trainer.model.train()
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        key.replace(".default.", "."): parameter.grad
        for key, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    save_file(gradients, Path(asked["out"]) / f"{name}.safetensors")
    stored = trainer._stored_metrics if hasattr(trainer, "_stored_metrics") else trainer._metrics
    metrics = {key: float(values[-1]) for key, values in stored["train"].items()}
    return {"loss": loss.item(), "metrics": metrics}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as scratch:
        json.dump({name: measure(request, name, scratch) for name in request["objectives"]}, answers)
    answers.flush()
