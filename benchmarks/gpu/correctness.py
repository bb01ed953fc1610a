"""Phases that ask whether the check can run, and whether results are right: facts, right, gradients."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT

from gpu.check import KEEPS, NO_CARD, SMALL, TINY, Check, Load
from gpu.models import accumulation_of, add_gradients, batch_of, four_bit_model, streamed_model

if TYPE_CHECKING:
    from torch import Tensor

LEAST_CAPABILITY, LEAST_BYTES = (8, 0), 20e9
PACKAGES = ("torch", "triton", "transformers", "safetensors", "peft", "bitsandbytes", "pytest", "pydantic")


def facts(check: Check) -> None:
    """Card, driver, versions, what `nybble doctor` says; and whether the check can run at all."""
    installed = {name: each.version for each in metadata.distributions() if (name := each.name) in PACKAGES}
    check.say("versions", python=sys.version.split()[0], **{name: installed.get(name) for name in PACKAGES})
    import torch

    from nybble.cli.doctor import examine

    lacking = what_is_lacking(check) if check.on_card else None
    if lacking is not None:
        check.say("lacking", why=lacking)
        return
    if check.on_card:
        card = torch.cuda.get_device_properties(0)
        check.say("card", name=card.name, capability=f"{card.major}.{card.minor}", bytes=card.total_memory,
                  free=torch.cuda.mem_get_info()[0], processors=card.multi_processor_count, cuda=torch.version.cuda,
                  driver=driver())  # fmt: skip
    check.say("doctor", **examine())


def what_is_lacking(check: Check) -> str | None:
    """In one sentence why this check cannot run here, and what works all the same."""
    import torch

    from nybble.kernels.hardware import why_no_gpu

    works = "On the processor all of nybble works: nybble train --device cpu."
    if (why := why_no_gpu()) is not None:
        return f"The check needs an NVIDIA card of compute capability 8.0, and PyTorch for CUDA: {why}. {works}"
    capability, (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
    if capability < LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"The card has compute capability {found}; nybble's kernels for GPUs need 8.0. Models train through " \
               f"their own modules there, slowly. {works}"  # fmt: skip
    if util.find_spec("triton") is None:
        return "Triton is not installed, which PyTorch for CUDA brings: pip install triton. Without it models train " \
               f"through their own modules, slowly. {works}"  # fmt: skip
    if check.tiny or free >= LEAST_BYTES:
        return None
    enough = f"the check's model, of 8 billion weights, takes {LEAST_BYTES / 1e9:.0f} GB"
    if total >= LEAST_BYTES:
        return f"Others use the card: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free, {enough}. Stop them " \
               "(nvidia-smi lists them), or choose another card with CUDA_VISIBLE_DEVICES."  # fmt: skip
    return f"The card is too small for this check: it has {total / 1e9:.1f} GB, {enough}. Add --tiny to test what is " \
           "right; nybble itself trains what fits: nybble plan."  # fmt: skip


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def right(check: Check) -> None:
    """The tests of the kernels, and compute-sanitizer over some of them."""
    chosen = "cuda or gpu" if check.on_card else "(rms_norm_out or rope_ or dequantize_4bit_out) and reference"
    files = ["tests/kernels/test_every_op.py"]
    if check.on_card:
        files += ["tests/kernels/test_four_bit.py", "tests/memory/test_graph.py"]
        files += ["tests/memory/test_store.py", "tests/memory/test_pager.py"] if util.find_spec("pydantic") else []
    workers = ["-n", "8"] if check.on_card and util.find_spec("xdist") else []
    text, code = run_tests(check, [*files, "-k", chosen, *workers], 0.7 * check.left)
    results = dict(test_results(text))
    for name, passed in results.items():
        if not passed:
            check.say("test", name=name, error=1, allowed=0, passed=False)
    check.test(f"{sum(results.values())} of {len(results)} tests of kernels pass, exit status", code, 0)
    check.say("kernels", use=",".join(sound_kernels(results, check.device)))
    sanitizer = shutil.which("compute-sanitizer")
    if not check.on_card or sanitizer is None:
        check.say("sanitizer", result=NO_CARD if not check.on_card else "is not installed")
        return
    chosen = "twins and triton-cuda and (dequantize_4bit_out or cross_entropy_ or rope_)"
    under = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"]
    text, code = run_tests(check, [files[0], "-k", chosen], check.left, under)
    check.say("sanitizer", result=next((line for line in text.splitlines() if "ERROR SUMMARY" in line), f"exit {code}"))


def run_tests(check: Check, arguments: list[str], limit: float, under: Sequence[str] = ()) -> tuple[str, int]:
    """What pytest says, also where it was stopped (exit status 124)."""
    command = [*under, sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o"]
    command += ["addopts=--import-mode=importlib", *arguments]
    log = check.out / f"pytest-{'under-sanitizer' if under else 'kernels'}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=max(1, limit)).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return log.read_text(), code


def test_results(text: str) -> Iterator[tuple[str, bool]]:
    """Test's name, and whether it passed, from pytest's lines, which xdist writes the other way round."""
    for line in text.splitlines():
        if found := re.search(r"(?:(PASSED|FAILED|ERROR) )?tests/\S+::(\S+)(?: (PASSED|FAILED|ERROR))?", line):
            before, name, after = found.groups()
            if before or after:
                yield name, (before or after) == "PASSED"


def sound_kernels(results: Mapping[str, bool], device: str) -> list[str]:
    """The backends for NYBBLE_KERNELS, where one of those that it would take failed a test; else none."""
    from nybble.kernels.registry import PREFERENCE

    failed = {name for name in PREFERENCE[device] for test, good in results.items() if not good and f"-{name}-" in test}
    return [name for name in PREFERENCE[device] if name not in failed] if failed else []


def gradients(check: Check) -> None:
    """Whole models against transformers' own in fp64; packed or not; twice; streamed or resident."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the deterministic steps; read when CUDA starts
    import torch

    from nybble.layers.backbone import ModuleForward
    from nybble.layers.batch_model import Verdict
    from nybble.layers.causal_lm import CausalLM
    from nybble.layers.own_head import loss_head

    shape, load = (TINY, Load(21, 7)) if check.tiny else (SMALL, Load(1080, 270))  # also: no multiple of 64
    batch = batch_of(shape, load)
    for dtype, slack in ((torch.float32, 2.0), (torch.bfloat16, 1.1)):
        torch.manual_seed(1)
        module = four_bit_model(shape, check.device, dtype)
        exact = through_transformers(exact_twin(module), batch)
        own = difference(through_transformers(module, batch), exact)
        for keep in KEEPS:
            model = CausalLM.of(module, keep=keep)
            allowed = max(1e-5 if dtype == torch.float32 else 0.0, slack * own)
            ours = difference(gradients_of(model, batch), exact)
            check.test(f"{dtype}, {model.name}: gradients against fp64", ours, allowed)
        if dtype == torch.float32:
            rows = [batch_of(shape, load, packed=False)]
            forward = ModuleForward(module, "padded", checkpointing=False)
            padded = CausalLM(module, forward, loss_head(module), Verdict("generic", "padded"))
            apart = gradients_of(padded, rows[0])
            check.test("rows packed against a row a line", difference(gradients_of(model, batch), apart), 1e-4)
    torch.use_deterministic_algorithms(True, warn_only=True)
    again = [gradients_of(model, batch) for _ in range(2)]
    check.test("the same step twice differs in so many bits", int((again[0] != again[1]).sum()), 0)
    if check.on_card:
        from_graph, without = (gradients_of_four(model, graphs) for graphs in (True, False))
        check.test("micro-batches from graphs differ in so many bits", int((from_graph != without).sum()), 0)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for resident in (shape.layers, 0):
            module, store = streamed_model(shape, check.device, Path(folder), resident)
            found.append(gradients_of(CausalLM.of(module, store=store), batch))
    check.test("streamed against resident differs in so many bits", int((found[0] != found[1]).sum()), 0)


def gradients_of(model: Any, batch: Any) -> "Tensor":
    """All gradients of the adapters, one after the other."""
    import torch

    model.module.zero_grad()
    model.loss(batch.to(model.device)).backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


def gradients_of_four(model: Any, graphs: bool) -> "Tensor":
    """Of micro-batches of one shape that differ: one before there is a graph, two that make it, and a replay."""
    import torch

    from nybble.training.optimizer import FlatParameters

    accumulation, flat = accumulation_of(model, graphs), FlatParameters(model.parameters())
    for row in (60, 64, 56, 62):
        batch = batch_of(SMALL, Load(4 * row, row))
        add_gradients(accumulation, batch)
    torch.cuda.synchronize()
    return flat.gradients.clone()


def through_transformers(module: Any, batch: Any) -> "Tensor":
    """The same through the model's own modules, a row at a time, by autograd."""
    import torch
    import torch.nn.functional as F

    module.zero_grad()
    device = next(module.parameters()).device
    for row in batch.input_ids[0].split(batch.document_lengths):
        logits = module(input_ids=row[None].to(device)).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        (F.cross_entropy(logits, row[1:].to(device), reduction="sum") / batch.supervised_tokens).backward()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.cat([parameter.grad.double().flatten() for parameter in trained])


def exact_twin(module: Any) -> Any:
    """A copy in fp64, its four-bit weights written out."""
    import copy

    import torch
    from torch import nn

    from nybble.layers.convert import adapters_of

    twin = copy.deepcopy(module)
    for adapter in adapters_of(twin).values():
        linear = nn.Linear(adapter.in_features, adapter.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(adapter.base.dequantize(torch.float32), requires_grad=False)
        adapter.base = linear
    return twin.double()


def difference(got: "Tensor", expected: "Tensor") -> float:
    return float((got - expected).norm() / expected.norm())
