"""Phases that measure: the card's ceilings, kernels, steps, peers, blocks that are streamed."""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu.check import KEEPS, LLAMA_70B, LR, MAX_GRAD_NORM, NO_CARD, RANK, TINY, Check, Load, Shape
from gpu.ideal import ideal_of
from gpu.measuring import copy_rate, measured, profiled, seconds_of, waits
from gpu.models import accumulation_of, adamw, batch_of, config_of, fill, four_bit_model, streamed_model, training_step

if TYPE_CHECKING:
    from torch import Tensor


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


def step(check: Check) -> None:
    """Training steps of the 8B: time against L0 and L1, idle share, waits, memory against the plan."""
    import torch

    from nybble.layers.causal_lm import CausalLM
    from nybble.sizes import SHAPE_RULES

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
            graphed = check.on_card and SHAPE_RULES[check.device].in_graphs(load.tokens, shape.block_elements)
            for graphs in (False, True) if graphed else (False,):
                call = partial(training_step, accumulation_of(model, graphs), batch, optimizer)
                found = measured(check, call)
                if "seconds" in found:
                    found |= {"ideal": ideal_of(check, shape, load, keep), "waits": waits(check, call)}
                    found |= profiled(call) if check.on_card else {"idle": NO_CARD}
                about = {"keep": keep, "graphs": graphs, "path": model.verdict.path, "planned": planned}
                check.say("step", **load._asdict(), **about, **found)
                del call
            del model


def planned_bytes(model: Any, check: Check, load: Load, keep: str) -> int:
    """What the plan says that such a run takes."""
    from nybble.formats.quant_spec import QuantSpec
    from nybble.planning.costs import predict
    from nybble.planning.run_shape import MicroBatches, RunShape
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
        time_peer(
            check,
            "transformers + nybble's four bits",
            load,
            partial(training_step, accumulation_of(own), batch, optimizer),
        )


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
            call = partial(training_step, accumulation_of(model), batch, adamw(model))
            name = "resident" if resident else "streamed, inputs offloaded"
            check.say("blocks", name=name, layers=shape.layers, tokens=load.tokens, **measured(check, call))
            del module, store, kept, model, call
