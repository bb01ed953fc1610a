"""A second objective in one file, through `train_loop`: what it learns is what a plain PyTorch loop learns."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded_graph import KeptGraph, RecordedGraph
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch
from nybble.data.sampler import StepSampler
from nybble.kernels import slabs
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, resolve_targets
from nybble.memory import graph
from nybble.options.groups import LoopOptions
from nybble.runs.events import EventLog, read_events
from nybble.runs.folder import RunFolder
from nybble.runs.trained import TrainedAdapters
from nybble.sizes import SHAPE_RULES
from nybble.training.checkpoint import Checkpoints
from nybble.training.evaluations import Evaluations
from nybble.training.loop import train_loop
from nybble.training.objective import SupervisedFineTuning

LENGTHS = (9, 14, 5, 11, 7, 12, 6, 10)
HELD_OUT = (8, 13)
STEPS, ROWS_PER_STEP, LR = 4, 4, 5e-3


class LateTokensCountMore(SupervisedFineTuning):
    """Mean over supervised tokens of (1 + position / 4) · (−log p)."""

    def collate(self, rows: Sequence[EncodedExample], model: CausalLM) -> Batch:
        batch = super().collate(rows, model)
        return replace(batch, weights=1 + batch.position_ids / 4)


def rows(lengths: Sequence[int], seed: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(96, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    return [EncodedExample(each, torch.arange(len(each)) >= 2, f"rows:{i}") for i, each in enumerate(ids)]


def adapted_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, initializer_range=0.2, **shape)).requires_grad_(False)
    for adapter in attach_adapters(model, resolve_targets(model, "all-linear"), rank=3, alpha=6.0).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    return model


def plain_losses(model: nn.Module, rows: Sequence[EncodedExample]) -> Tensor:
    """Each row alone through the model's own forward; the weighted losses of all targets."""
    losses = []
    for row in rows:
        ids = row.input_ids.long()
        nats = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        losses.append((nats * (1 + torch.arange(len(ids) - 1) / 4))[row.supervised[1:]])
    return torch.cat(losses)


def trained_plainly(model: nn.Module, train: Sequence[EncodedExample], options: LoopOptions) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(parameters, LR, betas=betas, weight_decay=options.weight_decay)
    sampler, losses = StepSampler(len(train), ROWS_PER_STEP, 0), []
    for _ in range(STEPS):
        loss = plain_losses(model, [train[row] for row in sampler.next_step()]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class TooLargeGraph(RecordedGraph):
    """There is no memory for it."""

    def __call__(self) -> Tensor:
        if self.runs == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__()


@pytest.mark.parametrize(
    ("packing", "graph_type"), [(True, None), (False, None), (True, KeptGraph), (True, TooLargeGraph)]
)
def test_a_second_objective_trains_as_a_plain_loop_does(packing, graph_type, tmp_path: Path, monkeypatch) -> None:
    if graph_type is not None:
        monkeypatch.setitem(graph.GRAPHS, "cpu", graph_type)
        monkeypatch.setattr(slabs, "SLABS_FROM", 2**62)  # devices that have graphs have none
        monkeypatch.setitem(SHAPE_RULES, "cpu", replace(SHAPE_RULES["cpu"], graph_work=3e11))
    options = LoopOptions(lr=LR, schedule="constant", warmup=0)
    train, validation = rows(LENGTHS, 1), rows(HELD_OUT, 2)
    model = adapted_model()
    plain = copy.deepcopy(model)
    begun = flat(model)
    before = plain_losses(plain, validation).mean().item()
    expected = trained_plainly(plain, train, options)
    events = EventLog(tmp_path / "events.jsonl")
    result = train_loop(
        CausalLM.of(model, packing=packing),
        LateTokensCountMore(),
        train,
        Evaluations(validation, every=STEPS),
        options,
        lr=LR,
        optimizer_bits=32,
        sampler=StepSampler(len(train), ROWS_PER_STEP, 0),
        total_steps=STEPS,
        micro_batch_size=3,
        run=RunFolder(tmp_path),
        trained=TrainedAdapters.of(model, "tiny"),
        report=events,
        events_bytes=events.sync,
        checkpoints=Checkpoints(tmp_path, save_every="99", keep=1, config="", about={}, settled={}),
    )
    if graph_type is KeptGraph:
        assert sum(each.replays for each in KeptGraph.made) >= 4
        KeptGraph.made.clear()
    missed = read_events(tmp_path / "events.jsonl", "out-of-memory")
    assert [event["graphs"] for event in missed] == ([False] if graph_type is TooLargeGraph else [])
    losses = [event["loss"] for event in read_events(tmp_path / "events.jsonl", "step")]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert result.loss_before == pytest.approx(before, rel=1e-5)
    assert result.loss_after == pytest.approx(plain_losses(plain, validation).mean().item(), rel=1e-4)
    moved = flat(plain) - begun
    assert moved.norm() > 0 and (flat(model) - flat(plain)).norm() <= 1e-2 * moved.norm()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])
