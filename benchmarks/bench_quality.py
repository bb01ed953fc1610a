"""What each part of calibration brings: KL to the 16-bit model, on text that was not calibrated on.

    python benchmarks/bench_quality.py --data train.jsonl --validation-data test.jsonl --arms absmax,default,shift=0

An arm is `absmax`, `search`, or `default` with options of FeedbackOptions or of the text changed:
`shift=0+damping=0.1`, `tokens=32768`, `mix=0.25`, `seed=1`. Compared on three kinds of text: held-out rows of --data,
builtin:pydoc, and --prose, a text file of another kind (licences by default where the system has them). The model is
dithered where it lies on a lattice. Results are added to quality-ablations.json, arm by arm.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import BENCHMARKS, about_machine, versions
from torch import Tensor

from nybble.calibration.feedback import FeedbackOptions
from nybble.calibration.search import search_weight
from nybble.data.calibration_text import calibration_text
from nybble.data.readers import read_examples
from nybble.data.template import ChatTemplate
from nybble.evaluation.quality import Comparison
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.precision import resolve_compute_dtype
from nybble.memory.measure import PeakMemory
from nybble.quantization.blocks import BlockCalibrator
from nybble.sources.load import load_model
from nybble.sources.open import open_model

LICENCES = Path("/usr/share/common-licenses")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True, help="rows to calibrate on")
    parser.add_argument("--validation-data", required=True, help="rows to compare on, others than --data's")
    parser.add_argument("--prose", type=Path, help="a text file of another kind")
    parser.add_argument("--arms", default="absmax,search,default")
    parser.add_argument("--eval-tokens", type=int, default=4000, help="of each kind (4000)")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results" / "quality-ablations.json")
    arguments = parser.parse_args()

    source = open_model(arguments.model).without_lattice()
    template, dtype = ChatTemplate(source.load_tokenizer()), resolve_compute_dtype("auto", CPU)
    kinds = {
        "own": rows(arguments.validation_data, template, arguments.eval_tokens, 0),
        "code": rows("builtin:pydoc", template, arguments.eval_tokens, 0),
        "prose": prose(arguments.prose, template, arguments.eval_tokens),
    }
    base = load_model(source, None, dtype)
    comparisons = {kind: Comparison(base, documents) for kind, documents in kinds.items()}
    del base
    model = load_model(source, BaseFormats(), dtype)
    for name in arguments.arms.split(","):
        with PeakMemory(CPU) as memory:
            started = time.perf_counter()
            put(model, source, name, template, arguments.data, dtype)
            seconds = time.perf_counter() - started
        lost = {kind: asdict(comparison.compare(model)) for kind, comparison in comparisons.items()}
        result = {"seconds": seconds, "peak_bytes_above": memory.peak_bytes - memory.start_bytes} | lost
        add(arguments.results, name, result)
        means = ", ".join(f"{kind} {lost[kind]['kl_mean']:.4f}" for kind in lost)
        print(f"{name}: KL {means}; {seconds:.0f} s", flush=True)


def put(model: Any, source: Any, arm: str, template: ChatTemplate, data: str, dtype: torch.dtype) -> None:
    """The arm's weights into the model."""
    if arm in ("absmax", "search"):
        for name in source.linears:
            weight = source.read_linear(name)
            q = quantize(weight, QuantSpec()) if arm == "absmax" else search_weight(weight, QuantSpec())
            model.get_submodule(name).load_quantized(q)
        return
    text: dict[str, Any] = {"tokens": 8192, "mix": 0.5, "seed": 1}
    options = FeedbackOptions()
    for change in arm.removeprefix("default").strip("+").split("+"):
        name, _, value = change.partition("=")
        if name in text:
            text[name] = type(text[name])(value)
        elif name:
            options = replace(options, **{name: type(getattr(options, name))(value)})
    own = rows(data, template, 2 * text["tokens"], text["seed"])
    windows = calibration_text(
        own, data, template, num_tokens=text["tokens"], seed=text["seed"], general_share=text["mix"]
    ).windows
    calibrator = BlockCalibrator(source, BaseFormats(), windows, dtype, options)
    for index in range(len(calibrator.blocks)):
        for name, q in calibrator.run(index)[0].items():
            model.get_submodule(name.removesuffix(".weight")).load_quantized(q)


def rows(data: str, template: ChatTemplate, num_tokens: int, seed: int) -> list[Tensor]:
    """Shuffled rows until there are enough tokens."""
    examples = read_examples(data).examples
    random.Random(seed).shuffle(examples)
    found: list[Tensor] = []
    for example in examples:
        if sum(map(len, found)) >= num_tokens:
            break
        found += [row.input_ids.long() for row in template.encode_example(example)]
    return found


def prose(path: Path | None, template: ChatTemplate, num_tokens: int, length: int = 400) -> list[Tensor]:
    names = ("GPL-3", "Apache-2.0", "MPL-2.0", "LGPL-2.1")
    text = path.read_text() if path else "\n".join((LICENCES / name).read_text() for name in names)
    ids = torch.tensor(template.encoder.encode(text[len(text) // 3 :][: 10 * num_tokens]))
    return list(ids[: min(num_tokens, len(ids)) // length * length].split(length))


def add(results: Path, arm: str, result: dict[str, Any]) -> None:
    report = json.loads(results.read_text()) if results.is_file() else {"arms": {}}
    report["about"] = about_machine(torch.get_num_threads()) | versions("nybble", "torch", "transformers")
    report["arms"][arm] = result
    results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
