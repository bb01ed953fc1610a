"""A run's plan: a budget that holds, refusals that say what would fit, `nybble plan` from a config alone."""

import io
import json
import shlex
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from typed import typed

from nybble.cli.render import Terminal
from nybble.errors import ConfigError, ModelError, PlanError
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters, quantizable_linears
from nybble.options.option import build_options, parse_size
from nybble.options.verbs import PlanConfig, load_config
from nybble.planning import request as plan_module
from nybble.planning.costs import predict
from nybble.planning.from_config import plan_from_config
from nybble.planning.machine_table import Machine
from nybble.planning.planner import make_plans, require
from nybble.planning.report import Planned, describe_left, plans_json
from nybble.planning.request import requests
from nybble.planning.run_shape import MicroBatches
from nybble.planning.strategies import WAYS, Cause, Strategy
from nybble.sources.shapes import SHAPES
from nybble.sources.skeleton import build_skeleton
from nybble.training import base, checkpoint, loop, session
from nybble.training.session import train


def plans(**options):
    return plan_from_config(build_options(PlanConfig, {"model": "smollm2-135m", "max_seq_len": 512} | options))[:3]


def config(tiny_model, data, out, **options):
    given = {"model": str(tiny_model), "data": str(data), "out": str(out), "max_steps": 1, "rows_per_step": 4}
    return load_config(None, given | options)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("1.5G", 1_500_000_000), ("500 mb", 500_000_000), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8XB", "-1GB", "", "GB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_the_fastest_that_fits_is_chosen_and_each_other_strategy_has_a_reason():
    own = plans(memory="4GB")[0].machine.process_bytes
    made, _, _ = plans(memory=own + 1600 * 10**6)
    chosen = made.chosen
    assert chosen.strategy == "4-bit" and chosen.keep == "everything"
    assert chosen.peak_bytes == sum(chosen.components.values()) <= made.machine.budget_bytes
    assert {plan.strategy for plan in made.rejected} == {plan.strategy for plan in made.best} - {"4-bit"}
    assert all(made.reason(plan).sentence for plan in made.rejected)


def test_less_memory_leaves_fewer_plans_and_none_that_takes_more_than_there_is():
    own = plans(memory="4GB")[0].machine.process_bytes
    fitting = []
    for megabytes in (4000, 1000, 700, 500, 400, 300):
        made, _, _ = plans(memory=own + megabytes * 10**6, compute_dtype="bf16")
        assert made.chosen.peak_bytes <= made.machine.budget_bytes
        fitting.append(sum(not plan.why_not for plan in made.candidates))
    assert fitting == sorted(fitting, reverse=True) and fitting[0] > fitting[-1]


def test_70b_streams_in_a_budget_that_its_weights_exceed():
    made, _, _ = plans(model="llama-2-70b", memory="20GB", rows_per_step=1)
    assert made.chosen.resident_blocks is not None and made.chosen.stream_ends
    assert made.chosen.components["base weights"] < 20e9 < 35e9


def test_a_base_that_adapters_start_from_is_not_streamed():
    made, _, _ = plans(model="llama-2-70b", memory="20GB", rows_per_step=1, init="loftq")
    assert made.chosen is None
    streamed = [p.excluded for p in made.best if p.strategy.streamed]
    assert {(bar.sentence, bar.way) for bar in streamed} == {("--init loftq needs the whole base", "--init default")}


def test_what_would_fit_from_a_four_bit_folder_names_the_command_that_makes_one(tmp_path):
    """Llama-3-70B in 16 bits on a card of 24 GB."""
    config = SHAPES["llama-3-8b"] | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    folder = tmp_path / "Llama 3 70B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 28672}))
    options = {"model": str(folder), "machine": "rtx-4090", "host_memory": "64GB"}
    options |= {"rows_per_step": 1, "block_size": 128}
    made, asked, unconstrained = plans(**options)
    assert made.chosen is None
    way = f"nybble quantize --model '{folder}' --out 'Llama 3 70B-nf4' --block-size 128, then --model 'Llama 3 70B-nf4'"
    with pytest.raises(PlanError) as refused:
        require(made, asked, unconstrained)
    assert "4-bit, base from" in refused.value.allowed and way in refused.value.fix
    shown = io.StringIO()
    Terminal(Console(file=shown, width=300))(Planned(made, asked))
    assert f"not 4-bit, base from disk: read from a 4-bit folder only; it would fit: {way}" in shown.getvalue()
    fixed, asked, unconstrained = plans(**options | {"stream_base": "never", "keep": "everything"})
    with pytest.raises(PlanError, match="nybble quantize"):
        require(fixed, asked, unconstrained)


def test_the_command_that_a_refusal_names_opens_what_it_says(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"model": str(tiny_model), "memory": "4GB", "stream_base": "always", "double_quant": False}
    made, asked, unconstrained = plans(**options)
    with pytest.raises(PlanError) as refused:
        require(made, asked, unconstrained)
    command, then = refused.value.fix.rstrip(".").partition("4-bit folder: ")[2].split(", then ")
    result = typed(shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert "In 16 bits: embedding and head" in result.output
    flag, folder = shlex.split(then)
    assert flag == "--model" and plans(**options | {"model": folder})[0].chosen.resident_blocks is not None


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"format": "none"}, "--method qlora"),
        ({"method": "full"}, "--method qlora"),
        ({"method": "full"}, "--method lora"),
        ({"stream_base": "never"}, "--stream-base auto"),
        ({"init": "loftq"}, "--init default"),
        ({"page_optimizer": "always"}, "--page-optimizer auto"),
        ({"stream_base": "always"}, "--stream-base auto"),
    ],
)
def test_every_option_that_bars_a_plan_says_what_opens_it(options, way):
    made, _, _ = plans(memory="40GB", **options)
    assert way in {plan.way for plan in made.candidates}


def test_every_reason_is_a_value():
    made, _, _ = plans(memory="700MB", init="loftq")
    causes = {made.reason(plan).cause for plan in made.rejected}
    assert causes <= set(Cause)
    record = json.loads(json.dumps(plans_json(made)))
    assert all(each["cause"] in {"option", "budget", "slower"} for each in record["rejected"])
    assert {each["strategy"] for each in record["rejected"]} <= set(Strategy)


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"dropout": 0.1}, {"model_type": "gpt2"}])
def test_a_plan_and_a_run_take_the_same_path(options):
    given = dict(options)
    written = {"model_type": given.pop("model_type")} if "model_type" in given else SHAPES["tiny"]
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 160}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written | sizes)).requires_grad_(False)
    machine = Machine("a test's", "cpu", 10**10, 10**8, 10**10, 1e11, 1e10, 1e10, 1e10)
    asked, _ = requests(
        build_options(PlanConfig, {"model": "tiny"} | given), build_skeleton(model.config), machine,
        micro_batches=lambda size: MicroBatches(64 * size, 64 * size, 64, 1, 0, 0, 0), dtype=torch.float32,
        in_folder=False, formats=None,
    )  # fmt: skip
    dropout, packing = given.get("dropout", 0), given.get("packing", True)
    attach_adapters(model, quantizable_linears(model), rank=2, alpha=2, dropout=dropout, rslora=False, seed=0)
    assert asked.run.path == CausalLM.of(model, packing=packing).verdict.path == ("generic" if options else "blocks")


def test_every_strategy_has_its_function_and_is_tried():
    assert list(WAYS) == list(Strategy)
    made, _, _ = plans(memory="4GB")
    assert {plan.strategy for plan in made.candidates} == set(Strategy)


def test_what_mostly_stays_in_16_bits_is_not_planned_as_four_bit(tmp_path):
    config = {"model_type": "jetmoe", "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made, asked, unconstrained = plans(model=str(tmp_path), memory="80GB")
    with pytest.raises(PlanError, match=r"(?s)weights stay in 16 bits.*--method lora.*--max-dense-share"):
        require(made, asked, unconstrained)
    experts = "model.layers.*.mlp.input_linear.weight"
    assert any(experts in line and "without an adapter, not in four bits" in line for line in describe_left(asked))
    accepted = plans(model=str(tmp_path), memory="80GB", max_dense_share=1)[0]
    assert accepted.chosen.strategy == "4-bit"
    assert accepted.chosen.components["weights not in four bits"] >= 2 * 2 * 8 * 3 * 2048 * 5632


def test_a_mixture_of_experts_is_planned_in_four_bits(tmp_path):
    """Mixtral-8x7B: 46.7 B parameters, 12.9 B of which a token meets, as its makers publish."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    made, asked, _ = plans(model=str(tmp_path), memory="80GB")
    parts = asked.run.model.parts
    assert parts.elements == pytest.approx(46.7e9, rel=1e-2) and parts.active_elements == pytest.approx(
        12.9e9, rel=1e-2
    )
    base = made.chosen.components["base weights"]
    assert base == pytest.approx(parts.linear_elements * 4.127 / 8, rel=1e-2)
    experts, left = "model.layers.*.mlp.experts.gate_up_proj", describe_left(asked)
    assert left[0].endswith("46.7 B parameters are stored, 12.9 B of them a token meets")
    assert any(line.startswith("without an adapter: ") and experts in line for line in left)


def test_adapters_of_experts_are_planned(tmp_path):
    """Qwen3-30B-A3B: 30.5 B parameters, 3.3 B active; adapters of rank 16 by the sizes of its matrices."""
    sizes = {"model": "qwen3-30b-a3b", "memory": "80GB", "dropout": 0.0}
    alone, with_experts = (
        plans(**sizes, target_modules=names)[1].run for names in ("all-linear", "all-linear,experts")
    )
    parts = alone.model.parts
    assert (parts.elements, parts.active_elements) == pytest.approx((30.5e9, 3.35e9), rel=1e-2)
    added = with_experts.adapter_parameters - alone.adapter_parameters
    assert added == 48 * 128 * 16 * ((2048 + 2 * 768) + (768 + 2048))
    assert with_experts.idle_parameters == added * 120 // 128
    weights = [predict(run)["base weights"] for run in (alone, with_experts)]
    assert weights[0] == weights[1] == pytest.approx(parts.linear_elements * 4.127 / 8, rel=2e-3)


def test_a_run_that_would_mostly_stay_in_16_bits_is_refused_before_anything_is_loaded(mostly_dense, data, tmp_path):
    with pytest.raises(ModelError, match="cannot be put into four bits"):
        train(config(mostly_dense, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_type", ["gpt_neo", "mpt", "xglm", "opt", "falcon", "gemma2"])
def test_every_architecture_that_transformers_builds_is_planned(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    made, asked, _ = plans(model=str(tmp_path), memory="400GB")
    assert made.chosen.components["base weights"] == pytest.approx(
        asked.run.model.parts.linear_elements * 4.127 / 8, rel=1e-2
    )


def test_a_mixed_folder_is_planned_with_the_bits_of_its_layers(tmp_path):
    from nybble.formats.bnb import quantization_config
    from nybble.formats.quant_spec import BaseFormats, QuantSpec

    base = {}
    for second in ("nf4", "nf2"):
        layers = {"model.layers.0.mlp.up_proj": "nf4", "model.layers.0.mlp.down_proj": second}
        formats = BaseFormats(QuantSpec(), layers)
        config = SHAPES["tiny"] | {"quantization_config": quantization_config(formats, torch.bfloat16, [])}
        (tmp_path / "config.json").write_text(json.dumps(config))
        base[second] = plans(model=str(tmp_path), memory="4GB")[0].chosen.components["base weights"]
    assert base["nf2"] == pytest.approx(base["nf4"] * (4.127 + 2.127) / 2 / 4.127, rel=2e-2)


def test_a_config_that_transformers_cannot_build_is_refused(tmp_path):
    for written, said in (({"model_type": "nonsense"}, "nonsense"), ({"hidden_size": 64}, "no model_type")):
        (tmp_path / "config.json").write_text(json.dumps(written))
        with pytest.raises(ModelError, match=said) as refused:
            plans(model=str(tmp_path))
        assert len(str(refused.value)) < 400, "not the names of all that there are"


def test_a_budget_below_the_smallest_plan_says_what_would_change_it(tiny_model, data, tmp_path):
    with pytest.raises(PlanError, match=r"(?s)smallest plan takes .* budget is 0\.01 GB.*--rank 4"):
        train(config(tiny_model, data, tmp_path / "run", memory="10MB"))
    assert not (tmp_path / "run" / "config.yaml").exists(), "refused before anything was made"


@pytest.mark.parametrize("bits", [{"quality": "calibrated"}, {"mixed": 3.5}])
def test_what_never_fits_is_refused_before_its_bits_are_made(tiny_model, data, tmp_path, monkeypatch, bits):
    def too_late(*arguments):
        raise AssertionError("spent minutes on a base that does not fit")

    monkeypatch.setattr(base, "make_calibrated_base", too_late)
    monkeypatch.setattr(base, "measure_formats", too_late)
    with pytest.raises(PlanError, match="smallest plan takes"):
        train(config(tiny_model, data, tmp_path / "run", memory="10MB", **bits))


def test_mixed_bits_are_planned_for():
    four, three = (plans(memory="4GB", **bits)[0].chosen.components["base weights"] for bits in ({}, {"mixed": 3.1}))
    assert three == pytest.approx(four * 3.1 / 4.127, rel=2e-2)


@pytest.mark.parametrize("option", ["alpha", "rslora", "dropuot"])
def test_a_plan_takes_no_option_that_it_does_not_read(option):
    with pytest.raises(ConfigError, match=option):
        build_options(PlanConfig, {"model": "tiny", option: "1"})


def test_a_run_and_a_plan_of_its_data_expect_the_same(tiny_model, data, tmp_path):
    out, given = tmp_path / "run", {"memory": "3GB", "max_steps": 2, "micro_batch_size": 2, "keep": "nothing"}
    train(config(tiny_model, data, out, **given))
    run = json.loads((out / "plan.json").read_text())
    assert {"chosen", "rejected", "measured", "machine"} <= run.keys()
    assert run["measured"]["peak_bytes"] >= run["measured"]["start_bytes"] > 0
    options = {"model": str(tiny_model), "data": str(data), "rows_per_step": 4, "max_seq_len": 1024}
    foreseen = plans(**options | given)[0].chosen
    own = "the process itself"
    assert {k: v for k, v in foreseen.components.items() if k != own} == {
        k: v for k, v in run["chosen"]["components"].items() if k != own
    }


def test_a_choice_that_does_not_fit_names_the_nearest_that_does():
    own = plans(memory="4GB")[0].machine.process_bytes
    made, asked, unconstrained = plans(memory=own + 500 * 10**6, micro_batch_size=8, rows_per_step=8, keep="everything")
    with pytest.raises(PlanError, match=r"(?s)What fits: 4-bit.*--micro-batch-size \d --keep"):
        require(made, asked, unconstrained)


def test_a_rehearsal_that_takes_too_much_stops_before_the_first_step(tiny_model, data, tmp_path, monkeypatch):
    options = {"memory": "3GB"}
    monkeypatch.setattr(loop.PeakMemory, "__exit__", lambda self, *_: setattr(self, "peak_bytes", 4_000_000_000))
    with pytest.raises(PlanError, match=r"rehearsal .* took 4 GB"):
        train(config(tiny_model, data, tmp_path / "run", **options))


def test_a_rehearsal_changes_nothing(tiny_model, data, tmp_path):
    adapters = []
    for name, options in {"plain": {}, "rehearsed": {"memory": "3GB"}}.items():
        train(config(tiny_model, data, tmp_path / name, dropout=0.1, **options))
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
        torch.manual_seed(123)
    assert adapters[0] == adapters[1]


def test_a_rehearsal_evaluates_and_saves_once(tiny_model, data, tmp_path, monkeypatch):
    out, done = tmp_path / "run", []
    validation = loop.validation_loss
    monkeypatch.setattr(loop, "validation_loss", lambda *a: done.append("evaluated") or validation(*a))
    write = checkpoint.Checkpoints._write
    monkeypatch.setattr(checkpoint.Checkpoints, "_write", lambda *a, **k: done.append("saved") or write(*a, **k))
    monkeypatch.setattr(session, "check_peak", lambda *a: done.append("checked"))
    train(config(tiny_model, data, out, memory="3GB"))
    assert done[:3] == ["evaluated", "saved", "checked"]
    assert not list((out / "checkpoints").glob(".tmp-*")), "nothing is left of it"
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-1"]


def test_plan_prints_one_json_object_and_draws(tmp_path):
    words = ["plan", "--model", "tiny", "--memory", "2GB", "--json", "--plot", str(tmp_path / "plans.png")]
    result = typed(words)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["chosen"]["peak_bytes"] == sum(record["chosen"]["components"].values())
    assert record["machine"]["budget_bytes"] == 2_000_000_000 and record["rejected"]
    assert (tmp_path / "plans.png").stat().st_size > 1000
    refused = typed([*words[:-1], tmp_path / "plans.xyz"])
    assert refused.exit_code == 2 and "plans.xyz cannot be drawn" in refused.stderr


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inner", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_the_text_of_a_larger_model_is_planned_with_its_own_ends(tmp_path, inner, tied):
    """Whether head and embedding are one is said by the larger model's config, as in training."""
    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2} | inner
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000}
    written = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(written))
    asked = plans(model=str(tmp_path))[1]
    assert asked.run.model.parts.end_elements == (1 if tied else 2) * 1000 * 64


def test_a_gpu_keeps_everything_in_as_many_blocks_as_there_is_room_for():
    made, asked, _ = plans(model="llama-3-8b", machine="rtx-4090", max_seq_len=2048, rows_per_step=4)
    asked, machine = replace(asked, run=replace(asked.run, path="blocks")), made.machine
    candidates = make_plans(asked, machine).candidates
    some = [plan for plan in candidates if plan.whole_blocks]
    assert {plan.keep for plan in some} == {"nothing", "attention"} and not any(plan.offloaded for plan in some)
    for plan in some:
        assert plan.peak_bytes <= machine.budget_bytes
        more = replace(plan.run, whole_blocks=plan.whole_blocks + 2)  # one block's work is not counted on
        full = machine.begun_bytes + sum(predict(more).values()) > machine.budget_bytes
        assert full or plan.whole_blocks == plan.run.model.num_layers - 1
        none = next(p for p in candidates if p.run == replace(plan.run, whole_blocks=0))
        assert none.step_s > plan.step_s and f"the last {plan.whole_blocks} everything" in plan.describe()
        assert plan.to_json()["whole_blocks"] == plan.whole_blocks and "whole_blocks" not in none.to_json()
    fixed = make_plans(replace(asked, keeps=("attention",)), machine).candidates
    assert not any(plan.whole_blocks for plan in fixed)
    given = make_plans(replace(asked, whole_blocks=3), machine).candidates
    given = [plan for plan in given if plan.keep != "everything" and not plan.run.full]
    assert {(plan.whole_blocks, plan.offloaded) for plan in given} == {(3, False)}
    assert all("--whole-blocks 3" in plan.flags() for plan in given)


def test_blocks_that_keep_everything_are_asked_for_by_number_and_refused_where_there_are_none():
    for options, words in (
        ({"whole_blocks": 31}, "0 to 30"),
        ({"whole_blocks": 2, "packing": False}, "rows are not packed"),
        ({"whole_blocks": 2, "offload_activations": "always"}, "one of the two"),
    ):
        with pytest.raises(ConfigError, match=words):
            plans(**options)
    made, asked, _ = plans(keep="nothing", whole_blocks=2, stream_base="never")
    assert made.chosen.whole_blocks == 2 and "the last 2 everything" in made.chosen.describe()
    less, more = (make_plans(replace(asked, whole_blocks=number), made.machine).chosen for number in (0, 4))
    assert less.peak_bytes < made.chosen.peak_bytes < more.peak_bytes
    assert less.step_s > made.chosen.step_s > more.step_s


def test_a_gpu_without_room_is_refused_with_who_holds_it_and_what_still_works(tiny_model, data, tmp_path, monkeypatch):
    """Where nothing is asked of memory, too: a GPU has none beside its own, as a processor has."""
    measured = plan_module.this_machine

    def card(*given, **more):
        gpu = {"kind": "cuda", "budget_bytes": 10**9, "process_bytes": 10**9, "others_bytes": 7 * 10**9}
        return replace(measured(*given, **more), **gpu)

    monkeypatch.setattr(plan_module, "this_machine", card)
    with pytest.raises(PlanError, match=r"(?s)Other programs hold 7.00 GB of the GPU .*--device cpu"):
        train(config(tiny_model, data, tmp_path / "run"))
