"""A run's plan: a budget that holds, refusals that say what would fit, `nybble plan` from a config alone."""

import json

import pytest
import torch
from rich.console import Console

from nybble.cli.main import app
from nybble.config import PlanConfig, load_config
from nybble.errors import ConfigError, ModelError, PlanError
from nybble.memory.planner import require
from nybble.options import build_options, parse_size
from nybble.training import checkpoint, loop, session
from nybble.training.foresee import foresee
from nybble.training.session import train


def plans(**options):
    return foresee(build_options(PlanConfig, {"model": "smollm2-135m", "max_seq_len": 512} | options))


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
    assert all(plan.why_not for plan in made.rejected)


def test_less_memory_leaves_fewer_plans_and_none_that_takes_more_than_there_is():
    own = plans(memory="4GB")[0].machine.process_bytes
    fitting = []
    for megabytes in (4000, 1000, 700, 500, 400, 300):
        made, _, _ = plans(memory=own + megabytes * 10**6)
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
    assert {p.why_not for p in made.best if "base from" in p.strategy} == {"--init loftq needs the whole base"}


def test_a_mixed_folder_is_planned_with_the_bits_of_its_layers(tmp_path):
    from nybble.formats.bnb import quantization_config
    from nybble.formats.quantized_tensor import QuantSpec
    from nybble.models.shapes import SHAPES

    base = {}
    for second in ("nf4", "nf2"):
        specs = {"model.layers.0.mlp.up_proj": QuantSpec(), "model.layers.0.mlp.down_proj": QuantSpec(second)}
        config = SHAPES["tiny"] | {"quantization_config": quantization_config(specs, torch.bfloat16, [])}
        (tmp_path / "config.json").write_text(json.dumps(config))
        base[second] = plans(model=str(tmp_path), memory="4GB")[0].chosen.components["base weights"]
    assert base["nf2"] == pytest.approx(base["nf4"] * (4.127 + 2.127) / 2 / 4.127, rel=2e-2)


def test_a_config_without_a_field_that_is_needed_names_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ModelError, match="num_attention_heads"):
        plans(model=str(tmp_path))


def test_a_budget_below_the_smallest_plan_says_what_would_change_it(tiny_model, data, tmp_path):
    with pytest.raises(PlanError, match=r"(?s)smallest plan takes .* budget is 0\.01 GB.*--rank 4"):
        train(config(tiny_model, data, tmp_path / "run", memory="10MB"), Console(quiet=True))
    assert not (tmp_path / "run" / "config.yaml").exists(), "refused before anything was made"


@pytest.mark.parametrize("bits", [{"quality": "calibrated"}, {"mixed": 3.5}])
def test_what_never_fits_is_refused_before_its_bits_are_made(tiny_model, data, tmp_path, monkeypatch, bits):
    def too_late(*arguments):
        raise AssertionError("spent minutes on a base that does not fit")

    monkeypatch.setattr(session, "make_calibrated_base", too_late)
    monkeypatch.setattr(session, "measure_mixed", too_late)
    with pytest.raises(PlanError, match="smallest plan takes"):
        train(config(tiny_model, data, tmp_path / "run", memory="10MB", **bits), Console(quiet=True))


def test_mixed_bits_are_planned_for():
    four, three = (plans(memory="4GB", **bits)[0].chosen.components["base weights"] for bits in ({}, {"mixed": 3.1}))
    assert three == pytest.approx(four * 3.1 / 4.127, rel=2e-2)


@pytest.mark.parametrize("option", ["alpha", "rslora", "dropuot"])
def test_a_plan_takes_no_option_that_it_does_not_read(option):
    with pytest.raises(ConfigError, match=option):
        build_options(PlanConfig, {"model": "tiny", option: "1"})


def test_a_run_and_a_plan_of_its_data_expect_the_same(tiny_model, data, tmp_path):
    out, given = tmp_path / "run", {"memory": "3GB", "max_steps": 2, "micro_batch_size": 2, "keep": "nothing"}
    train(config(tiny_model, data, out, **given), Console(quiet=True))
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
    made, asked, freed = plans(memory=own + 500 * 10**6, micro_batch_size=8, rows_per_step=8, keep="everything")
    with pytest.raises(PlanError, match=r"(?s)What fits: 4-bit.*--micro-batch-size \d --keep"):
        require(made, asked, freed)


def test_a_rehearsal_that_takes_too_much_stops_before_the_first_step(tiny_model, data, tmp_path, monkeypatch):
    options = {"memory": "3GB"}
    monkeypatch.setattr(loop.PeakMemory, "__exit__", lambda self, *_: setattr(self, "peak_bytes", 4_000_000_000))
    with pytest.raises(PlanError, match=r"rehearsal .* took 4 GB"):
        train(config(tiny_model, data, tmp_path / "run", **options), Console(quiet=True))


def test_a_rehearsal_changes_nothing(tiny_model, data, tmp_path):
    adapters = []
    for name, options in {"plain": {}, "rehearsed": {"memory": "3GB"}}.items():
        train(config(tiny_model, data, tmp_path / name, dropout=0.1, **options), Console(quiet=True))
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
        torch.manual_seed(123)
    assert adapters[0] == adapters[1]


def test_a_rehearsal_evaluates_and_saves_once(tiny_model, data, tmp_path, monkeypatch):
    out, done = tmp_path / "run", []
    held_out = loop.held_out_loss
    monkeypatch.setattr(loop, "held_out_loss", lambda *a: done.append("evaluated") or held_out(*a))
    write = checkpoint.Checkpoints._write
    monkeypatch.setattr(checkpoint.Checkpoints, "_write", lambda *a, **k: done.append("saved") or write(*a, **k))
    monkeypatch.setattr(session, "check_peak", lambda *a: done.append("checked"))
    train(config(tiny_model, data, out, memory="3GB"), Console(quiet=True))
    assert done[:3] == ["evaluated", "saved", "checked"]
    assert not list((out / "checkpoints").glob(".tmp-*")), "nothing is left of it"
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-1"]


def test_plan_prints_one_json_object_and_draws(tmp_path):
    from typer.testing import CliRunner

    words = ["plan", "--model", "tiny", "--memory", "2GB", "--json", "--plot", str(tmp_path / "plans.png")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["chosen"]["peak_bytes"] == sum(record["chosen"]["components"].values())
    assert record["machine"]["budget_bytes"] == 2_000_000_000 and record["rejected"]
    assert (tmp_path / "plans.png").stat().st_size > 1000
