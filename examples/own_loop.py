"""A training loop of one's own on nybble's kernels: `python examples/own_loop.py [MODEL DATA ADAPTER]`.

It takes the steps of `nybble train` with the same options, to the bit; what a loop of one's own wants to change, it
changes here. Any optimizer over `model.parameters()` will do; this one clips and updates in one pass.
"""

import sys

import torch

import nybble
from nybble.training.optimizer import AdamW
from nybble.training.schedule import learning_rate, warmup_steps

MAX_GRAD_NORM = 0.3


def fine_tune(
    model_name: str, data_name: str, adapter: str, *, max_steps: int, rows: int, at_once: int, rank: int, lr: float
) -> list[float]:
    """Train adapters and write them; returns each step's loss in nats a supervised token."""
    source = nybble.open_model(model_name)
    data = nybble.load_data(data_name, source, max_seq_len=512)
    model = nybble.load(source, format="nf4", keep="everything")
    nybble.add_adapters(model, rank=rank)
    optimizer = AdamW(model.parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)
    num_warmup = warmup_steps(0.03, max_steps)
    torch.manual_seed(0)  # dropout
    model.train()
    losses = []
    for batches in data.steps(rows, at_once, packed=model.packed, max_steps=max_steps):
        supervised = sum(batch.supervised_tokens for batch in batches)  # of the whole step
        losses.append(0.0)
        for batch in batches:
            loss = model.loss(batch, supervised)
            loss.backward()
            losses[-1] += loss.item()
        now = learning_rate(len(losses), max_steps, num_warmup, "cosine", lr)
        optimizer.step(now, grad_scale=min(1.0, MAX_GRAD_NORM / max(float(optimizer.gradient_norm()), 1e-30)))
        print(f"step {len(losses)}: {losses[-1]:.4f}")
    model.save_adapter(adapter)
    return losses


if __name__ == "__main__":
    names = sys.argv[1:] or ("smollm2-135m-instruct", "builtin:pydoc", "adapters/own-loop")
    fine_tune(*names, max_steps=20, rows=8, at_once=4, rank=16, lr=5e-4)
