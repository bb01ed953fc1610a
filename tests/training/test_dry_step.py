"""A training step as wide as Llama 3 8B and 70B without its numbers, by the rules of a GPU.

On the meta device a tensor that lies elsewhere raises. With fake tensors whoever asks for a value raises, and the bytes
that are alive are counted. What kernels do inside shows in neither. Two layers: each further one is like the second.
"""

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import put_into_four_bits, tune
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.data import packing
from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch, pack
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels import hardware, registry
from nybble.layers import augmented
from nybble.layers.augmented import AugmentedProjection, projection_on
from nybble.layers.backbone import FusedForward
from nybble.layers.batch_model import Verdict
from nybble.layers.causal_lm import CausalLM
from nybble.layers.decoder_block import Keep
from nybble.layers.loss_head import LossHead
from nybble.planning import cuda_costs
from nybble.planning.costs import Part, predict
from nybble.planning.run_shape import MicroBatches, RunShape
from nybble.planning.shape import shape_of
from nybble.sizes import SHAPE_RULES
from nybble.sources.skeleton import build_skeleton
from nybble.training.accumulation import forward_backward
from nybble.training.objective import SupervisedFineTuning, Totals
from nybble.training.optimizer import AdamW

RANK = 16
CONFIGS = {
    name: LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=hidden // 128, num_key_value_heads=8,
        num_hidden_layers=2, vocab_size=128_256, tie_word_embeddings=False,
    )
    for name, hidden, intermediate in (("8B", 4096, 14336), ("70B", 8192, 28672))
}  # fmt: skip
DOCUMENTS = {"8B": (2048, 2048, 2048, 2000), "70B": (2048, 2000)}  # 48 arbitrary tokens fill up to a multiple of 64
LAUNCHES = {"nothing": (34, 130), "attention": (34, 129), "everything": (27, 114)}  # products and all, a layer
KEEPS: tuple[Keep, ...] = ("nothing", "attention", "everything")
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "device"}


class Counted(TorchDispatchMode):
    """Launches by op, products among them, and the bytes of all storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    @property
    def products(self) -> int:
        return sum(self.launches[name] for name in ("mm", "addmm", "addmm_"))

    def take(self, tensor: Tensor) -> None:
        """Count a tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.live -= num_bytes

        self._seen[key] = weakref.ref(storage, gone)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.take(tensor)
        return result


def by_the_rules_of_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, and projections of one product."""
    monkeypatch.setitem(SHAPE_RULES, device, SHAPE_RULES["cuda"])
    monkeypatch.setitem(augmented.ONE_PRODUCT, device, True)
    monkeypatch.setattr(hardware, "FP32_RESULTS", {device})
    monkeypatch.setattr(registry, "PLAIN_BLOCKS", ("cpu", "meta"))
    assert projection_on(device) is AugmentedProjection


def dry_model(device: str, keep: Keep, config: LlamaConfig) -> CausalLM:
    with torch.device(device):
        module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    put_into_four_bits(module, dtype=torch.bfloat16)
    tune(module, rank=RANK)
    return CausalLM(module, FusedForward(module, keep), LossHead(module.lm_head.weight), Verdict("blocks", "packed"))


def documents(lengths: tuple[int, ...]) -> Batch:
    """All of them supervised; what their values tell is known."""
    rows = [EncodedExample(torch.arange(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), "") for n in lengths]
    return pack(rows).to("cpu")


def losses_and_norm(model: CausalLM, batch: Batch, optimizer: AdamW) -> Tensor:
    """What `train_loop` does before it looks at the device, with two micro-batches."""
    totals = Totals(2 * batch.supervised_tokens)
    parts = [forward_backward(SupervisedFineTuning(), model, batch, totals) for _ in range(2)]
    return torch.stack([*(part.loss.double() for part in parts), optimizer.gradient_norm()])


def adamw(model: CausalLM) -> AdamW:
    return AdamW(model.parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("width", CONFIGS)
def test_a_step_asks_for_no_value_before_its_one_look_and_takes_no_more_than_is_planned(width, keep, monkeypatch):
    batch, shape = documents(DOCUMENTS[width]), shape_of(build_skeleton(CONFIGS[width]))
    by_the_rules_of_a_gpu("cpu", monkeypatch)
    with FakeTensorMode() as mode:
        monkeypatch.setattr(packing, "send", lambda tensor, device: mode.from_tensor(tensor))
        with Counted() as counted:
            model = dry_model("cpu", keep, CONFIGS[width])
            optimizer = adamw(model)
        counted.peak = counted.live
        with counted:
            look = losses_and_norm(model, batch.to("cpu"), optimizer)
            optimizer.step(1e-3, grad_scale=1.0)
        with pytest.raises(DataDependentOutputException):
            look.tolist()
    tokens, longest = -(-batch.num_tokens // 64) * 64, max(DOCUMENTS[width])
    batches = MicroBatches(tokens, batch.supervised_tokens, longest, 1, 0, 0, 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rules = SHAPE_RULES["cuda"]
    run = RunShape(shape, batches, parameters, RANK, 2, QuantSpec(), "blocks", keep, rules, on_cpu=False)
    # A dry step sees no memory that a library takes for itself.
    monkeypatch.setattr(cuda_costs, "flash_scratch", lambda run: 0)
    planned = sum(size for part, size in predict(run).items() if part not in (Part.WORKSPACE, Part.RESERVED))
    assert counted.peak <= planned <= 1.01 * counted.peak


@pytest.mark.parametrize("keep", KEEPS)
def test_all_of_a_step_is_on_its_device(keep, monkeypatch):
    by_the_rules_of_a_gpu("meta", monkeypatch)
    model = dry_model("meta", keep, CONFIGS["8B"])
    optimizer = adamw(model)
    assert losses_and_norm(model, documents(DOCUMENTS["8B"]).to("meta"), optimizer).device.type == "meta"
    optimizer.step(1e-3, grad_scale=1.0)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_layer_takes_so_many_launches(keep, monkeypatch):
    """Of the forward and the backward pass together; what a further layer adds."""
    by_the_rules_of_a_gpu("meta", monkeypatch)
    batch, found = documents(DOCUMENTS["8B"]).to("meta"), []
    for layers in (1, 2):
        config = copy.deepcopy(CONFIGS["8B"])
        config.num_hidden_layers = layers
        model = dry_model("meta", keep, config)
        adamw(model)  # gives all gradients their place
        with Counted() as counted:
            forward_backward(SupervisedFineTuning(), model, batch, Totals(1.0))
        found.append((counted.products, counted.launches.total()))
    (products, launches), (more_products, more_launches) = found
    assert (more_products - products, more_launches - launches) == LAUNCHES[keep]


def test_the_head_multiplies_in_chunks_of_2048_rows_and_in_no_panels(monkeypatch):
    """Of a vocabulary of 128k. By the rules of a CPU it is 4,096 products."""
    monkeypatch.setitem(SHAPE_RULES, "meta", SHAPE_RULES["cuda"])
    head = LossHead(torch.empty(128_256, 4096, dtype=torch.bfloat16, device="meta"))
    states = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Counted() as counted:
        head.loss(states, torch.empty(8192, dtype=torch.long, device="meta"), 8192.0).backward()
    assert counted.products == 2 * 4
