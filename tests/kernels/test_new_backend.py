"""What a backend of one's own must have: with bodies for the ops that are declared, whole training steps and answers go
through it, on whatever device it is for; without one of them it is refused, and the op is named.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from tiny import put_into_four_bits, tune
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack
from nybble.families.gemma3 import GEMMA3
from nybble.families.qwen3 import QWEN3
from nybble.generation.decoding import decoder_ops
from nybble.generation.generate import generate
from nybble.kernels import registry
from nybble.kernels.ops.decode import MAX_ROWS
from nybble.layers.backbone import FusedForward, ModuleForward, Why, why_not_blocks, why_not_forward
from nybble.layers.causal_lm import CausalLM
from nybble.layers.decoder_block import block_ops
from nybble.training.optimizer import AdamW

BLOCK_OPS, DECODER_OPS = block_ops(QWEN3), decoder_ops(QWEN3)
STEP_OPS = (*BLOCK_OPS, "cross_entropy_", "adamw_")

NewBackend = Callable[..., set[str]]


@pytest.fixture
def new_backend(monkeypatch: pytest.MonkeyPatch) -> NewBackend:
    """Registers the plain bodies of some ops under another name; gives the set of ops that it has run."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    bodies = {op: dict(of_op) for op, of_op in registry._registrations.items()}
    monkeypatch.setattr(registry, "_registrations", bodies)

    def add(name: str, ops: Iterable[str], devices: tuple[str, ...] = ("cpu",)) -> set[str]:
        ran: set[str] = set()

        def noted(op: str) -> registry.Body:
            def body(*arguments: object) -> object:
                ran.add(op)
                return registry.body(op, "cpu", "reference")(*arguments)

            return body

        registry.register_backend(name, devices=devices, probe=lambda: None)
        for op in ops:
            registry.register(op, name)(noted(op))
        return ran

    return add


def small_model() -> nn.Module:
    """In four bits, with norms of heads, and adapters that do something."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=64, **shape, **heads), dtype=torch.float32)
    put_into_four_bits(model)
    return tune(model, rank=2)


def after_a_step(model: nn.Module) -> list[Tensor]:
    """The adapters that a step through decoder blocks leaves."""
    causal_lm = CausalLM.of(model)
    assert isinstance(causal_lm.backbone, FusedForward), causal_lm.name
    supervised = torch.tensor([False, False, True, True, True])
    batch = pack([EncodedExample(torch.arange(first, first + 5).int(), supervised, "here") for first in (3, 40)])
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(adapters, beta1=0.9, beta2=0.99, weight_decay=0.1)
    causal_lm.loss(batch).backward()
    optimizer.step(1e-2, grad_scale=0.5)
    return [adapter.detach() for adapter in adapters]


def test_it_carries_a_whole_training_step(new_backend: NewBackend) -> None:
    model, twin = small_model(), small_model()
    ran = new_backend("mine", STEP_OPS)
    with registry.use("mine"):
        mine = after_a_step(model)
    assert ran == set(STEP_OPS), "these are the ops that blocks declare"
    with registry.use("reference"):
        assert all(map(torch.equal, mine, after_a_step(twin)))


# Weights are written out through transformers' modules, too.
@pytest.mark.parametrize("lacking", [op for op in BLOCK_OPS if op != "dequantize_4bit_out"])
def test_one_that_lacks_a_body_of_the_block_is_refused_by_name(new_backend: NewBackend, lacking: str) -> None:
    model = small_model()
    new_backend("partial", set(STEP_OPS) - {lacking})
    with registry.use("partial"):
        causal_lm = CausalLM.of(model)
    assert isinstance(causal_lm.backbone, ModuleForward)
    assert f"no kernel for {lacking} on cpu (partial: has no body for this op)" in causal_lm.name


def test_on_another_device_than_the_cpu_its_bodies_decide_too(new_backend: NewBackend) -> None:
    model = small_model().to("meta")
    refused = why_not_blocks(model, packing=True, dropout=False)
    assert refused is not None and refused.why is Why.KERNELS
    new_backend("for_meta", BLOCK_OPS, devices=("meta",))
    with registry.use("for_meta"):
        assert why_not_blocks(model, packing=True, dropout=False) is None


PROMPTS = [[3, 5, 7], [11]]


@pytest.mark.parametrize("texts", [2, MAX_ROWS + 1])
def test_it_answers(new_backend: NewBackend, texts: int) -> None:
    model = small_model().eval()
    prompts = [PROMPTS[i % 2] for i in range(texts)]
    ran = new_backend("mine", DECODER_OPS)
    with registry.use("mine"):
        mine = generate(model, prompts, stop_ids=(), max_new_tokens=4)
    assert ran == set(DECODER_OPS) - (set() if texts <= MAX_ROWS else {"gemv_4bit"})
    with registry.use("reference"):
        assert mine == generate(model, prompts, stop_ids=(), max_new_tokens=4)


def test_one_that_lacks_a_body_for_answers_is_refused_by_name(new_backend: NewBackend) -> None:
    model = small_model()
    new_backend("partial", {*DECODER_OPS, *BLOCK_OPS} - {"decode"})
    with registry.use("partial"):
        assert why_not_forward(model) is None
        assert "decode on cpu (partial: has no body" in str(why_not_forward(model, ops=decoder_ops))


def test_a_family_with_another_gate_needs_that_ones_ops() -> None:
    gates = {op for op in (*block_ops(GEMMA3), *decoder_ops(GEMMA3)) if "glu" in op}
    assert gates == {"geglu_out", "geglu_backward_out"}
    assert not gates & {*BLOCK_OPS, *DECODER_OPS}
