"""How much the model's answers suffer when one layer gets fewer bits, and the formats that suffer least in all.

The predicted KL of a layer's error D (what quantising adds to its weight) is the second-order term of the divergence
between the model's distributions before and after, per token:

    KL ~ 1/2 E[ (g' D x)^2 ]

x is what the layer gets at a position, g the gradient of a sampled token's log-probability with respect to what the
layer gives there (the Fisher information, as in Amari 1998; samples come from the model itself, not from the text).
One forward and one backward pass of the 16-bit model over the calibration windows give x and g of every layer at once,
and each format costs one product more a layer, where quantising each layer by itself and comparing outputs would cost
a pass of the model each. Positions count as independent. Scales are those of absmax: better scales lower all formats
of a layer alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.calibration.bit_allocation import Option, choose_formats
from nybble.errors import ConfigError, ModelError
from nybble.events import Event, Listener, silent
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.backbone import decoder_states
from nybble.layers.convert import quantizable_linears
from nybble.layers.dense import weight_matrix
from nybble.layers.loss_head import Head
from nybble.layers.own_head import loss_head
from nybble.quantization.watch import watched
from nybble.sources.load import load_model
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MixedFormats:
    """The formats chosen for a model.

    Args:
        formats: of each layer.
        losses: predicted KL in nats a token, by layer and format.
        bits: a weight, over the quantised linears, scales included.
    """

    formats: BaseFormats
    losses: dict[str, dict[str, float]]
    bits: float

    @property
    def predicted_kl(self) -> float:
        return sum(self.losses[layer][format] for layer, format in self.formats.layers.items())


@dataclass(frozen=True)
class MixedMeasured(Event):
    """The formats of a model's layers are chosen."""

    kind: ClassVar[str] = "formats"
    mixed: MixedFormats

    def fields(self) -> dict[str, Any]:
        mixed = self.mixed
        return {"bits": mixed.bits, "predicted_kl": mixed.predicted_kl, "layers": dict(mixed.formats.layers)}


def allocate_bits(
    model: "PreTrainedModel", windows: Tensor, bits: float, spec: QuantSpec, *, seed: int = 0
) -> MixedFormats:
    """Formats among those of --mixed that take `bits` a weight at most and are predicted to lose least.

    Args:
        model: dense, frozen, in eval mode.
        windows: int64 `(windows, tokens)`, the calibration text.
        spec: block size and double quantisation of all layers.

    Raises:
        ConfigError: no choice takes so few bits.
    """
    candidates = [replace(spec, format=each.name) for each in FORMATS.values() if each.mixable]
    sizes = {name: model.get_submodule(name).weight.numel() for name in quantizable_linears(model)}
    total = sum(sizes.values())
    most, *_, least = (8 * sum(each.bytes(n) for n in sizes.values()) / total for each in candidates)
    if bits < least:
        raise ConfigError(
            f"--mixed {bits:g} asks for fewer bits a weight than the smallest format takes.",
            f"Allowed: {least:.4g} (all {candidates[-1].format}) to {most:.4g} (all {candidates[0].format}), "
            "scales included.",
            "Raise --mixed, or --block-size.",
        )
    losses = layer_losses(model, windows, candidates, seed=seed)
    options = {
        name: [Option(each.format, each.bytes(n), losses[name][each.format]) for each in candidates]
        for name, n in sizes.items()
    }
    chosen = choose_formats(options, int(bits * total / 8))
    assert chosen is not None
    formats = BaseFormats(spec, chosen)
    return MixedFormats(formats, losses, 8 * sum(formats.of(name).bytes(n) for name, n in sizes.items()) / total)


def layer_losses(
    model: "PreTrainedModel", windows: Tensor, specs: Sequence[QuantSpec], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Predicted KL in nats a token when one layer alone is quantised: layer -> format -> KL.

    Args:
        windows: int64 `(windows, tokens)`; each is passed by itself.
        seed: of the sampled tokens.
    """
    names = quantizable_linears(model)
    losses: dict[str, dict[str, float]] = {name: {spec.format: 0.0 for spec in specs} for name in names}
    head, generator = loss_head(model), torch.Generator().manual_seed(seed)

    def see(name: str, linear: nn.Module, x: Tensor, y: Tensor) -> None:
        rows = x.detach().flatten(0, -2)  # (T, in)

        def add(gradient: Tensor) -> None:
            for spec in specs:
                moved = rows @ _error(linear, spec).T  # (T, out)
                along = (gradient.flatten(0, -2).float() * moved.float()).sum(1)  # (T,)
                losses[name][spec.format] += float(along.square().sum()) / 2

        y.register_hook(add)

    def ask_for_gradient(name: str, embedding: nn.Module, ids: Tensor, embedded: Tensor) -> None:
        embedded.requires_grad_()  # every parameter is frozen, and yet a gradient flows

    linears = {name: model.get_submodule(name) for name in names}
    ends = {"embedding": model.get_input_embeddings()}
    with watched(linears, see), watched(ends, ask_for_gradient):
        for window in windows:
            positions = torch.arange(len(window), device=window.device)[None]
            states = decoder_states(model, window[None], positions)[0]  # (T, hidden)
            targets = _sample(head, states.detach(), generator)
            head.loss(states, targets, 1.0).backward()
    return {name: {format: loss / windows.numel() for format, loss in by.items()} for name, by in losses.items()}


@torch.no_grad()
def _error(linear: nn.Module, spec: QuantSpec) -> Tensor:
    """What quantising adds to a dense linear's weight, `(out, in)`."""
    weight = weight_matrix(linear)
    return dequantize(quantize(weight, spec), weight.dtype) - weight


@torch.no_grad()
def _sample(head: Head, states: Tensor, generator: torch.Generator) -> Tensor:
    """A token from the model's own distribution at every position, int64 `(T,)`."""
    chunks = states.split(head.chunk_rows(states.dtype.itemsize))
    drawn = [torch.multinomial(head.logits(chunk).float().softmax(1).cpu(), 1, generator=generator) for chunk in chunks]
    return torch.cat(drawn)[:, 0].to(states.device)


MEASURED_TOKENS = 4096  # of the text that layers' losses are measured on


def measure_formats(
    source: StoredModel,
    bits: float,
    spec: QuantSpec,
    windows: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    report: Listener = silent,
) -> MixedFormats:
    """Formats for a source's layers; the 16-bit model is in memory while they are measured.

    Args:
        spec: block size and double quantisation of all layers.
        windows: int64 `(windows, tokens)`, of which some are taken.

    Raises:
        ModelError: the source is already quantised.
        ConfigError: no choice takes so few bits.
    """
    if source.experts:
        raise ModelError(
            f"{source.name} has experts, whose losses --mixed does not measure.",
            "--mixed chooses formats for models without experts.",
            "Leave --mixed out: all layers and experts get --format.",
        )
    if source.quant_spec is not None:
        raise ModelError(
            f"{source.name} comes already quantised.",
            "--mixed chooses formats for a 16-bit model.",
            "Give the 16-bit model, or leave --mixed out.",
        )
    model: PreTrainedModel = load_model(source, None, dtype, device, report=report)
    mixed = allocate_bits(model, some_windows(windows, MEASURED_TOKENS).to(device), bits, spec)
    report(MixedMeasured(mixed))
    return mixed


def some_windows(windows: Tensor, num_tokens: int) -> Tensor:
    """About `num_tokens` of the windows' tokens, from all over the text."""
    return windows[:: max(1, windows.numel() // num_tokens)]
