"""Linears whose weight is read, or that only inherit from nn.Linear, stay as they are; others do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.errors import ConfigError
from nybble.layers.convert import describe_untouched, is_linear, quantizable_linears, resolve_targets


class Mixer(nn.Module):
    def __init__(self, slow: bool = False):
        super().__init__()
        self.slow = slow
        for name in ("in_proj", "read", "biased", "typed", "maybe"):
            self.add_module(name, nn.Linear(4, 4))

    def init_weights(self) -> None:
        self.in_proj.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.typed.weight.dtype) @ self.read.weight + self.biased.bias
        if self.slow and self.maybe is not None:
            x = F.linear(x, self.maybe.weight)
        return self.in_proj(x) if self.training else self.maybe(x)


class Model(nn.Module):
    def __init__(self, slow: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mixer": Mixer(slow), "out": nn.Linear(4, 4)}) for _ in range(2)])

    def get_input_embeddings(self) -> None:
        return None

    get_output_embeddings = get_input_embeddings

    def rescale(self) -> None:
        for block in self.blocks:
            block.out.weight.data *= 2


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).topk(2).indices


class Spelled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


def leaves(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name in quantizable_linears(model)}


def test_what_is_read_is_left_alone_and_said() -> None:
    assert leaves(Model()) == {"in_proj", "maybe", "typed"}, "a layer in few bits tells its type, but no numbers"
    assert leaves(Model(slow=True)) == {"in_proj", "typed"}, "a condition on the module's own attributes is looked at"
    assert any("2 x read" in note and "Mixer.forward" in note for note in describe_untouched(Model()))
    with pytest.raises(ConfigError, match=r"Mixer\.forward"):
        resolve_targets(Model(), ["read"])


def test_classes_that_inherit_from_linear_are_tried() -> None:
    assert is_linear(nn.Linear(4, 3)) and is_linear(Spelled(4, 3))
    assert not is_linear(Router(4, 3))


def test_mamba_computes_with_its_layers_replaced() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from nybble.layers.convert import attach_adapters

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    ids = torch.arange(7)[None]
    before = model(ids, use_cache=False).logits
    adapters = attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=2.0)
    torch.testing.assert_close(model(ids, use_cache=False).logits, before)
    model(ids, use_cache=False).logits.square().sum().backward()
    assert adapters and all(adapter.lora_B.grad.abs().sum() > 0 for adapter in adapters.values())
