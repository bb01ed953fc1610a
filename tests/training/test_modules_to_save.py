"""Modules that are trained whole beside the adapters: gradients, runs, resumes, folders that PEFT reads, merges."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from short_runs import tensors_after
from tiny import SMALL, make_data, put_into_four_bits, tune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nybble
from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.errors import ConfigError, ExportError, RunError
from nybble.exporting.consumers import widen
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import enable_adapters, in_few_bits
from nybble.layers.trained import resolve_modules, train_modules, trained_modules
from nybble.options.verbs import load_config
from nybble.runs.adapter_files import StoredAdapter, restore_adapter
from nybble.runs.open_run import load_frozen, load_tuned, open_run
from nybble.training.session import train

ENDS = "lm_head,embed_tokens,model.norm"
STEPS = 3
final = partial(tensors_after, step=STEPS)


def small(**more: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False, **more)).eval()


def rows() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(96, (length,), generator=generator).int() for length in (7, 12)]
    return [EncodedExample(ids, torch.ones(len(ids), dtype=torch.bool), "row") for ids in documents]


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_are_those_of_a_model_that_trains_these_modules(inside: bool) -> None:
    """Through decoder blocks where only ends are trained, through transformers' modules where norms of blocks are."""
    named = ("lm_head", "embed_tokens", "model.norm", *(["input_layernorm"] if inside else []))
    model = small().requires_grad_(False)
    put_into_four_bits(model)
    names = resolve_modules(model, named, in_few_bits(model), ())
    assert len(names) == (5 if inside else 3)
    tune(model)
    train_modules(model, names)
    ours = CausalLM.of(model)
    assert ours.verdict.path == ("generic" if inside else "blocks") and ("input_layernorm" in ours.name) == inside
    batch = collate(rows(), ours.packed)
    loss = ours.loss(batch)
    loss.backward()
    own = {
        name: {n: p.grad.clone() for n, p in m.trained.named_parameters()} for name, m in trained_modules(model).items()
    }

    total = torch.zeros(())
    for row in rows():  # transformers' own forward and autograd, a row at a time
        ids = row.input_ids.long()[None]
        total = total + torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    model.zero_grad()
    (total / batch.supervised_tokens).backward()
    assert loss.item() == pytest.approx(total.item() / batch.supervised_tokens, rel=1e-5)
    for name, module in trained_modules(model).items():
        for leaf, parameter in module.trained.named_parameters():
            torch.testing.assert_close(own[name][leaf], parameter.grad, rtol=2e-4, atol=1e-6)
            assert parameter.grad.abs().max() > 0


def test_switched_off_the_frozen_modules_answer() -> None:
    model = small().requires_grad_(False)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    train_modules(model, ["lm_head", "model.norm"])
    with torch.no_grad():
        for module in trained_modules(model).values():
            module.trained.weight.mul_(1.5)
    tuned = model(ids).logits
    enable_adapters(model, False)
    assert torch.equal(model(ids).logits, before) and not torch.allclose(tuned, before)


@pytest.mark.parametrize(
    ("wanted", "adapted", "message"),
    [
        ("lm_hed", (), r"no module with weights(?s:.*)Did you mean 'lm_head'"),
        ("q_proj", (), r"q_proj is in few bits|q_proj', which is in few bits"),
        ("mlp", (), r"of which model.layers.0.mlp.gate_proj is in few bits"),
        ("lm_head", ("lm_head",), r"which gets an adapter(?s:.*)--target-modules or"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(wanted: str, adapted: tuple[str, ...], message: str) -> None:
    model = small()
    put_into_four_bits(model)
    with pytest.raises(ConfigError, match=message):
        resolve_modules(model, (wanted,), in_few_bits(model), adapted)


def test_tied_ends_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    with pytest.raises(ConfigError, match="embedding and head in one"):
        resolve_modules(model, ("embed_tokens",), (), ())


# ---- runs ----------------------------------------------------------------------------------------


def run(model: Path, data: Path, out: Path, **more: Any) -> Path:
    options = {"model": str(model), "data": str(data), "out": str(out), "max_steps": STEPS}
    options |= {"rows_per_step": 6, "micro_batch_size": 4, "rank": 4, "lr": 1e-2, "compute_dtype": "fp32"}
    options |= {"save_every": 1, "keep_checkpoints": 9, "validation_fraction": 0.2}
    train(load_config(None, options | ({} if "adapter" in more else {"modules_to_save": ENDS}) | more))
    return out


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return run(tiny_model, make_data(folder / "rows.jsonl"), folder / "run")


def test_stopped_or_paged_the_bytes_are_the_same(whole: Path, tiny_model: Path, tmp_path: Path) -> None:
    data = whole.parent / "rows.jsonl"
    other = run(tiny_model, data, tmp_path / "other", page_optimizer="always")
    assert final(other) == final(whole)
    for step in range(2, STEPS + 1):
        shutil.rmtree(other / "checkpoints" / f"step-{step}")
    train(load_config(other / "config.yaml", {"out": str(other), "resume": True}))
    assert final(other) == final(whole)


def test_peft_reads_what_was_trained(whole: Path, tiny_model: Path) -> None:
    """On the base in its four bits, which here is widened for PEFT's own layers."""
    opened = open_run(whole)
    cpu, ids = torch.device("cpu"), torch.arange(9)[None]
    tuned = load_tuned(opened, torch.float32, cpu)
    base = load_frozen(opened, torch.float32, cpu)
    with torch.no_grad():
        untuned = base(ids).logits
    widen(base)
    base.float()  # PEFT's copy of an end has the end's type
    theirs = peft.PeftModel.from_pretrained(base, whole / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tuned(ids).logits, untuned, atol=1e-3)
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens", "model.norm"]


def test_an_adapter_with_modules_of_pefts_own_is_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    theirs.save_pretrained(tmp_path / "peft")
    data = make_data(tmp_path / "rows.jsonl")
    out = run(tiny_model, data, tmp_path / "run", adapter=str(tmp_path / "peft"), lr=1e-30, max_steps=1)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "peft", out / "adapter"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-20) for name in before)
    with pytest.raises(ConfigError, match="modules-to-save is"):
        run(tiny_model, data, tmp_path / "o", adapter=str(tmp_path / "peft"), modules_to_save="embed_tokens")


def test_merged_and_exported_they_replace_the_bases(whole: Path, tmp_path: Path) -> None:
    merged = nybble.merge(whole, out=tmp_path / "merged")
    assert merged.outcome in ("verified", "undecided")
    written = load_file(next(merged.folder.glob("*.safetensors")))
    adapter = StoredAdapter(whole / "adapter")
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    weights = adapter.module_weights("lm_head", model.lm_head)["weight"]
    torch.testing.assert_close(written["lm_head.weight"], weights.bfloat16())
    with pytest.raises(ExportError, match="trained whole"):
        nybble.export(whole, to="gguf-lora", out=tmp_path / "lora")
    with pytest.raises(ConfigError, match="trained whole"):
        nybble.merge(adapters=[whole, whole], out=tmp_path / "both")


def test_the_plan_counts_their_weights_gradients_and_moments() -> None:
    plain = nybble.plan(model="llama-3.2-1b", machine="rtx-4090", host_memory="32GB")
    for named, elements in (("norm", 2048), ("input_layernorm", 16 * 2048)):
        more = nybble.plan(
            model="llama-3.2-1b",
            machine="rtx-4090",
            host_memory="32GB",
            modules_to_save=f"model.{named}" if named == "norm" else named,
        )
        run = more.chosen.run
        assert run.trained_parameters == elements and run.path == ("blocks" if named == "norm" else "generic")
        gradients = {plan.chosen.run: plan.chosen.components["adapter gradients"] for plan in (plain, more)}
        assert gradients[run] - gradients[plain.chosen.run] == 4 * elements
    with pytest.raises(ConfigError, match="embedding and head in one"):
        nybble.plan(model="llama-3.2-1b", machine="rtx-4090", modules_to_save="lm_head")


def test_a_run_does_not_go_on_without_them(whole: Path, tmp_path: Path) -> None:
    model = small()
    tune(model, rank=4)
    with pytest.raises(RunError, match=r"Only the adapter in .* has lm_head trained whole"):
        restore_adapter(model, whole / "adapter")
