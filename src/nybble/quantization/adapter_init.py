"""Start a model's adapters from what its base lost when it was quantised, or from what its layers are given."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.calibration.adapter_init import explained_shares, largest_directions, nearest_product
from nybble.calibration.statistics import InputStatistics
from nybble.errors import ModelError
from nybble.layers.backbone import decoder_states
from nybble.layers.convert import adapters_of
from nybble.layers.lora import LoraEmbedding, LoraLinear
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.quantization.watch import watched
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATISTICS_BYTES = 1 << 29  # of matrices H gathered in one pass over the windows


def check_initialisable(source: StoredModel, quantized: bool) -> None:
    """Refuse what has no error to start from.

    Raises:
        ModelError: the base stays in 16 bits, or comes already quantised.
    """
    if not quantized or source.quant_spec is not None:
        state = "comes already quantised" if source.quant_spec is not None else "is not quantised (--format none)"
        raise ModelError(
            f"{source.name} {state}: what quantisation loses is not known.",
            "--init loftq, activation, pissa and olora need a 16-bit model that is quantised for this run.",
            "Give the 16-bit model, or use --init default.",
        )


@torch.no_grad()
def initialise_adapters(
    model: "PreTrainedModel", source: StoredModel, windows: Tensor | None, statistics_bytes: int = STATISTICS_BYTES
) -> None:
    """Give every adapter the value nearest to its layer's error, and let it remember it as its initial one.

    Args:
        model: a quantised base with adapters that have not been trained.
        source: the 16-bit model that the base was made from.
        windows: int64 `(windows, tokens)`, the text that the layers' inputs come from; None weighs all errors alike.
        statistics_bytes: of what is gathered in a pass over the windows, one layer's at least; less makes more passes.

    Raises:
        ModelError: as `check_initialisable`.
    """
    adapters = {name: each for name, each in adapters_of(model).items() if isinstance(each.base, QuantizedLinear)}
    check_initialisable(source, bool(adapters))
    for name, adapter, hessian in _with_statistics(model, adapters, windows, statistics_bytes):
        weight = source.read_linear(name)
        assert isinstance(weight, Tensor)
        quantized: Any = adapter.base
        error = weight.to(adapter.lora_A.device).float() - quantized.dequantize(torch.float32)
        adapter.start_from(*nearest_product(error, adapter.rank, adapter.scaling, hessian))


@torch.no_grad()
def start_along_inputs(model: "PreTrainedModel", windows: Tensor, statistics_bytes: int = STATISTICS_BYTES) -> None:
    """Let every adapter's A be the directions in which its layer's inputs are largest (EVA); B stays zero.

    Args:
        model: with adapters that have not been trained; of an embedding they stay as they are.
        windows: int64 `(windows, tokens)`, the text that the inputs come from.
        statistics_bytes: as `initialise_adapters` takes them.
    """
    adapters = {name: each for name, each in adapters_of(model).items() if not isinstance(each, LoraEmbedding)}
    for _, adapter, hessian in _with_statistics(model, adapters, windows, statistics_bytes):
        assert hessian is not None
        adapter.lora_A.copy_(largest_directions(hessian, adapter.rank))


@torch.no_grad()
def shared_out_ranks(
    model: "PreTrainedModel", windows: Tensor, rho: float, statistics_bytes: int = STATISTICS_BYTES
) -> dict[str, int]:
    """Ranks for the layers that the adapters' ranks are given out to once more, by what they explain (EVA).

    Each layer's candidates are the shares of its inputs' variance along their largest directions, rho times its rank of
    them; the largest of all layers get a rank each, as many as there were. Paischer et al. 2024 (arXiv 2410.07170,
    section 3); of equal ones the first layer's, as q, k and v have. Embeddings keep theirs.

    Args:
        model, windows, statistics_bytes: as `start_along_inputs` takes them.
        rho: how many times its rank a layer may get at most, at least 1.

    Returns:
        layer -> rank, 0 where it gets none.
    """
    adapters = {name: each for name, each in adapters_of(model).items() if not isinstance(each, LoraEmbedding)}
    shares = {
        name: explained_shares(hessian, round(rho * adapter.rank))
        for name, adapter, hessian in _with_statistics(model, adapters, windows, statistics_bytes)
        if hessian is not None
    }
    return share_out(shares, sum(adapter.rank for adapter in adapters.values()))


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of a layer's shares are among the `budget` largest of all."""
    names = [name for name, own in shares.items() for _ in own]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)[:budget]
    counts = Counter(names[place] for place in order.tolist())
    return {name: counts[name] for name in shares}


def _with_statistics(
    model: "PreTrainedModel", adapters: dict[str, LoraLinear], windows: Tensor | None, statistics_bytes: int
) -> Iterator[tuple[str, LoraLinear, Tensor | None]]:
    """Each adapter with H of its layer's inputs, or None without windows; as many layers a pass as memory allows.

    The inputs are those of the model with all adapters as they are now: layers before this one already start from
    their first value.
    """
    if windows is None:
        yield from ((name, adapter, None) for name, adapter in adapters.items())
        return
    waiting = list(adapters.items())
    while waiting:
        taken, num_bytes = 0, 0
        while taken < len(waiting) and (not taken or num_bytes < statistics_bytes):
            num_bytes += 4 * waiting[taken][1].in_features ** 2
            taken += 1
        now, waiting = waiting[:taken], waiting[taken:]
        statistics = _input_statistics(model, dict(now), windows)
        yield from ((name, adapter, statistics.pop(name).finish()) for name, adapter in now)


def _input_statistics(
    model: "PreTrainedModel", adapters: dict[str, LoraLinear], windows: Tensor
) -> dict[str, InputStatistics]:
    statistics = {name: InputStatistics(each.in_features, each.lora_A.device) for name, each in adapters.items()}

    def see(name: str, adapter: nn.Module, x: Tensor, y: Tensor) -> None:
        statistics[name].add(x.flatten(0, -2))

    device = next(iter(adapters.values())).lora_A.device
    with watched(adapters, see):
        for window in windows.to(device):
            decoder_states(model, window[None], torch.arange(len(window), device=window.device)[None])
    return statistics
