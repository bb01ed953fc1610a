"""KL to the 16-bit model on held-out text, for formats of four, three and two bits and three ways to choose scales.

    python benchmarks/calibration/low_bit_kl.py --calibrate a.jsonl --evaluate b.jsonl --arms nf4:absmax --out kl.json

Arms are FORMAT:QUALITY. Each is quantised from the dithered demo model (or another 16-bit --model), calibrated on
windows of --calibrate, and measured on windows of --evaluate and of builtin:pydoc. An arm that --out already holds is
not measured again, so that arms can be run one by one.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.search import search_weight
from nybble.data.examples import EncodedExample
from nybble.data.packing import pack_tokens
from nybble.data.prepare import prepare
from nybble.data.template import ChatTemplate
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import quantizable_linears, replace_linears
from nybble.layers.precision import resolve_compute_dtype
from nybble.quantization.blocks import BlockCalibrator
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel

TOKENS = 256  # of a window


def open_dithered(model: str) -> StoredModel:
    """The source; one on a four-bit lattice is dithered, as docs/lab-notes.md says."""
    return open_model(model).without_lattice()


def windows_of(source: StoredModel, data: str, count: int, seed: int = 0) -> Tensor:
    rows = prepare(data, ChatTemplate(source.load_tokenizer(), "auto"), max_seq_len=1024).train
    return cut_windows(rows, count=count, tokens=TOKENS, seed=seed)


def cut_windows(rows: Sequence[EncodedExample], *, count: int, tokens: int, seed: int) -> Tensor:
    """Rows in a seeded order, joined and cut: int64 `(count, tokens)`."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: list[Tensor] = []
    while sum(map(len, taken)) < count * tokens:
        taken.append(rows[order[len(taken)]].input_ids.long())
    return torch.cat(taken)[: count * tokens].view(count, tokens)


def quantized_model(
    source: StoredModel, formats: BaseFormats, quality: str, calibration: Tensor, dtype: torch.dtype
) -> Any:
    """The source in memory with its linears quantised."""
    if quality == "absmax":
        return load_model(source, formats, dtype)
    model = load_model(source, None, dtype)
    names = quantizable_linears(model)
    weights = (
        calibrated_weights(source, formats, calibration, dtype)
        if quality == "calibrated"
        else {name: search_weight(model.get_submodule(name).weight, formats.of(name)) for name in names}
    )
    replace_linears(model, names, formats, dtype)
    for name in names:
        model.get_submodule(name).load_quantized(weights[name])
    return model


def calibrated_weights(
    source: StoredModel, formats: BaseFormats, windows: Tensor, dtype: torch.dtype
) -> dict[str, QuantizedTensor]:
    calibrator = BlockCalibrator(source, formats, windows, dtype)
    weights: dict[str, QuantizedTensor] = {}
    for index in range(len(calibrator.blocks)):
        weights |= {name.removesuffix(".weight"): q for name, q in calibrator.run(index)[0].items()}
    return weights


class Exact:
    """The 16-bit model's states over some windows, and how far other models lie from them."""

    def __init__(self, model: Any, windows: Tensor):
        causal_lm = CausalLM.of(model)
        self.windows, self.head = windows, causal_lm.head
        self.states = [states.clone() for states in self._states(causal_lm)]

    def compare(self, model: Any) -> tuple[float, float]:
        """Mean KL(16-bit | model) and loss of the model, nats a token."""
        kl, loss, causal_lm = [], [], CausalLM.of(model)
        for states, exact, window in zip(self._states(causal_lm), self.states, self.windows, strict=True):
            p, q = (h.logits(x).float().log_softmax(1) for h, x in ((self.head, exact), (causal_lm.head, states)))
            kl.append((p.exp() * (p - q)).sum(1).mean())
            loss.append(-q[:-1].gather(1, window[1:, None]).mean())
        return float(torch.stack(kl).mean()), float(torch.stack(loss).mean())

    def _states(self, model: CausalLM) -> Iterator[Tensor]:
        for window in self.windows:
            with torch.no_grad():
                states = model.hidden(pack_tokens([window]), torch.arange(TOKENS))
            yield states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--arms", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    source = open_dithered(options.model)
    calibration = windows_of(source, options.calibrate, options.calibration_tokens // TOKENS)
    texts = {"evaluate": options.evaluate, "pydoc": "builtin:pydoc"}
    windows = {name: windows_of(source, data, options.evaluation_tokens // TOKENS) for name, data in texts.items()}
    base = load_model(source, None, dtype)
    exact = {name: Exact(base, each) for name, each in windows.items()}
    for arm in options.arms.split(","):
        if arm in results:
            continue
        format, quality = arm.split(":")
        started = time.perf_counter()
        model = quantized_model(source, BaseFormats(QuantSpec(format)), quality, calibration, dtype)
        seconds = time.perf_counter() - started
        results[arm] = {"seconds": seconds, "threads": torch.get_num_threads(), "tokens": calibration.numel()}
        for name, each in exact.items():
            with torch.no_grad():
                kl, loss = each.compare(model)
            results[arm] |= {f"kl_{name}": kl, f"loss_{name}": loss}
        print(arm, {key: round(value, 4) for key, value in results[arm].items()}, flush=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
