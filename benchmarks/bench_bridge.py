"""A training step of transformers and PEFT over a base in nf4: bitsandbytes' layers, nybble's, and nybble's blocks too.

    python benchmarks/bench_bridge.py FOLDER [--rows 4] [--tokens 512] [--checkpointing] [--rounds 3]

FOLDER is a model in 16 bits. Each round runs each variant in a process of its own, one after the other, over full rows
of the same tokens; what is printed is of the best round: tokens a second of the processor, all threads together, which
a busy machine changes little; and the most anonymous memory beyond what the process had once its libraries were
imported. Compute is in fp32. The head and the loss are transformers' in all three.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

VARIANTS = ("bitsandbytes", "nybble", "accelerated")


class Peak:
    """The most anonymous memory, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.most, self._stopped = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        from nybble.memory.measure import anonymous_bytes

        while not self._stopped.wait(0.005):
            self.most = max(self.most, anonymous_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self.most


def loaded(folder: str, variant: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import nybble

    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    theirs = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=torch.float32)
    config = theirs if variant == "bitsandbytes" else nybble.NybbleConfig(format="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if variant == "accelerated":
        nybble.accelerate(model)
    return model.train()


def measure(folder: str, variant: str, rows: int, tokens: int, checkpointing: bool, steps: int) -> dict[str, float]:
    import torch

    from nybble.memory.measure import anonymous_bytes

    before, peak = anonymous_bytes(), Peak()
    model = loaded(folder, variant)
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    ids = torch.randint(1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(steps):
        began = time.process_time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    return {
        "tokens/CPU s": rows * tokens / min(seconds),
        "peak MiB": (peak.stop() - before) / 2**20,
        "loss": loss.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--variant", choices=VARIANTS, help="of this process alone")
    for name, value in (("rows", 4), ("tokens", 512), ("steps", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    if given.variant:
        warnings.simplefilter("ignore")
        sizes = (given.rows, given.tokens, given.checkpointing, given.steps)
        print(json.dumps(measure(given.folder, given.variant, *sizes)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(given.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(variant, []).append(json.loads(done.stdout.splitlines()[-1]))
    for variant, results in found.items():
        speed, peak = max(each["tokens/CPU s"] for each in results), min(each["peak MiB"] for each in results)
        print(f"{variant:13} {speed:7.1f} tokens/CPU s  {peak:6.0f} MiB  loss {results[0]['loss']:.4f}")


if __name__ == "__main__":
    main()
