"""Full fine-tuning: gradients are autograd's, a run goes on to the bit, and what it leaves is a whole model."""

import json
import shutil

import pytest
import torch
from tiny import make_data
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typed import typed

import nybble
from nybble.data.examples import EncodedExample
from nybble.data.packing import collate
from nybble.errors import ConfigError, ExportError, ModelError, RunError
from nybble.evaluation.samples import compare_answers
from nybble.formats.safetensors import SafetensorsFolder
from nybble.layers import loss_head
from nybble.layers.causal_lm import CausalLM
from nybble.layers.full_weights import train_weights, weights_by_name
from nybble.layers.log_probs import log_probs
from nybble.options.option import build_options
from nybble.options.verbs import PlanConfig, load_config
from nybble.planning.from_config import plan_from_config
from nybble.runs.open_run import load_frozen, open_run
from nybble.sizes import SHAPE_RULES
from nybble.sources.load import load_model

CPU = torch.device("cpu")
STEPS = 4
WAYS = {
    "fp32": {"compute_dtype": "fp32"},
    "bf16, 8 bits, paged": {"compute_dtype": "bf16", "optimizer_bits": 8, "page_optimizer": "always"},
}


def small_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def some_rows() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate((9, 14, 5)):
        supervised = torch.arange(length) >= 3
        ids = torch.randint(131, (length,), generator=generator).int()
        rows.append(EncodedExample(ids, supervised, origin=str(number)))
    return rows


def plain_loss(model, rows) -> torch.Tensor:
    """transformers' own forward, a row at a time; its mean over all targets."""
    losses = []
    for row in rows:
        logits = model(input_ids=row.input_ids[None].long(), use_cache=False).logits[0, :-1].float()
        targets = torch.where(row.supervised[1:], row.input_ids[1:].long(), -100)
        losses.append(cross_entropy(logits, targets, reduction="none")[row.supervised[1:]])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_are_those_of_autograd_through_transformers(tied, packing, monkeypatch):
    small_chunks = SHAPE_RULES["cpu"].__class__(**(vars(SHAPE_RULES["cpu"]) | {"chunk_bytes": 1, "row_multiple": 8}))
    monkeypatch.setitem(SHAPE_RULES, "cpu", small_chunks)  # several chunks of logits, the last filled up
    rows, plain, ours = some_rows(), small_llama(tied), small_llama(tied)
    plain_loss(plain, rows).backward()
    train_weights(ours, torch.float32)
    model = CausalLM.of(ours, packing=packing)
    assert isinstance(model.head, loss_head.LossHead) and model.verdict.path == "generic"
    model.loss(collate(rows, model.packed)).backward()
    wanted = dict(plain.named_parameters())
    assert weights_by_name(ours).keys() == wanted.keys()
    for name, weight in weights_by_name(ours).items():
        torch.testing.assert_close(weight.grad, wanted[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_weighted_losses_and_log_probs_give_the_head_its_gradient():
    hidden, targets = torch.randn(70, 48, generator=torch.Generator().manual_seed(0)), torch.arange(70) % 131
    weights = torch.linspace(0.1, 2, 70)
    ours, plain = small_llama(False).lm_head.weight, small_llama(False).lm_head.weight
    head = loss_head.LossHead(ours)
    head.loss(hidden, targets, 7.0, weights).backward()
    (weights * cross_entropy(hidden @ plain.T, targets, reduction="none")).sum().div(7).backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    ours.grad = plain.grad = None
    (log_probs(head, hidden, targets) * weights).square().sum().backward()
    (-cross_entropy(hidden @ plain.T, targets, reduction="none") * weights).square().sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_where_products_run_in_16_bits_masters_keep_what_these_would_round_away():
    rows, plain, ours = some_rows(), small_llama(True).bfloat16(), small_llama(True).bfloat16().float()
    train_weights(ours, torch.bfloat16)
    model = CausalLM.of(ours)
    assert model.hidden(collate(rows, True)).dtype == torch.bfloat16
    loss = model.loss(collate(rows, True))
    plain_loss(plain, rows).backward()
    loss.backward()
    wanted = dict(plain.named_parameters())
    for name, weight in weights_by_name(ours).items():
        assert weight.dtype == weight.grad.dtype == torch.float32, name
        error = (weight.grad - wanted[name].grad.float()).norm() / wanted[name].grad.float().norm()
        assert error < 0.05, (name, error)
    # The direction that a step takes is kept where it is smaller than half a bf16 step of the weights.
    with torch.no_grad():
        for weight in weights_by_name(ours).values():
            before = weight.clone()
            weight -= 1e-6 * weight.grad.sign()
            assert (weight != before).float().mean() > 0.5


@pytest.fixture(scope="module", params=WAYS)
def whole(request, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    nybble.train(
        model=tiny_model, data=make_data(folder / "rows.jsonl"), out=folder / "run", method="full", lr=2e-3,
        max_steps=STEPS, rows_per_step=6, save_every=1, keep_checkpoints=9, eval_every=2, keep_best=True,
        **WAYS[request.param],
    )  # fmt: skip
    return folder / "run"


def kept(run):
    last = run / "checkpoints" / f"step-{STEPS}"
    files = [*last.glob("*.safetensors"), *(run / "model").glob("*.safetensors")]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def test_a_run_that_stopped_goes_on_to_the_bit(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for later in range(3, STEPS + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{later}")
    shutil.rmtree(out / "model")
    nybble.train(out=out, resume=True)
    assert kept(out) == kept(whole) and len(kept(out)) >= 4


def test_what_it_leaves_is_a_model_that_transformers_opens(whole, tiny_model):
    tuned = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    masters = SafetensorsFolder(whole / "checkpoints" / f"step-{STEPS}" / "weights.safetensors")
    for name, weight in tuned.named_parameters():
        master = masters.read(name)
        torch.testing.assert_close(weight.detach(), master, rtol=2**-8, atol=0)
        assert not torch.equal(master, dict(base.named_parameters())[name]), name
    opened = open_run(whole)
    model = load_model(opened.tuned, None, torch.float32)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, tuned(input_ids=ids).logits)
        opened.switch(model, tuned=False)
        untuned = model(input_ids=ids).logits
        torch.testing.assert_close(untuned, load_frozen(opened, torch.float32, CPU)(input_ids=ids).logits)
        assert not torch.allclose(untuned, logits)
        opened.switch(model, tuned=True)
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
    record = json.loads((whole / "plan.json").read_text())
    assert record["chosen"]["strategy"] == "full 16-bit"
    assert record["measured"]["peak_bytes"] < 1.1 * record["chosen"]["peak_bytes"]


def test_verbs_take_it(whole, tmp_path):
    found = nybble.evaluate(whole, answers=1)
    assert found.loss("tuned").value < found.loss("base, as trained on").value
    assert found.loss("base, as trained on").value == pytest.approx(found.loss("base, 16 bits").value)
    assert "every weight of it" in (whole / "model" / "README.md").read_text()
    dense = nybble.export(whole, to="16bit", out=tmp_path / "dense")
    assert (dense.folder / "config.json").exists() and dense.outcome != "failed"
    assert typed(["chat", "--run", whole, "--prompt", "What is 3 plus 3?", "--max-new-tokens", "4"]).exit_code == 0
    for to in ("peft", "gguf-lora"):
        with pytest.raises(ExportError, match=r"(?s)trained every weight.*for adapters"):
            nybble.export(whole, to=to, out=tmp_path / "none")
    with pytest.raises(ExportError, match="nothing to merge"):
        nybble.merge(whole, compare=True)


def test_samples_are_of_base_and_tuned_model(tiny_model, tmp_path):
    data = make_data(tmp_path / "rows.jsonl")
    run = nybble.train(
        model=tiny_model, data=data, out=tmp_path / "run", method="full", lr=1e-2, max_steps=12, compute_dtype="fp32"
    )
    (sample,) = compare_answers(run.model, run.template, run.validation[:1], 8, switch=run.switch)
    assert sample.base != sample.tuned
    assert sample.tuned == nybble.open_run(run).generate(prompt_of(run), max_new_tokens=8).strip()


def prompt_of(run) -> str:
    text = run.template.tokenizer.decode(run.validation[0].prompt_ids)
    return text.split("user\n")[1].split("<|im_end|>")[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "full", "rank": 16}, "rank is 16.*every weight"),
        ({"method": "full", "format": "nf4"}, "format is nf4"),
        ({"method": "full", "lora_plus_ratio": 4}, "lora-plus-ratio"),
        ({"method": "full", "stream_base": "always"}, "stream-base is always"),
        ({"method": "full", "objective": "dpo", "reference": "step"}, "reference is step"),
        ({"method": "lora", "quality": "calibrated"}, "quality is calibrated.*16 bits"),
        ({"method": "lora", "init": "loftq"}, "init is loftq"),
        ({"method": "qlora", "format": "none"}, "format is none.*few bits"),
    ],
)
def test_what_a_method_has_no_use_for_is_refused(given, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load_config(None, {"model": "m", "data": "d", "out": "o"} | given)


def test_a_base_in_few_bits_is_refused(tmp_path, tiny_model, data):
    nybble.quantize(model=tiny_model, out=tmp_path / "small", quality="absmax")
    with pytest.raises(ModelError, match="in nf4 already"):
        nybble.train(model=tmp_path / "small", data=data, out=tmp_path / "run", method="full")


def test_without_the_flag_16_bits_are_lora_and_its_bytes_those_of_method_lora(tiny_model, data, tmp_path):
    adapters = []
    for name, how in (("old", {"format": "none"}), ("new", {"method": "lora"})):
        run = nybble.train(
            model=tiny_model, data=data, out=tmp_path / name, max_steps=1, compute_dtype="fp32", rank=2, **how
        )
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
        assert load_config(tmp_path / name / "config.yaml", {}).method.method == "lora"
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("memory", "more", "method"),
    [("4GB", {}, "full"), ("4GB", {"rank": 8}, "lora"), ("4GB", {"format": "nf4"}, "qlora"), (None, {}, "lora")],
)
def test_auto_takes_what_changes_most_of_what_fits_and_of_what_is_given(
    memory, more, method, tiny_model, data, tmp_path
):
    notes = []
    nybble.train(
        model=tiny_model, data=data, out=tmp_path / "run", method="auto", max_steps=1, compute_dtype="fp32",
        **({} if memory is None else {"memory": memory}), **more,
        on_event=lambda event: notes.append(getattr(event, "sentence", "")),
    )  # fmt: skip
    assert load_config(tmp_path / "run" / "config.yaml", {}).method.method == method
    assert any(note.startswith(f"method: {method}: ") for note in notes)


def test_a_plan_says_of_each_method_whether_it_is_right_here():
    options = {"model": "smollm2-135m", "max_seq_len": 512, "compute_dtype": "fp32"}
    own = nybble.plan(**options).plans.machine.begun_bytes
    planned = nybble.plan(**options, memory=own + 15 * 10**8)
    rows = {row["method"]: row for row in planned.to_json()["methods"]}
    assert rows["qlora"]["fits"] and rows["lora"]["fits"] and not rows["full"]["fits"]
    assert rows["full"]["peak_bytes"] - own > 16 * 134.5e6 > rows["lora"]["peak_bytes"] - own
    assert "fits: --method lora" in str(planned) and "GB too many" in str(planned)
    found, *_ = plan_from_config(build_options(PlanConfig, options | {"memory": "16GB", "method": "full"}))
    assert found.chosen.strategy == "full 16-bit"
    small, *_ = plan_from_config(
        build_options(PlanConfig, options | {"memory": "16GB", "method": "full", "optimizer_bits": 8})
    )
    saved = found.chosen.components["optimizer state"] - small.chosen.components["optimizer state"]
    assert saved == pytest.approx((8 - 2 - 8 / 256) * found.chosen.run.model.parameters, rel=1e-6)


def test_a_run_without_a_model_yet_says_so(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(RunError, match="holds no model yet"):
        nybble.open_run(tmp_path / "run").generate("Hello.")
