"""Does it pay to begin adapters with what quantisation lost? Held-out loss before and after fine-tuning.

    python benchmarks/calibration/adapter_init_finetune.py --data rows.jsonl --arms nf2:search:loftq --out init.json

Arms are FORMAT:QUALITY:INIT (format "none" keeps 16 bits). The base is the dithered demo model or another 16-bit
--model; rows, order and learning rate are the same for all arms. --out keeps finished arms, so that they can be run
one by one.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from low_bit_kl import TOKENS, cut_windows, open_dithered, quantized_model

from nybble.data.packing import pack
from nybble.data.prepare import prepare
from nybble.data.sampler import StepSampler
from nybble.data.template import ChatTemplate
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, quantizable_linears
from nybble.layers.precision import resolve_compute_dtype
from nybble.quantization.adapter_init import initialise_adapters
from nybble.sources.load import load_model
from nybble.training.loop import validation_loss
from nybble.training.objective import SupervisedFineTuning
from nybble.training.optimizer import AdamW
from nybble.training.schedule import learning_rate, warmup_steps

MAX_GRAD_NORM = 0.3


def fine_tune(model: Any, data: Any, options: argparse.Namespace) -> dict[str, float]:
    causal_lm, objective = CausalLM.of(model, keep="everything"), SupervisedFineTuning()
    validation = data.validation[: options.validation_rows]
    optimizer = AdamW(causal_lm.parameters(), beta1=0.9, beta2=0.999, weight_decay=0.0)
    before = validation_loss(objective, causal_lm, validation, 4).loss
    warmup = warmup_steps(0.03, options.steps)
    sampler = StepSampler(len(data.train), options.rows, options.seed)
    for step in range(1, options.steps + 1):
        causal_lm.loss(pack([data.train[row] for row in sampler.next_step()])).backward()
        norm = float(optimizer.gradient_norm())
        lr = learning_rate(step, options.steps, warmup, "cosine", options.lr)
        optimizer.step(lr, grad_scale=min(1.0, MAX_GRAD_NORM / max(norm, 1e-30)))
    return {"loss_before": before, "loss_after": validation_loss(objective, causal_lm, validation, 4).loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--arms", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--validation-rows", type=int, default=48)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    source = open_dithered(options.model)
    data = prepare(options.data, ChatTemplate(source.load_tokenizer(), "auto"), max_seq_len=512, seed=options.seed)
    windows = cut_windows(data.train, count=options.calibration_tokens // TOKENS, tokens=TOKENS, seed=options.seed)
    bases: dict[str, dict[str, QuantizedTensor]] = {}  # calibrating takes longer than training
    for arm in options.arms.split(","):
        if arm in results:
            continue
        started = time.perf_counter()
        format, quality, init = arm.split(":")
        if format == "none":
            model = load_model(source, None, dtype)
        elif f"{format}:{quality}" in bases:
            model = load_model(source, BaseFormats(QuantSpec(format)), dtype)
            for name, weight in bases[f"{format}:{quality}"].items():
                model.get_submodule(name).load_quantized(weight)
        else:
            model = quantized_model(source, BaseFormats(QuantSpec(format)), quality, windows, dtype)
            weights = {name: model.get_submodule(name).quantized() for name in quantizable_linears(model)}
            bases[f"{format}:{quality}"] = weights
        names = quantizable_linears(model)
        attach_adapters(model, names, rank=options.rank, alpha=2.0 * options.rank, seed=options.seed)
        if init != "default":
            initialise_adapters(model, source, windows if init == "activation" else None)
        made = time.perf_counter() - started
        results[arm] = {**fine_tune(model, data, options), "seconds_to_make": made}
        results[arm] |= {"seconds": time.perf_counter() - started, "steps": options.steps, "rows": options.rows}
        print(arm, {key: round(value, 4) for key, value in results[arm].items()}, flush=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
