"""One tiny model of a type through everything that training does, judged by transformers and PEFT.

Saved as transformers saves it, loaded in four bits, trained for five steps on rows packed and padded, written as an
adapter, read by PEFT on the same weights. What is compared: the loss and the adapters' gradients with those of the
model's own forward on each row alone, and the logits with PEFT's.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, attach_adapters, resolve_targets
from nybble.layers.dense import weight_matrix
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.quantized_experts import expert_shapes
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.runs.adapter_writing import adapter_config, write_adapter
from nybble.sources.folder import FolderSource
from nybble.sources.load import load_model
from nybble.training.optimizer import AdamW

RANK, ALPHA, STEPS, LR = 4, 8.0, 5, 1e-2
LENGTHS = (9, 5, 12)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the loss, of the gradients' norm, of the logits' largest: roundings of two layers and a head.
TOLERANCES = {torch.float32: (1e-4, 2e-3, 1e-3), torch.bfloat16: (2e-2, 0.15, 0.1)}


@dataclass(frozen=True)
class Trained:
    """How a model of a type trained in one dtype."""

    path: str
    rows: str
    peft: str


class Wrong(AssertionError):
    """It trained, but not what the model is."""


def train_in(folder: Path, dtype: torch.dtype, out: Path) -> Trained:
    """Train the model in `folder` on packed and on padded rows.

    Raises:
        NybbleError: refused.
        Wrong: another loss, other gradients or other logits than the model's own.
    """
    source = FolderSource(folder, folder.name)
    model = load_model(source, BaseFormats(QuantSpec("nf4")), dtype)
    targets = resolve_targets(model, "all-linear")
    attach_adapters(model, targets, rank=RANK, alpha=ALPHA)
    ran = {}
    for packing in (True, False):
        _fill_adapters(model)
        ran[packing] = _train(model, dtype, packing)
    write_adapter(model, out, adapter_config(model, str(folder)))
    read = _compare_with_peft(model, folder, out, dtype)
    path = "decoder blocks" if ran[True][0].startswith("decoder blocks") else "generic"
    return Trained(path, "packed" if ran[True][1] else "padded", read)


def rows_for(model: PreTrainedModel) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    least = model.config.get_text_config().vocab_size
    ids = [torch.randint(5, min(least, 250), (n,), generator=generator, dtype=torch.int32) for n in LENGTHS]
    supervised = [torch.arange(n) >= n // 3 for n in LENGTHS]
    return [EncodedExample(i, s, f"rows:{n}") for n, (i, s) in enumerate(zip(ids, supervised, strict=True))]


def _train(model: PreTrainedModel, dtype: torch.dtype, packing: bool) -> tuple[str, bool]:
    causal_lm = CausalLM.of(model, packing=packing)
    rows = rows_for(model)
    num_supervised = sum(row.supervised_tokens for row in rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    own_loss = _own_loss(model, rows) / num_supervised
    own_gradients = torch.autograd.grad(own_loss, parameters, allow_unused=True)
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.99, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss = causal_lm.train(step > 0).loss(collate(rows, causal_lm.packed))
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            _compare_with_own(losses[0], parameters, own_loss.item(), own_gradients, TOLERANCES[dtype])
        optimizer.gradient_norm()
        optimizer.step(LR, grad_scale=1.0)
    if not all(torch.tensor(losses).isfinite()):
        raise Wrong(f"losses {losses}")
    return causal_lm.name, causal_lm.packed


def _own_loss(model: PreTrainedModel, rows: list[EncodedExample]) -> Tensor:
    """Sum over the supervised tokens, each row alone through the model's own forward."""
    total = torch.zeros(())
    for row in rows:
        logits = model(input_ids=row.input_ids[None].long(), use_cache=False).logits[0, :-1].float()
        targets = row.input_ids[1:].long()
        total = total + F.cross_entropy(logits, targets, reduction="none")[row.supervised[1:]].sum()
    return total


def _compare_with_own(
    loss: float,
    parameters: list[Tensor],
    own_loss: float,
    own_gradients: tuple[Tensor | None, ...],
    tolerances: tuple[float, float, float],
) -> None:
    if not abs(loss - own_loss) <= tolerances[0] * max(1.0, abs(own_loss)):
        raise Wrong(f"loss {loss:.5f} for the model's {own_loss:.5f}")
    ours = torch.cat([p.grad.flatten() for p in parameters])
    own = torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(parameters, own_gradients, strict=True)
        ]
    )
    error = float((ours - own).norm() / own.norm().clamp_min(1e-30))
    if not error <= tolerances[1]:
        raise Wrong(f"gradients differ by {error:.1%}")


def _fill_adapters(model: PreTrainedModel) -> None:
    """A as drawn and random B: A has no gradient while B is 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_B.normal_(0, 0.02, generator=generator)


@torch.no_grad()
def _compare_with_peft(model: PreTrainedModel, folder: Path, adapter: Path, dtype: torch.dtype) -> str:
    """How PEFT reads the adapter; where it has all of it on the layers it was trained on, the logits must be the same.

    Of models whose experts became one tensor, PEFT takes every `down_proj` among the targets for the experts'. Of some
    it renames an adapter's keys as it would a checkpoint's, and then finds no layer for them. Of some larger models
    transformers cannot take the text alone, which then has no PEFT.
    """
    base = dequantized(model, folder)
    if base is None:
        return "the whole model only"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(base, adapter).eval()
    theirs = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    if theirs != adapters_of(model).keys():
        return "takes other layers"
    if any("missing adapter keys" in str(warning.message) for warning in said):
        return "loses layers"
    model.eval()
    for row in rows_for(model):
        ids = row.input_ids[None].long()
        ours = model(input_ids=ids, use_cache=False).logits.float()
        theirs = peft(input_ids=ids, use_cache=False).logits.float()
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= TOLERANCES[dtype][2]:
            raise Wrong(f"logits differ from PEFT's by {error:.1%}")
    return "the same"


@torch.no_grad()
def dequantized(model: PreTrainedModel, folder: Path) -> PreTrainedModel | None:
    """The model in transformers, fp32, with the weights that the four bits stand for and the ends that ours has; None
    where transformers finds no weights for it in the folder.
    """
    base, found = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"] - base.all_tied_weights_keys.keys():
        return None
    for theirs, ours in (
        (base.get_input_embeddings(), model.get_input_embeddings()),
        (base.get_output_embeddings(), model.get_output_embeddings()),
    ):
        if theirs is not None:
            theirs.weight.copy_(ours.weight)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            linear, dense = base.get_submodule(name.removesuffix(".base")), module.dequantize(torch.float32)
            weight_matrix(linear).copy_(dense)
    for name, shape in expert_shapes(base).items():
        experts = model.get_submodule(name)
        inner = experts.base if isinstance(experts, LoraExperts) else experts
        for index, matrix in enumerate(base.get_parameter(name)):
            dense = inner.widened(index, torch.float32)
            matrix.copy_(dense.T if shape.transposed else dense)
    return base
