"""Is nybble right on this GPU, how fast is it, and how much memory does it take? One answer in under eight minutes.

    make gpu-check                                                            (GPU_CHECK=--record keeps the record)
    PYTHONPATH=src python benchmarks/gpu_check.py --out build/gpu-check       from a source tree, nothing installed

Needs an NVIDIA card of compute capability 8.0 or above with 24 GB, PyTorch for CUDA, transformers and pytest; what else
is installed (PEFT, bitsandbytes, compute-sanitizer) is made use of. Nothing is downloaded: weights are random bytes in
the shapes of Llama 3.

Each phase is a process of its own with a limit; it appends lines of JSON to OUT/gpu-check.jsonl, and one that fails or
takes too long stops no other. A report to be pasted into an issue comes last. `--device cpu --tiny` rehearses all of it
on small shapes.

Steps are compared with two times made of ceilings that are measured in the same call: L0, the matrix products of base
and head alone, and L1, the ideal step, with attention and every byte that must move (`ideal_step`).
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from common import BENCHMARKS, ROOT, Table, about_machine, report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_CAPABILITY, LEAST_BYTES = (8, 0), 20e9
NO_CARD = "needs a card"
RANK, KEEPS = 16, ("nothing", "attention", "everything")
LR, MAX_GRAD_NORM = 1e-4, 0.3
PACKAGES = ("torch", "triton", "transformers", "safetensors", "peft", "bitsandbytes", "pytest", "pydantic")
# What phases of a rehearsal share; nybble first, which says how threads wait before torch is loaded.
IMPORTED = ["nybble.layers.causal_lm", "nybble.planning.shape", "transformers.models.llama.modeling_llama"]


class Shape(NamedTuple):
    """A Llama's widths."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Of hidden states, queries, keys and the MLP."""
        return self.hidden, self.hidden, self.hidden * self.kv_heads // self.heads, self.intermediate

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the weights, side by side where they share an input."""
        h, q, k, f = self.widths
        return {"qkv": (q + 2 * k, h), "o": (h, q), "gate_up": (2 * f, h), "down": (h, f)}

    @property
    def block_elements(self) -> int:
        return sum(rows * columns for rows, columns in self.products.values())

    @property
    def adapter_parameters(self) -> int:
        h, q, k, f = self.widths
        return self.layers * RANK * ((h + q) + 2 * (h + k) + (q + h) + 2 * (h + f) + (f + h))


class Load(NamedTuple):
    """A micro-batch: tokens in all, in rows of so many."""

    tokens: int
    row: int


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = Shape(8192, 28672, 12, 64, 8, 32768)  # 12 of its 80 blocks, which wait in 5.3 GB of pinned memory
SMALL = Shape(512, 1408, 2, 8, 2, 1000)
TINY = Shape(64, 96, 2, 4, 2, 96)
LOADS = (Load(8192, 2048), Load(2048, 2048), Load(1024, 512))


@dataclass(frozen=True)
class Check:
    """What a phase is told.

    Args:
        ends: as `time.time()` counts: when it is stopped.
        kernels: those of NYBBLE_KERNELS, empty for all.
    """

    phase: str
    device: str
    tiny: bool
    out: Path
    ends: float = math.inf
    kernels: str = ""

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds that remain, less what ending takes."""
        return self.ends - time.time() - 3

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 5

    @property
    def loads(self) -> tuple[Load, ...]:
        return (Load(64, 32),) if self.tiny else LOADS

    @property
    def model(self) -> Shape:
        return TINY if self.tiny else LLAMA_8B

    def say(self, what: str, **values: Any) -> None:
        """Append a line to the record."""
        with (self.out / "gpu-check.jsonl").open("a") as file:
            file.write(json.dumps({"phase": self.phase, "what": what, **values}, default=str) + "\n")

    def lines(self, what: str, phase: str | None = None) -> list[dict[str, Any]]:
        """Lines of the record so far."""
        path = self.out / "gpu-check.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if line["what"] == what and phase in (None, line["phase"])]

    def test(self, name: str, error: float, allowed: float) -> None:
        """One comparison; NaN passes none."""
        self.say("test", name=name, error=error, allowed=allowed, passed=bool(error <= allowed))


# ---- 0 to 2: facts, ceilings, right --------------------------------------------------------------


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


def ceilings(check: Check) -> None:
    """The card's rates: a copy, matrix products as wide as the model's and a little wider, attention."""
    import torch
    import torch.nn.functional as F

    draw = partial(torch.randn, device=check.device, dtype=torch.bfloat16)
    check.say("copy", bytes_per_s=2 * copy_rate(check, 2**31, check.device))  # read and written
    side = 128 if check.tiny else 8192
    a, b = draw(side, side), draw(side, side)
    check.say("square", flops=2 * side**3 / seconds_of(check, lambda: a @ b.T))
    shape = check.model
    for load in check.loads:
        h, q, _, _ = shape.widths
        for name, (rows, columns) in {**shape.products, "head": (shape.vocabulary, h)}.items():
            for more in (0, 16, 64) if name != "head" else (0,):
                tokens = min(load.tokens, 2048) if name == "head" else load.tokens  # a chunk of logits, times chunks
                x, g, w = draw(tokens, columns + more), draw(tokens, rows), draw(rows, columns + more)
                times = seconds_of(check, lambda x=x, w=w: x @ w.T), seconds_of(check, lambda g=g, w=w: g @ w)
                forward, backward = (load.tokens / tokens * seconds for seconds in times)
                check.say("product", name=name, tokens=load.tokens, more=more, forward_s=forward, backward_s=backward,
                          flops=4 * load.tokens * w.numel() / (forward + backward))  # fmt: skip
        heads = (load.tokens // load.row, shape.heads, load.row, q // shape.heads)
        qkv = [draw(heads).requires_grad_() for _ in range(3)]
        out = F.scaled_dot_product_attention(*qkv, is_causal=True)
        grad = torch.ones_like(out)
        check.say(
            "attention", tokens=load.tokens, more=0,
            forward_s=seconds_of(check, lambda qkv=qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)),
            backward_s=seconds_of(
                check, lambda out=out, qkv=qkv, grad=grad: torch.autograd.grad(out, qkv, grad, retain_graph=True)
            ),
        )  # fmt: skip


def copy_rate(check: Check, num_bytes: int, source: str) -> float:
    """Bytes a second that arrive on the device."""
    import torch

    pinned = check.on_card and source == "cpu"
    data = torch.empty(2**20 if check.tiny else num_bytes, dtype=torch.uint8, device=source, pin_memory=pinned)
    target = torch.empty_like(data, device=check.device)
    return len(data) / seconds_of(check, lambda: target.copy_(data, non_blocking=True))


def right(check: Check) -> None:
    """The tests of the kernels, and compute-sanitizer over some of them."""
    chosen = "cuda or gpu" if check.on_card else "(rms_norm_out or rope_ or dequantize_4bit_out) and reference"
    files = ["tests/kernels/test_every_op.py"]
    if check.on_card:
        files += ["tests/kernels/test_four_bit.py"]
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


def training_step(model: Any, batch: Any, optimizer: Any) -> None:
    """As the training loop takes one, from a batch in host memory."""
    model.loss(batch.to(model.device)).backward()
    norm = float(optimizer.gradient_norm())
    optimizer.step(LR, grad_scale=min(1.0, MAX_GRAD_NORM / norm))


# ---- 3: gradients --------------------------------------------------------------------------------


def gradients(check: Check) -> None:
    """Whole models against transformers' own in fp64; packed or not; twice; streamed or resident."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the deterministic steps; read when CUDA starts
    import torch

    from nybble.layers.backbone import ModuleForward
    from nybble.layers.causal_lm import CausalLM, Verdict
    from nybble.layers.loss_head import loss_head

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


# ---- 4: kernels ----------------------------------------------------------------------------------


def kernels(check: Check) -> None:
    """Each op as wide as the 8B: microseconds, bytes a second, share of the copy; against others."""
    import bench_kernels
    import torch

    (copy,) = [line["bytes_per_s"] for line in check.lines("copy")[-1:]] or [math.nan]
    h, _, _, f = check.model.widths
    with torch.device(check.device):
        cases = [
            *bench_kernels.four_bit_cases(f, h),
            *attention_cases(check.model, check.loads[0]),
            *bench_kernels.block_cases(
                check.loads[0].tokens, h, f, check.model.vocabulary, 2**20 if check.tiny else 42_000_000
            ),
        ]
    for case in cases:
        for number, (contender, (call, _)) in enumerate(case.contenders.items()):
            if check.left < 0:
                check.say("cut", at=case.name)
                return
            seconds = seconds_of(check, call)
            name = "nybble" if number == 0 else contender
            check.say("kernel", name=case.name, contender=name, seconds=seconds, bytes_per_s=case.bytes / seconds,
                      share_of_copy=case.bytes / seconds / copy)  # fmt: skip
        try:
            bench_kernels.check(case)
        except SystemExit as wrong:
            check.say("test", name=str(wrong), error=1, allowed=0, passed=False)


def attention_cases(shape: Shape, load: Load) -> list[Any]:
    """Over packed rows, against PyTorch's own over rows apart."""
    import torch
    import torch.nn.functional as F
    from bench_kernels import Case

    from nybble.kernels.ops.attention import attention_backward, attention_forward

    rows, width = load.tokens // load.row, shape.hidden // shape.heads
    q, grad = (torch.randn(load.tokens, shape.heads, width).bfloat16() for _ in range(2))
    k, v = (torch.randn(load.tokens, shape.kv_heads, width).bfloat16() for _ in range(2))
    borders = torch.arange(rows + 1, dtype=torch.int32) * load.row
    out, lse = attention_forward(q, k, v, borders, load.row)

    def apart(x: "Tensor") -> "Tensor":
        heads = x.repeat_interleave(shape.heads // x.shape[1], 1).unflatten(0, (rows, load.row))
        return heads.transpose(1, 2).contiguous()

    qkv = [apart(x).requires_grad_() for x in (q, k, v)]
    other, other_grad = F.scaled_dot_product_attention(*qkv, is_causal=True), apart(grad)

    def together(x: "Tensor") -> "Tensor":
        return x.transpose(1, 2).flatten(0, 1)

    forward = {
        "nybble": (lambda: attention_forward(q, k, v, borders, load.row)[0], 0.0),
        "torch": (lambda: together(F.scaled_dot_product_attention(*qkv, is_causal=True).detach()), 2**-6),
    }
    backward = {
        "nybble": (lambda: attention_backward(grad, q, k, v, out, lse, borders, load.row)[0], 0.0),
        "torch": (lambda: together(torch.autograd.grad(other, qkv, other_grad, retain_graph=True)[0]), 2**-6),
    }
    size = q.nbytes + k.nbytes
    return [Case("attention", 2 * size, forward), Case("attention backward", 4 * size, backward)]


# ---- 5: step -------------------------------------------------------------------------------------


def step(check: Check) -> None:
    """Training steps of the 8B: time against L0 and L1, idle share, waits, memory against the plan."""
    import torch

    from nybble.layers.causal_lm import CausalLM

    shape = check.model
    module = four_bit_model(shape, check.device)
    optimizer = None
    for load in check.loads:
        batch = batch_of(shape, load)
        for keep in reversed(KEEPS):
            model = CausalLM.of(module, keep=keep)
            optimizer = optimizer or adamw(model)
            planned = planned_bytes(model, check, load, keep)
            if check.on_card and planned > torch.cuda.get_device_properties(0).total_memory - 1e9:
                check.say("step", **load._asdict(), keep=keep, result=f"does not fit: {planned / 1e9:.1f} GB")
                continue
            if check.left < 0:
                check.say("cut", at=f"{load.tokens} tokens, keeping {keep}")
                return
            call = partial(training_step, model, batch, optimizer)
            found = measured(check, call)
            if "seconds" in found:
                found |= {"ideal": ideal_of(check, shape, load, keep), "waits": waits(check, call)}
                found |= profiled(call) if check.on_card else {"idle": NO_CARD}
            check.say("step", **load._asdict(), keep=keep, path=model.verdict.path, planned=planned, **found)
            del model, call


def ideal_step(
    shape: Shape,
    load: Load,
    keep: str,
    products: Mapping[str, tuple[float, float]],
    attention: tuple[float, float],
    bytes_per_s: float,
) -> dict[str, float]:
    """Seconds of an ideal step by part: "products" is L0, all of them are L1. Every token is supervised.

    Args:
        products: seconds forward and backward of each of `Shape.products` and of the head, for all tokens.
        attention: of a block.
        bytes_per_s: of a copy, read and written.
    """
    h, q, k, f = shape.widths
    again = keep != "everything"  # blocks compute their forward pass once more, but for down's product
    forward, backward = (sum(products[name][way] for name in shape.products) for way in (0, 1))
    ins, outs = h + q + h + f, (q + 2 * k) + h + 2 * f + h  # of the four products, elements a token
    forward_ops = 4 * h + 2 * (q + k) + 3 * f + 2 * h  # norms, rotation, gate, residuals
    backward_ops = 8 * h + 2 * (q + k) + 6 * f + 4 * h
    wide = 2 * load.tokens * shape.layers / bytes_per_s  # of an element a token, in every block
    blocks = shape.layers * (forward + backward + again * (forward - products["down"][0]))
    return {
        "products": blocks + sum(products["head"]),
        "dequantise": 2 * 2.516 * shape.layers * shape.block_elements / bytes_per_s,  # 0.516 read, 2 written
        "attention": shape.layers * (attention[0] * (2 if keep == "nothing" else 1) + attention[1]),
        "small ops": wide * (forward_ops * (1 + again) + backward_ops),
        "adapters": wide * (ins * (1 + again) + outs + ins),
        "loss": 5 * 2 * load.tokens * shape.vocabulary / bytes_per_s,
        "optimizer": 28 * shape.adapter_parameters / bytes_per_s,
    }


def ideal_of(check: Check, shape: Shape, load: Load, keep: str) -> dict[str, float] | None:
    """From the ceilings in the record; None where they are missing."""
    lines = [line for what in ("product", "attention") for line in check.lines(what) if line["tokens"] == load.tokens]
    times = {
        line.get("name", "attention"): (line["forward_s"], line["backward_s"]) for line in lines if not line["more"]
    }
    copy = [line["bytes_per_s"] for line in check.lines("copy")]
    if not copy or not {*shape.products, "head", "attention"} <= times.keys():
        return None
    return ideal_step(shape, load, keep, times, times["attention"], copy[-1])


def planned_bytes(model: Any, check: Check, load: Load, keep: str) -> int:
    """What the plan says that such a run takes."""
    from nybble.formats.quant_spec import QuantSpec
    from nybble.planning.costs import MicroBatches, RunShape, predict
    from nybble.planning.shape import shape_of
    from nybble.sizes import SHAPE_RULES
    from nybble.sources.skeleton import build_skeleton

    parameters = sum(parameter.numel() for parameter in model.parameters())
    batches = MicroBatches(load.tokens, load.tokens - load.tokens // load.row, load.row, 1, 0, 0, 0)
    shape = shape_of(build_skeleton(model.module.config))
    rules = SHAPE_RULES[check.device]
    run = RunShape(shape, batches, parameters, RANK, 2, QuantSpec(), model.verdict.path, keep, rules,
                   micro_batches=1, on_cpu=not check.on_card)  # fmt: skip
    return sum(predict(run).values())


def waits(check: Check, call: Callable[[], object]) -> int | str:
    """How often the host waits for the card during a call."""
    import torch

    if not check.on_card:
        return NO_CARD
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """Share of a call's time in which the card was idle, launches, and what took longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    by_name: dict[str, float] = {}
    for start, end, name in spans:
        by_name[name[:80]] = by_name.get(name[:80], 0.0) + (end - start) / 1e3
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {"idle": idle_share([span[:2] for span in spans]), "launches": len(spans), "top_ms": dict(longest)}


def idle_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Of the time from the first start to the last end, the share that no span covers; they may overlap."""
    if not spans:
        return None
    ordered = sorted(spans)
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - covered / (reached - ordered[0][0])


# ---- 6 and 7: peers, 70B -------------------------------------------------------------------------


def peers(check: Check) -> None:
    """The same steps in transformers' modules: with nybble's four bits, and in PEFT with those of bitsandbytes."""
    import torch

    from nybble.layers.causal_lm import CausalLM

    shape = check.model
    loads = check.loads[:2]
    for four_bits in (True, False):
        name = f"transformers + PEFT{' + bitsandbytes' if four_bits else ' in bf16'}"
        lacking = [each for each in ("peft", "bitsandbytes")[: 1 + four_bits] if util.find_spec(each) is None]
        if lacking:
            check.say("peer", name=name, result=f"{', '.join(lacking)}: not installed")
            continue
        model = peft_model(shape, check.device, four_bits)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, LR, weight_decay=0.0, fused=True)
        for load in loads:
            ids = batch_of(shape, load, packed=False).input_ids.to(check.device)
            time_peer(check, name, load, partial(peft_step, model, ids, trained, optimizer))
        del model, trained, optimizer
        if four_bits:
            break  # in 16 bits only where there is no peer in four
    own = CausalLM.of(four_bit_model(shape, check.device), packing=False)
    optimizer = adamw(own)
    for load in loads:
        batch = batch_of(shape, load, packed=False)
        time_peer(check, "transformers + nybble's four bits", load, partial(training_step, own, batch, optimizer))


def time_peer(check: Check, name: str, load: Load, call: Callable[[], object]) -> None:
    if check.left < 0:
        check.say("cut", at=f"{name}, {load.tokens} tokens")
        return
    check.say("peer", name=name, tokens=load.tokens, **measured(check, call, repeats=min(3, check.repeats)))


def peft_model(shape: Shape, device: str, four_bits: bool) -> Any:
    """With LoRA on all linears, every layer recomputed in backward, as PEFT and transformers have it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from nybble.layers.convert import quantizable_linears
    from nybble.sources.skeleton import build_skeleton

    module = build_skeleton(config_of(shape))
    for name in quantizable_linears(module) if four_bits else ():
        module.set_submodule(name, bitsandbytes_linear(module.get_submodule(name), device))
    module.is_loaded_in_4bit = four_bits
    model = get_peft_model(fill(module, device), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device, torch.float32)
    return model.train()


def bitsandbytes_linear(linear: Any, device: str) -> Any:
    import bitsandbytes as bnb
    import torch

    how = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **how
    )
    dense = torch.randn(linear.weight.shape, dtype=torch.bfloat16, device=device).mul_(0.02)
    layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, **how).to(device)
    return layer


def peft_step(model: Any, ids: "Tensor", trained: list[Any], optimizer: Any) -> None:
    import torch

    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def streaming(check: Check) -> None:
    """Blocks of the 70B from pinned memory, their inputs offloaded, against resident ones; and the link."""
    import torch

    from nybble.layers.causal_lm import CausalLM
    from nybble.memory.offload import activation_place

    shape, load = (TINY._replace(layers=4), Load(64, 32)) if check.tiny else (LLAMA_70B, Load(4096, 2048))
    batch = batch_of(shape, load)
    check.say("link", bytes_per_s=copy_rate(check, 2**29, "cpu"))
    kept_bytes = shape.layers * load.tokens * shape.hidden * 2
    with tempfile.TemporaryDirectory() as folder:
        for resident in (shape.layers, 0):
            module, store = streamed_model(shape, check.device, Path(folder), resident)
            kept = None
            if resident == 0:
                kept = activation_place(torch.device(check.device), check.out, kept_bytes, shape.layers)
            model = CausalLM.of(module, store=store, kept=kept)
            call = partial(training_step, model, batch, adamw(model))
            name = "resident" if resident else "streamed, inputs offloaded"
            check.say("blocks", name=name, layers=shape.layers, tokens=load.tokens, **measured(check, call))
            del module, store, kept, model, call


# ---- measuring -----------------------------------------------------------------------------------


def measured(check: Check, step: Callable[[], object], repeats: int | None = None) -> dict[str, Any]:
    """Most bytes that tensors took, and that the allocator held, in a first step, and the time of those after it; or
    that memory ran out.
    """
    import torch

    try:
        if check.on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step()
        seconds = seconds_of(check, step, warm_up=0 if check.tiny else 1, batches=False, repeats=repeats)
    except torch.OutOfMemoryError:
        return {"result": "out of memory"}
    if not check.on_card:
        return {"seconds": seconds, "allocated": NO_CARD, "reserved": NO_CARD}
    memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"seconds": seconds, **memory}


def seconds_of(
    check: Check, call: Callable[[], object], warm_up: int = 1, batches: bool = True, repeats: int | None = None
) -> float:
    """Median of a few.

    Args:
        batches: short calls are timed several at a time, so that launching them does not count.
    """
    import torch

    def once(number: int) -> float:
        if not check.on_card:
            started = time.perf_counter()
            for _ in range(number):
                call()
            return (time.perf_counter() - started) / number
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / number

    for _ in range(warm_up):
        call()
    first = once(1)
    number = max(1, min(20, int(5e-3 / max(first, 1e-6)))) if batches and not check.tiny else 1
    return median([once(number) for _ in range(repeats or check.repeats)])


# ---- phases --------------------------------------------------------------------------------------

PHASES: dict[str, tuple[Callable[[Check], None], int]] = {  # seconds, of 450 in all
    "facts": (facts, 20),
    "ceilings": (ceilings, 35),
    "right": (right, 75),
    "gradients": (gradients, 45),
    "kernels": (kernels, 40),
    "step": (step, 105),
    "peers": (peers, 75),
    "70B": (streaming, 55),
}


def in_process(phase: Callable[[Check], None], check: Check) -> None:
    """A phase in a process of its own, whose words go to a file."""
    os.setsid()  # so that those which it starts end with it
    words = os.open(check.out / f"{check.phase}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if check.kernels:
        os.environ["NYBBLE_KERNELS"] = check.kernels
    phase(check)


def run_phase(context: Any, phase: Callable[[Check], None], check: Check) -> str:
    """Run a phase until its end or its limit; what became of it is a line of the record, and returned."""
    started = time.time()
    process = context.Process(target=in_process, args=(phase, check))
    process.start()
    process.join(max(0.0, check.ends - started))
    out_of_time = process.is_alive()
    if out_of_time:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    wrong = [line for line in check.lines("test", check.phase) if not line["passed"]]
    result = "out of time" if out_of_time else "failed" if process.exitcode else "wrong" if wrong else "ok"
    words = ""
    if result in ("out of time", "failed"):
        log = check.out / f"{check.phase}.log"
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        words = said[-1] if said else f"exit status {process.exitcode}"
    check.say("phase", result=result, seconds=round(time.time() - started, 1), last_words=words[:300])
    return result


def run(arguments: argparse.Namespace, context: Any) -> Check:
    """All phases, one after the other, within the time there is."""
    names = arguments.only.split(",") if arguments.only else list(PHASES)
    check = Check("", arguments.device, arguments.tiny, arguments.out.resolve())
    check.out.mkdir(parents=True, exist_ok=True)
    forget(check.out / "gpu-check.jsonl", names)
    ends = time.time() + arguments.seconds
    for name in names:
        phase, limit = PHASES[name]
        now = time.time()
        kernels = next((line["use"] for line in reversed(check.lines("kernels"))), "") if name == "step" else ""
        until = min(ends, now + limit * arguments.seconds / sum(seconds for _, seconds in PHASES.values()))
        result = run_phase(context, phase, replace(check, phase=name, ends=until, kernels=kernels))
        print(f"{name}: {result}, {time.time() - now:.0f} s", flush=True)
        if name == "facts" and check.lines("lacking"):
            break
    return check


def forget(record: Path, phases: Sequence[str]) -> None:
    """What an earlier run found in phases that run again."""
    lines = record.read_text().splitlines(keepends=True) if record.exists() else []
    record.write_text("".join(line for line in lines if json.loads(line)["phase"] not in phases))


# ---- report --------------------------------------------------------------------------------------


def number(value: Any, unit: float = 1.0, digits: int = 2) -> str:
    return f"{value / unit:.{digits}f}" if isinstance(value, int | float) else str(value if value is not None else "")


def verdict(line: dict[str, Any]) -> str:
    return "" if line["passed"] else "WRONG"


def tables_of(check: Check) -> list[Table]:
    """All that was found, for people."""
    phases = Table("Phases.", ["phase", "result", "s", "last words"], [
        [line["phase"], line["result"], number(line["seconds"], digits=0), line["last_words"].replace("|", "/")]
        for line in check.lines("phase")
    ])  # fmt: skip
    tests = Table("What was compared: an error above what is allowed is wrong.", ["test", "error", "allowed", ""], [
        [line["name"].replace("|", "/"), f"{line['error']:.2g}", f"{line['allowed']:.2g}", verdict(line)]
        for line in check.lines("test")
    ])  # fmt: skip
    products: dict[tuple[str, int], str] = {}
    for line in check.lines("product"):
        key, rate = (line["name"], line["tokens"]), number(line["flops"], 1e12, 0)
        products[key] = f"{products[key]} / {rate}" if key in products else rate
    ceilings = Table("Ceilings; products both ways, and with 16 and 64 more columns.", ["what", "rate"], [
        *(["copy, GB/s", number(line["bytes_per_s"], 1e9, 0)] for line in check.lines("copy")),
        *(["square product, TFLOP/s", number(line["flops"], 1e12, 0)] for line in check.lines("square")),
        *([f"{name}, {tokens} tokens, TFLOP/s", rates] for (name, tokens), rates in products.items()),
        *(["link from the host, GB/s", number(line["bytes_per_s"], 1e9, 1)] for line in check.lines("link")),
    ])  # fmt: skip
    kernels = Table("Kernels.", ["op", "whose", "us", "GB/s", "of the copy"], [
        [line["name"], line["contender"], number(line["seconds"], 1e-6, 1), number(line["bytes_per_s"], 1e9, 0),
         f"{line['share_of_copy']:.0%}" if math.isfinite(line["share_of_copy"]) else ""]
        for line in check.lines("kernel")
    ])  # fmt: skip
    columns = ["tokens", "keeping", "path", "ms", "tokens/s", "of L1", "of L0", "idle", "launches", "waits",
               "allocated, GB", "reserved, GB", "planned, GB"]  # fmt: skip
    steps = Table("Steps: times of the ideal step (L1) and of the products alone (L0).", columns, [
        step_row(line) for line in check.lines("step")
    ])  # fmt: skip
    longest = next((line for line in check.lines("step") if line.get("top_ms")), {"top_ms": {}})
    kernel_times = [[name.replace("|", "/"), number(ms)] for name, ms in longest["top_ms"].items()]
    top = Table("What took longest in the first of these steps.", ["kernel", "ms"], kernel_times)
    return [phases, tests, ceilings, kernels, steps, top, peer_table(check), block_table(check)]


def step_row(line: dict[str, Any]) -> list[str]:
    begin = [f"{line['tokens']} in rows of {line['row']}", line["keep"]]
    if "seconds" not in line:
        return [*begin, line["result"], *[""] * 10]
    seconds, ideal, idle = line["seconds"], line["ideal"] or {"products": math.nan}, line["idle"]
    return [
        *begin, line["path"], number(seconds, 1e-3, 1), number(line["tokens"] / seconds, digits=0),
        number(seconds / sum(ideal.values())), number(seconds / ideal["products"]),
        f"{idle:.0%}" if isinstance(idle, float) else str(idle), number(line.get("launches"), digits=0),
        number(line["waits"], digits=0), *(number(line[key], 1e9) for key in ("allocated", "reserved", "planned")),
    ]  # fmt: skip


def peer_table(check: Check) -> Table:
    """Against nybble's step that keeps nothing, since these recompute every layer too."""
    ours = {line["tokens"]: line for line in check.lines("step") if line["keep"] == "nothing" and "seconds" in line}
    rows = []
    for line in check.lines("peer"):
        if "seconds" not in line:
            rows.append([line["name"], line["result"], "", "", "", ""])
            continue
        own = ours.get(line["tokens"], {})
        times = number(line["seconds"] / own["seconds"]) if own else ""
        memory = own.get("allocated")
        share = number(memory / line["allocated"]) if isinstance(memory, int) else ""
        rows.append([line["name"], str(line["tokens"]), number(line["seconds"], 1e-3, 1), times,
                     number(line["allocated"], 1e9), share])  # fmt: skip
    columns = ["peer", "tokens", "ms", "times nybble's, keeping nothing", "allocated, GB", "nybble's share of it"]
    return Table("Peers.", columns, rows)


def block_table(check: Check) -> Table:
    lines = check.lines("blocks")
    rows = [
        [line["name"], str(line["layers"]), number(line["seconds"], 1e-3, 1),
         number(line["seconds"] / lines[0].get("seconds", math.nan)), number(line["allocated"], 1e9)]
        if "seconds" in line else [line["name"], str(line["layers"]), line["result"], "", ""]
        for line in lines
    ]  # fmt: skip
    return Table("Blocks of a 70B.", ["where", "blocks", "ms", "times resident", "allocated, GB"], rows)


def card_name(check: Check) -> str:
    name = next((line["name"] for line in check.lines("card")), check.device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, a moment each: a rehearsal")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="for lines, logs and the report")
    parser.add_argument("--seconds", type=float, default=450, help="for all phases together (450)")
    parser.add_argument("--only", default="", help=f"some of {','.join(PHASES)}; lines of the others are kept")
    parser.add_argument("--record", action="store_true", help="keep it in benchmarks/results, not in OUT")
    arguments = parser.parse_args()
    sys.path.insert(1, str(ROOT / "src"))  # nothing need be installed: phases have it from here, pytest from there
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    # A process that was forked cannot use CUDA where its parent has looked at it; a rehearsal saves the imports.
    context = multiprocessing.get_context("spawn" if arguments.device == "cuda" else "forkserver")
    if arguments.device == "cpu":
        context.set_forkserver_preload(IMPORTED)
    check = run(arguments, context)
    if lacking := check.lines("lacking"):
        print(lacking[0]["why"])
        raise SystemExit(2)
    record = check.out / "gpu-check.jsonl"
    about = about_machine(os.cpu_count() or 1)
    about |= {what: line for what in ("card", "versions") for line in check.lines(what)}
    to = argparse.Namespace(quick=False, results=BENCHMARKS / "results" if arguments.record else check.out)
    samples = [json.loads(line) for line in record.read_text().splitlines()]
    report(to, f"gpu-{card_name(check)}", "nybble on a GPU", about, tables_of(check), samples)
    raise SystemExit(any(line["result"] != "ok" for line in check.lines("phase")))


if __name__ == "__main__":
    main()
