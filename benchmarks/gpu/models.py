"""Models of random bytes in some shape, batches, and a step over them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu.check import LR, MAX_GRAD_NORM, RANK, Load, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# ---- models --------------------------------------------------------------------------------------


def config_of(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )  # fmt: skip


def fill(module: Any, device: str) -> Any:
    """Give what is on the meta device values on this one: random weights, random bytes, plausible scales."""
    import torch
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty_like(parameter, device=device)
                if value.dtype == torch.uint8:
                    value.random_(0, 256)
                elif value.ndim == 1:
                    value.fill_(1)
                else:
                    value.normal_(std=0.02)
                setattr(owner, name, nn.Parameter(value, requires_grad=False))
        if hasattr(owner, "quantized"):
            scales = owner.quantized().scale_parts()
            scales.offset.fill_(0.05), scales.absmax2.fill_(0.01)
    with torch.device(device):
        module.model.rotary_emb = LlamaRotaryEmbedding(module.config)
    return module


def adapt(module: Any) -> Any:
    """Adapters on all linears, whose B is not zero."""
    from torch import nn

    from nybble.layers.convert import attach_adapters, quantizable_linears

    for adapter in attach_adapters(module, quantizable_linears(module), rank=RANK, alpha=2 * RANK).values():
        nn.init.normal_(adapter.lora_B, std=0.01)
    return module.train()


def four_bit_model(shape: Shape, device: str, dtype: "torch.dtype | None" = None) -> Any:
    """A transformers model in four bits with adapters."""
    import torch

    from nybble.formats.quant_spec import BaseFormats, QuantSpec
    from nybble.layers.convert import quantizable_linears, replace_linears
    from nybble.sources.skeleton import build_skeleton

    dtype = dtype or torch.bfloat16
    module = build_skeleton(config_of(shape), dtype)
    replace_linears(module, quantizable_linears(module), BaseFormats(QuantSpec()), dtype)
    return adapt(fill(module, device))


def streamed_model(shape: Shape, device: str, folder: Path, resident: int) -> tuple[Any, Any]:
    """A model whose blocks have the bytes of one, read from a file, and their store: resident, or in host memory."""
    import torch
    from safetensors.torch import save_file

    from nybble.formats.bnb import stored_weight, to_bnb
    from nybble.formats.safetensors import SafetensorsFolder
    from nybble.layers.convert import quantizable_linears, stream_linears
    from nybble.memory.store import FolderBlockStore, StoredLinear
    from nybble.sources.skeleton import build_skeleton

    first = "model.layers.0."
    if not any(folder.iterdir()):
        block = four_bit_model(shape._replace(layers=1, vocabulary=8), device)
        tensors: dict[str, Tensor] = {}
        for name, each in block.named_modules():
            if hasattr(each, "quantized"):
                tensors |= to_bnb(f"{name.removesuffix('.base')}.weight", each.quantized().to("cpu"))
        save_file(tensors, folder / "model.safetensors")
    stored = SafetensorsFolder(folder)
    sizes = {name: entry.nbytes for name, entry in stored.entries.items()}
    module = build_skeleton(config_of(shape))
    names = quantizable_linears(module)
    linears = {}
    for name in names:
        if name.startswith(first):
            weight = stored_weight(f"{name}.weight", sizes, stored.read)
            entries = {part: stored.entries[part] for part in weight.pieces}
            linears[name.removeprefix(first)] = StoredLinear(weight, entries)
    blocks = [{f"model.layers.{i}.{leaf}": linear for leaf, linear in linears.items()} for i in range(shape.layers)]
    stream_linears(module, names, torch.bfloat16, device)
    torch.manual_seed(0)  # so that embeddings and head are the same, whatever is resident
    return adapt(fill(module, device)), FolderBlockStore(blocks, resident, device, in_ram=True)


def batch_of(shape: Shape, load: Load, packed: bool = True) -> Any:
    """Rows of random tokens, all supervised; in host memory."""
    import torch

    from nybble.data.examples import EncodedExample
    from nybble.data.packing import collate

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (load.tokens // load.row, load.row), generator=draw, dtype=torch.int32)
    return collate([EncodedExample(row, torch.ones(load.row, dtype=torch.bool), "") for row in ids], packed)


def adamw(model: Any) -> Any:
    from nybble.training.optimizer import AdamW

    return AdamW(model.parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)


def accumulation_of(model: Any, graphs: bool = False) -> Any:
    from nybble.training.accumulation import GradientAccumulation
    from nybble.training.objective import SupervisedFineTuning

    return GradientAccumulation(SupervisedFineTuning(), model, graphs=graphs)


def add_gradients(accumulation: Any, batch: Any) -> Any:
    """Both passes over a batch that is a step of its own; what it adds to the loss."""
    from nybble.training.objective import Totals

    return accumulation(accumulation.prepare(batch), Totals(batch.supervised_tokens)).loss


def training_step(accumulation: Any, batch: Any, optimizer: Any) -> None:
    """As the training loop takes one, from a batch in host memory."""
    add_gradients(accumulation, batch)
    norm = float(optimizer.gradient_norm())
    optimizer.step(LR, grad_scale=min(1.0, MAX_GRAD_NORM / norm))
