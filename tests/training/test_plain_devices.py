"""GPUs that have only PyTorch, Intel's and Apple's, which no test can reach.

Their step runs on the CPU, through the modules and bodies that run there, where an fp64 tensor raises. What their
allocators say is made up.
"""

from typing import Any

import pytest
import torch
from plain_device import WithoutDoubles, as_there
from tiny import put_into_four_bits, tune
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typed import typed

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack
from nybble.kernels.hardware import as_double, send
from nybble.layers.backbone import ModuleForward, Why, why_not_blocks
from nybble.layers.batch_model import Verdict
from nybble.layers.causal_lm import CausalLM
from nybble.layers.loss_head import LossHead
from nybble.memory import allocators
from nybble.memory.measure import PeakMemory, available_bytes, used_bytes
from nybble.training.accumulation import forward_backward
from nybble.training.objective import SupervisedFineTuning, Totals
from nybble.training.optimizer import AdamW
from nybble.training.rng import capture_rng, restore_rng

TINY = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    vocab_size=256,
)  # fmt: skip
DEVICES = ("mps", "xpu")


def small_model() -> CausalLM:
    module = LlamaForCausalLM._from_config(TINY, dtype=torch.float32)
    put_into_four_bits(module)
    tune(module)
    forward = ModuleForward(module, "packed", checkpointing=True)
    return CausalLM(module, forward, LossHead(module.lm_head.weight), Verdict("generic", "packed"))


def losses_and_norms() -> Tensor:
    """Of two steps."""
    torch.manual_seed(0)
    model, found = small_model(), []
    optimizer = AdamW(model.parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)
    rows = [EncodedExample(torch.arange(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), "") for n in (19, 30)]
    batch = pack(rows)
    for _ in range(2):
        part = forward_backward(SupervisedFineTuning(), model, batch, Totals(batch.supervised_tokens))
        found += [as_double(part.loss), optimizer.gradient_norm()]
        optimizer.step(1e-2, grad_scale=1.0)
    return torch.stack(found)


def test_its_numbers_are_those_of_the_cpu(monkeypatch):
    expected = losses_and_norms()
    as_there(monkeypatch)
    with WithoutDoubles():
        found = losses_and_norms()
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_decoder_blocks_leave_these_devices_to_transformers_modules(device):
    module = LlamaForCausalLM._from_config(TINY)
    reason = why_not_blocks(module, packing=True, dropout=False, device=torch.device(device))
    assert reason is not None and reason.why is Why.KERNELS


def test_what_goes_to_a_gpu_without_fp64_is_narrowed_on_the_way():
    sent: list[tuple[Any, ...]] = []

    class Watched(Tensor):
        def to(self, *arguments: Any, **keywords: Any) -> Tensor:
            sent.append(arguments)
            return self

    send(torch.zeros(3, dtype=torch.float64).as_subclass(Watched), torch.device("mps"))
    send(torch.zeros(3, dtype=torch.int64).as_subclass(Watched), torch.device("mps"))
    assert [dtype for _, dtype in sent] == [torch.float32, torch.int64]


class Fake:
    """An allocator and a generator that are in no PyTorch here."""

    state = torch.arange(8, dtype=torch.uint8)
    allocated, reserved, limit = 5, 7, 100

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, answer in {
            "current_allocated_memory": lambda: cls.allocated,
            "driver_allocated_memory": lambda: cls.reserved,
            "recommended_max_memory": lambda: cls.limit,
            "get_rng_state": lambda: cls.state.clone(),
            "set_rng_state": lambda state: setattr(cls, "state", state.clone()),
        }.items():
            monkeypatch.setattr(torch.mps, name, answer)


def test_memory_and_generator_of_an_apple_gpu_are_asked_where_it_keeps_them(monkeypatch):
    Fake.install(monkeypatch)
    device = torch.device("mps")
    assert (used_bytes(device), available_bytes(device)) == (5, 93)
    with PeakMemory(device, interval_s=3600) as memory:
        Fake.allocated, Fake.reserved = 60, 70
    assert (memory.start_bytes, memory.peak_bytes, memory.reserved_bytes) == (5, 60, 70)
    kept = capture_rng(device)
    Fake.state = torch.zeros(8, dtype=torch.uint8)
    restore_rng(kept, device)
    assert Fake.state.tolist() == list(range(8)) and kept.tensors["mps"].tolist() == list(range(8))


def test_intels_module_answers_as_cudas_does():
    """All that is asked of an allocator is there, by the same names."""
    asked = ("memory_allocated", "memory_reserved", "mem_get_info", "max_memory_allocated", "max_memory_reserved",
             "reset_peak_memory_stats", "empty_cache", "synchronize", "get_rng_state", "set_rng_state")  # fmt: skip
    for device in ("cuda", "xpu"):
        assert all(hasattr(allocators.allocator(torch.device(device)), name) for name in asked)
    kept = [name for name in asked if "max_" not in name and "peak" not in name]
    assert all(hasattr(allocators.allocator(torch.device("mps")), name) for name in kept)


@pytest.mark.parametrize(("device", "maker"), [("mps", "Apple's"), ("xpu", "Intel's")])
def test_a_gpu_that_is_not_there_is_refused(device, maker):
    result = typed(["plan", "--model", "llama-3-8b", "--device", device])
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and f"device is {device}, but PyTorch finds none of {maker} GPUs" in said
    assert "Allowed here: auto, cpu" in said
