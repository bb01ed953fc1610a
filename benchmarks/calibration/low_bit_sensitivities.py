"""Predicted losses of layers (nybble.quantization.sensitivity) against the measured: one layer quantised at a time.

    python benchmarks/calibration/low_bit_sensitivities.py --data train.jsonl --out sensitivities.json

Prints the correlation of the logarithms over layers, and the KL of mixed formats against one format for all.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from low_bit_kl import Exact, open_dithered, quantized_model, windows_of

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import dequantize, quantize
from nybble.layers.convert import quantizable_linears
from nybble.layers.precision import resolve_compute_dtype
from nybble.quantization.sensitivity import allocate_bits
from nybble.sources.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True, help="text the losses are predicted from")
    parser.add_argument("--evaluate", required=True, help="other text, on which they are measured")
    parser.add_argument("--layers", type=int, default=30, help="measured, evenly spread")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--measured-windows", type=int, default=4)
    parser.add_argument("--bits", default="3.127,2.6")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    source = open_dithered(options.model)
    windows = windows_of(source, options.data, options.windows)
    model = load_model(source, None, dtype)
    mixed = {bits: allocate_bits(model, windows, float(bits), QuantSpec()) for bits in options.bits.split(",")}
    losses = next(iter(mixed.values())).losses

    torch.set_grad_enabled(False)
    exact = Exact(model, windows_of(source, options.evaluate, options.measured_windows))
    names = quantizable_linears(model)
    measured: dict[str, float] = {}
    for name in names[:: max(1, len(names) // options.layers)]:
        linear = model.get_submodule(name)
        kept, spec = linear.weight.data, QuantSpec("nf2")
        linear.weight.data = dequantize(quantize(kept, spec), dtype)
        measured[name] = exact.compare(model)[0]
        linear.weight.data = kept
        print(f"{name} nf2: predicted {losses[name]['nf2']:.5f} measured {measured[name]:.5f}", flush=True)
    logs = torch.tensor([[math.log(losses[name]["nf2"]), math.log(kl)] for name, kl in measured.items()])
    ranks = logs.argsort(0).argsort(0).float()
    result = {
        "correlation_of_logs": float(torch.corrcoef(logs.T)[0, 1]),
        "rank_correlation": float(torch.corrcoef(ranks.T)[0, 1]),
        "measured": measured,
        "predicted": {name: losses[name]["nf2"] for name in measured},
        "kl": {},
    }
    arms = {format: BaseFormats(QuantSpec(format)) for format in ("nf4", "nf3", "nf2")}
    for arm, formats in (arms | {bits: each.formats for bits, each in mixed.items()}).items():
        kl, loss = exact.compare(quantized_model(source, formats, "absmax", windows, dtype))
        result["kl"][arm] = {"kl": kl, "loss": loss}
        if arm in mixed:
            result["kl"][arm] |= {"bits": mixed[arm].bits, "predicted": mixed[arm].predicted_kl}
        print(arm, result["kl"][arm], flush=True)
    print({key: result[key] for key in ("correlation_of_logs", "rank_correlation")})
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
