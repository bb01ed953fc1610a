"""The peers as contenders: TRL, a bare PEFT loop, and transformers' generation; runs in their virtual environment.

    python contender_peers.py '{"work": "trl", "dtype": "bfloat16", "base": ..., "adapter": ..., "steps": ...}'

The time of a step is from the request to the end of the optimizer's step. TRL's trainer has read and padded the batch
before it asks, so that part is not counted against it.

bitsandbytes 0.50.2 packs weights anew when a layer runs in eval mode on a CPU with AVX512-BF16, and training then has
wrong gradients. Here a model that is trained never runs in eval mode.
"""

import contextlib
import json
import sys
import tempfile
import time
from typing import Any

import torch
from common import Channel, versions
from safetensors.torch import save_file
from torch import Tensor

IGNORE = -100
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def load(settings: dict[str, Any]) -> tuple[Any, float]:
    """The base in four bits (bits: 4) or as it is (bits: 16), and the seconds that it took to load."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings["dtype"]),
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        settings["base"],
        dtype=getattr(torch, settings["dtype"]),
        device_map="cpu",
        quantization_config=four_bits if settings.get("bits", 4) == 4 else None,
    )
    return model, time.perf_counter() - started


def adapted(model: Any, settings: dict[str, Any], adapter_dtype: str = "fp32") -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad and adapter_dtype == "bf16":
            parameter.data = parameter.data.bfloat16()
    return model.train()


def read_rows(settings: dict[str, Any]) -> list[list[dict[str, list[int]]]]:
    with open(settings["steps"]) as file:
        steps: list[list[dict[str, list[int]]]] = json.load(file)
    return steps


def save_gradients(model: Any, settings: dict[str, Any]) -> None:
    """The gradients of each B, by the name of the layer."""
    if path := settings.get("gradients"):
        marker = ".lora_B.default.weight"
        named = ((name, p) for name, p in model.named_parameters() if name.endswith(marker))
        save_file(
            {name.removeprefix("base_model.model.").removesuffix(marker): p.grad.float() for name, p in named}, path
        )


# ---- a bare loop over a PEFT model ---------------------------------------------------------------


def train_bare(settings: dict[str, Any], channel: Channel) -> None:
    model, load_s = load(settings)
    model = adapted(model, settings, settings["adapter_dtype"])
    steps = read_rows(settings)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=2e-4, weight_decay=0.0, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if settings["autocast"] else contextlib.nullcontext()
    channel.send(load_s=load_s, versions=versions(*PACKAGES))
    first = True
    while True:
        rows = steps[channel.receive()["step"]]
        started = time.perf_counter()
        with autocast:
            loss = model(**padded(rows)).loss
        loss.backward()
        if first:
            save_gradients(model, settings)
            first = False
        torch.nn.utils.clip_grad_norm_(adapters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        channel.send(seconds=time.perf_counter() - started, loss=loss.item())


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def column(key: str, filling: int) -> Tensor:
        return torch.tensor([row[key] + [filling] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": column("input_ids", 0), "labels": column("labels", IGNORE), "attention_mask": mask}


# ---- TRL -----------------------------------------------------------------------------------------


def asked_by(settings: dict[str, Any], channel: Channel) -> Any:
    """A callback for a trainer that takes a step a request."""
    from transformers import TrainerCallback

    class Asked(TrainerCallback):
        """Begins a step when the parent asks for it, and reports it when its loss is known."""

        started = seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            channel.receive()
            self.started = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 0:
                save_gradients(model, settings)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                channel.send(seconds=self.seconds, loss=logs["loss"])

    return Asked()


def arguments_of(settings: dict[str, Any], folder: str, rows_per_step: int, lr: float) -> dict[str, Any]:
    """What every trainer is told: all rows in their order, no schedule, nothing saved."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": settings["autocast"],
        "gradient_checkpointing": settings["checkpointing"],
        "per_device_train_batch_size": rows_per_step // settings["accumulation"],
        "gradient_accumulation_steps": settings["accumulation"],
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_trl(settings: dict[str, Any], channel: Channel) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model, load_s = load(settings)
    model = adapted(model, settings)
    steps = read_rows(settings)
    rows = [row for step in steps for row in step]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            padding_free=settings["padding_free"], **arguments_of(settings, folder, len(steps[0]), lr=2e-4)
        )
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(settings["base"]),
            callbacks=[asked_by(settings, channel)],
        )
        channel.send(load_s=load_s, versions=versions(*PACKAGES))
        trainer.train()


def train_trl_pairs(settings: dict[str, Any], channel: Channel) -> None:
    """DPO; the adapter is new to the trainer, so that its reference is the base with adapters off."""
    from datasets import Dataset
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model, load_s = load(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    steps = read_rows(settings)
    rows = [{name: tokenizer.decode(ids) for name, ids in row.items()} for step in steps for row in step]
    adapter = LoraConfig.from_pretrained(settings["adapter"])
    adapter.inference_mode = False
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(beta=settings["beta"], **arguments_of(settings, folder, len(steps[0]), lr=2e-5)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[asked_by(settings, channel)],
        )
        set_peft_model_state_dict(trainer.model, load_peft_weights(settings["adapter"], device="cpu"))
        seen = next(iter(trainer.get_train_dataloader()))["input_ids"]
        tokens = [sum(len(row["prompt"]) + len(row[side]) for side in ("chosen", "rejected")) for row in steps[0]]
        channel.send(load_s=load_s, versions=versions(*PACKAGES), padded_tokens=seen.numel(), tokens=sum(tokens))
        trainer.train()


# ---- generation ----------------------------------------------------------------------------------


def answer(settings: dict[str, Any], channel: Channel) -> None:
    model, load_s = load(settings)
    model.eval().generation_config.eos_token_id = None
    channel.send(load_s=load_s, versions=versions(*PACKAGES))
    while True:
        request = channel.receive()
        prompt = torch.tensor([request["prompt"]])
        started = time.perf_counter()
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=request["new_tokens"],
            eos_token_id=None,
        )
        channel.send(seconds=time.perf_counter() - started, ids=output[0, prompt.shape[1] :].tolist())


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    {"bare": train_bare, "trl": train_trl, "trl_pairs": train_trl_pairs, "answer": answer}[chosen["work"]](
        chosen, Channel()
    )
