"""The loss and the adapters' gradients of a model's own forward, each row alone, and those that training computes."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.packing import IGNORE, collate
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of

ROWS = (9, 30, 4, 17)  # tokens
VOCABULARY = 131


def examples(lengths: Sequence[int] = ROWS) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i, n in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator, dtype=torch.int32)
        rows.append(EncodedExample(ids, torch.rand(n, generator=generator) < 0.8, f"rows:{i}"))
    return rows


def own_loss_and_gradients(model: Any, rows: Sequence[EncodedExample]) -> tuple[float, Tensor]:
    """Each row alone through a model that has seen no other, by its own forward, loss and autograd."""
    total, gradients, count = 0.0, 0.0, sum(row.supervised_tokens for row in rows)
    for row in rows:
        fresh = copy.deepcopy(model)
        ids, supervised = row.input_ids.long()[None], row.supervised[None]
        labels = ids.masked_fill(~supervised, IGNORE)
        plain = {"output_router_logits": False} if "mixtral" in model.config.model_type else {}
        output = fresh(input_ids=ids, labels=labels, use_cache=False, **plain)
        loss = output.loss * row.supervised_tokens / count
        loss.backward()
        total += float(loss.detach())
        gradients = gradients + flat_gradients(fresh)
    return total, gradients


def flat_gradients(model: Any) -> Tensor:
    adapters = adapters_of(model).values()
    return torch.cat([p.grad.flatten().double() for each in adapters for p in (each.lora_A, each.lora_B)])


def trained_loss_and_gradients(model: CausalLM, rows: Sequence[EncodedExample]) -> tuple[float, Tensor]:
    """As the training loop does it, all rows in one micro-batch."""
    model.module.zero_grad()
    loss = model.loss(collate(rows, model.packed))
    loss.backward()
    return float(loss.detach()), flat_gradients(model.module)


def relative(ours: Tensor, own: Tensor) -> float:
    return float((ours - own).norm() / own.norm())
