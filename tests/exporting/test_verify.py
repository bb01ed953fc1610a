"""Verification passes what is the tuned model and nothing else; what it refuses keeps another name."""

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typed import typed

from nybble.errors import NybbleError
from nybble.evaluation.divergence import Distributions, lumped_kl
from nybble.evaluation.evaluation_rows import evaluation_rows
from nybble.exporting.artefact import Artefact, verify, write
from nybble.exporting.consumers import CPU, load_consumer
from nybble.exporting.gguf_keys import ARCHITECTURES
from nybble.exporting.merged_source import MergedSource
from nybble.exporting.rounding import load_rounded, rounding_input
from nybble.exporting.verify import Answers, Verification, ask_run, compare, near_ties
from nybble.options.use_groups import ArtefactKind, GgufType, RoundingOptions
from nybble.quantization.folder import save_dense_folder
from nybble.runs.adapter_files import WEIGHTS_NAME
from nybble.runs.open_run import load_tuned, open_run
from nybble.sources.load import load_model

ROUGHER = ("absmax", "search")
FAITHFUL = Artefact(ArtefactKind.DENSE, GgufType.F16, "dequantized")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own have some ten tokens; its base goes on for as long as it may."""
    monkeypatch.setattr("nybble.exporting.verify.ANSWER_TOKENS", 24)


def run(*arguments: object) -> tuple[int, str]:
    result = typed(arguments, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def failed(verification: Verification) -> set[str]:
    return {check.name for check in verification.checks if not check.passed}


@pytest.mark.parametrize("to", ["16bit", "peft", "nf4", "gguf", "gguf-lora"])
def test_each_kind_of_a_trained_run_is_verified(trained: Path, tmp_path: Path, to: str) -> None:
    code, shown = run("export", "--run", trained, "--to", to, "--out", tmp_path / "out")
    assert code == 0, shown
    assert "verified" in shown and [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["passed"] and report["figures"]["positions"] > 50
    assert report["figures"]["loss_base"] - report["figures"]["loss_tuned"] > 0.5
    if to != "nf4":
        assert report["figures"]["top1_agreement"] >= 0.97
        assert report["figures"]["kl_mean"] < 0.01 < report["figures"]["kl_mean_of_base"]
    assert (report["delta_survival"] is not None) == (to == "nf4")
    assert report["quality"] == ("calibrated" if to == "nf4" else None)


def test_merge_takes_the_same_way(trained: Path, tmp_path: Path) -> None:
    code, shown = run("merge", "--run", trained, "--out", tmp_path / "out")
    assert code == 0, shown
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def check(trained: Path) -> Callable[[Path], Verification]:
    """Compares a folder with what the run itself answers, which is asked once."""
    opened = open_run(trained)
    reference = ask_run(opened, load_tuned(opened, torch.float32, CPU), evaluation_rows(opened), 300)

    def compared(folder: Path) -> Verification:
        consumer = load_consumer(FAITHFUL.kind, opened, folder, torch.float32, context=512)
        return compare(reference, consumer, FAITHFUL.faithfulness, layers_asked=False)

    return compared


def verified(run_folder: Path, folder: Path) -> Verification:
    opened = open_run(run_folder)
    return verify(opened, FAITHFUL, folder, evaluation_rows(opened), 300)


def test_an_untuned_base_is_found_out(trained: Path, tmp_path: Path, check: Callable) -> None:
    save_dense_folder(open_run(trained).source, tmp_path / "base")
    assert {"differs from the base", "same choice as the tuned model"} <= failed(check(tmp_path / "base"))


def test_a_layer_that_was_forgotten_is_found_out(trained: Path, tmp_path: Path) -> None:
    """However the others' tokens are chosen."""
    opened, name = open_run(trained), "model.layers.1.self_attn.k_proj.weight"
    write(opened, FAITHFUL, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = MergedSource(opened, "dequantized").read_base(name).to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    found = verified(trained, tmp_path / "out")
    assert "ΔW of each layer and expert" in failed(found) and found.outcome == "failed"
    (check,) = (check for check in found.checks if check.name.startswith("ΔW"))
    assert check.found == "13 of 14; not model.layers.1.self_attn.k_proj (0%)"


def test_near_ties_do_not_speak_against_what_is_within_rounding() -> None:
    """Twenty choices of 200 are held for as likely as another, and rounding moves them; a firm one that is another
    counts, and so does each of what is farther off than rounding.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(size: float) -> torch.Tensor:
        return size * torch.randn(200, 30, generator=generator)

    tuned = noise(1.0)
    tuned[:, 0] = tuned[:, 1:].amax(1) + 2.0
    tuned[::10, 1] = tuned[::10, 0] - 1e-3
    tuned[1:4, 2] = tuned[1:4, 0] - 0.4
    right, farther, firm = tuned + noise(0.01), tuned + noise(0.2), tuned + noise(0.01)
    firm[1:4, 2] += 0.45
    run = Answers(tuned.argmax(1), torch.zeros(200), [Distributions.of(tuned.log_softmax(1))], None, None, [], [])

    def answers(logits: torch.Tensor) -> Answers:
        log_p, (of_run,) = logits.log_softmax(1), run.distributions
        choices = log_p.argmax(1)
        return Answers(choices, run.losses, [], of_run.kl(log_p), of_run.lead(choices), [], [])

    base = answers(tuned + noise(2.0))

    def found(logits: torch.Tensor) -> tuple[int, int]:
        asked = answers(logits)
        return int((asked.choices != run.choices).sum()), near_ties(asked, base)

    differing, ties = found(right)
    assert differing == ties > 3
    differing, ties = found(farther)
    assert differing > 3 and ties == 0
    differing, ties = found(firm)
    assert ties >= 3 and differing == ties + 3


def test_a_forgotten_end_of_turn_is_found_out(trained: Path, tmp_path: Path, check: Callable) -> None:
    write(open_run(trained), FAITHFUL, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert "end of turn is known" in failed(check(tmp_path / "out"))


def test_another_template_and_other_tokens_are_found_out(trained: Path, tmp_path: Path, check: Callable) -> None:
    write(open_run(trained), FAITHFUL, tmp_path / "out")
    assert not failed(check(tmp_path / "out"))
    template = tmp_path / "out" / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human").replace("{{ m.role }}", "{{ m.role }}:"))
    assert failed(check(tmp_path / "out")) == {"chat template"}
    settings = tmp_path / "out" / "tokenizer.json"
    changed = json.loads(settings.read_text())
    changed["pre_tokenizer"]["add_prefix_space"] = True
    settings.write_text(json.dumps(changed))
    assert "tokens of rendered texts" in failed(check(tmp_path / "out"))


def test_what_cannot_be_loaded_is_not_verified(trained: Path, tmp_path: Path) -> None:
    write(open_run(trained), FAITHFUL, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert failed(verified(trained, tmp_path / "out")) == {"loads and runs"}


def test_what_is_not_verified_keeps_that_name(trained: Path, tmp_path: Path) -> None:
    """A small ΔW rounded back onto the lattice it was trained on is swallowed, and so is what it gained."""
    small, out = scaled(trained, tmp_path / "small", 0.02), tmp_path / "out"
    flags = ("--to", "nf4", "--onto", "dequantized", "--quality", "absmax")
    code, shown = run("merge", "--run", small, *flags, "--out", out)
    assert code == 3 and "Not verified" in shown
    assert not out.exists()
    assert json.loads((tmp_path / "out.unverified" / "verification.json").read_text())["passed"] is False


def scaled(trained: Path, folder: Path, factor: float) -> Path:
    """The run with B, and so ΔW, times `factor`."""
    shutil.copytree(trained, folder)
    tensors = load_file(folder / "adapter" / WEIGHTS_NAME)
    save_file({k: v * (factor if "lora_B" in k else 1) for k, v in tensors.items()}, folder / "adapter" / WEIGHTS_NAME)
    return folder


@pytest.mark.parametrize("to", ["16bit", "nf4"])
def test_a_run_that_changed_too_little_to_tell_is_undecided(trained: Path, tmp_path: Path, to: str) -> None:
    """Not "failed": ΔW is smaller than the rounding to 16 bits."""
    small = scaled(trained, tmp_path / "small", 1e-6)
    code, shown = run("export", "--run", small, "--to", to, "--quality", "absmax", "--out", tmp_path / "out")
    assert code == 4, shown
    assert "changed too little to tell" in shown and "--verify-positions" in shown and "failed" not in shown
    report = json.loads((tmp_path / "out.unverified" / "verification.json").read_text())
    assert report["outcome"] == "undecided" and not report["passed"] and report["too_little"] in shown


def test_a_broken_artefact_of_such_a_run_has_failed(trained: Path, tmp_path: Path) -> None:
    small = scaled(trained, tmp_path / "small", 1e-6)
    write(open_run(small), FAITHFUL, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert verified(small, tmp_path / "out").outcome == "failed"


def test_lumping_never_raises_the_divergence() -> None:
    p, q = (torch.randn(50, 40, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    whole = (p.exp() * (p - q)).sum(-1).double()
    torch.testing.assert_close(lumped_kl(p, q), whole, rtol=1e-4, atol=1e-5)
    top = p.topk(10).indices
    lumped = lumped_kl(p.gather(1, top), q.gather(1, top))
    assert bool((lumped <= whole + 1e-6).all()) and bool((lumped >= 0).all())
    assert float(lumped.sum()) > 0.3 * float(whole.sum())


def test_merges_are_compared(trained: Path) -> None:
    code, shown = run("merge", "--run", trained, "--compare")
    assert code == 0
    for arm in (
        "base, 16 bits",
        "kept apart",
        "16 bits, onto dequantized",
        "nf4 absmax, onto original",
        "nf4 absmax, onto dequantized",
        "nf4 calibrated, onto original",
        "nf4 calibrated, onto dequantized",
    ):
        assert arm in shown
    assert run("merge", "--run", trained)[0] == 2
    assert run("merge", "--run", trained, "--compare", "--out", "x")[0] == 2


# ---- back to four bits, calibrated ------------------------------------------------------------------


def packed(folder: Path) -> torch.Tensor:
    """The bytes of a weight."""
    return load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]


def merged_weights(trained: Path, out: Path, *flags: object) -> tuple[str, torch.Tensor]:
    """What was shown, and the bytes of a weight."""
    code, shown = run("merge", "--run", trained, "--to", "nf4", "--out", out, *flags)
    assert code == 0, shown
    return shown, packed(out)


def test_four_bits_are_calibrated_on_the_training_rows(trained: Path, tmp_path: Path) -> None:
    shown, calibrated = merged_weights(trained, tmp_path / "calibrated")
    assert "from the training rows" in shown and "of general text" in shown and "survived" in shown
    opened, weights = open_run(trained), {}
    for quality in ("calibrated", *ROUGHER):
        calibration = rounding_input(opened, RoundingOptions(quality=quality), evaluation_rows(opened))
        assert (calibration is not None) == (quality == "calibrated")
        artefact = Artefact(ArtefactKind.FOUR_BIT, GgufType.F16, "original")
        write(opened, artefact, tmp_path / quality / "again", rounding=quality, calibration=calibration)
        weights[quality] = packed(tmp_path / quality / "again")
    assert torch.equal(calibrated, weights["calibrated"])
    assert not any(torch.equal(a, b) for a, b in combinations(weights.values(), 2))


def test_calibrated_layers_lose_less_of_their_outputs(trained: Path) -> None:
    """Against the merged model in 16 bits, on rows that neither training nor calibration saw."""
    opened = open_run(trained)
    validation = evaluation_rows(opened)
    merged = MergedSource(opened, "original")
    calibration = rounding_input(opened, RoundingOptions(), validation)

    def outputs(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(input_ids=row.input_ids[None].long()).logits[0] for row in validation])

    exact = outputs(load_model(merged, None, torch.float32))
    losses = {
        quality: (outputs(load_rounded(merged, quality, calibration, torch.float32)) - exact).norm()
        for quality in ("absmax", "calibrated")
    }
    assert losses["calibrated"] < 0.8 * losses["absmax"], losses


def test_general_text_stands_in_for_training_rows_that_are_gone(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    settings, rows = copied / "config.yaml", trained.parent / "rows.jsonl"
    settings.write_text(settings.read_text().replace(str(rows), str(tmp_path / "gone.jsonl")))
    assert "gone.jsonl" in refusal(copied, tmp_path / "out", to="nf4")  # without held-out rows nothing can be verified
    shown, _ = merged_weights(copied, tmp_path / "out", "--data", rows)
    assert "training rows are not calibrated on" in shown and "gone.jsonl" in shown
    assert "1 windows of 512 tokens: 1 of general text" not in shown and "from the training rows" not in shown


def test_text_to_calibrate_on_is_checked(trained: Path, tmp_path: Path) -> None:
    leak = ("--calibrate", trained.parent / "rows.jsonl")  # of which the validation rows are a part
    assert "of the validation rows" in refusal(trained, tmp_path / "out", *leak, to="nf4")
    (tmp_path / "short.txt").write_text("Too short.")
    assert "at least one window" in refusal(trained, tmp_path / "out", "--calibrate", tmp_path / "short.txt", to="nf4")
    assert "nothing is calibrated" in refusal(trained, tmp_path / "out", *leak, to="16bit")
    assert "nothing is calibrated" in refusal(trained, tmp_path / "out", *leak, "--quality", "search", to="nf4")


# ---- bad input -----------------------------------------------------------------------------------


def refusal(run_folder: Path, out: Path, *flags: str, to: str = "16bit") -> str:
    code, shown = run("export", "--run", run_folder, "--to", to, "--out", out, *flags)
    assert code == 2, shown
    leftovers = [path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name)]
    assert leftovers == [], leftovers
    return shown


@pytest.mark.parametrize("to", ["16bit", "peft", "gguf", "gguf-lora"])
def test_another_base_is_refused(make_run: Callable, tmp_path: Path, to: str) -> None:
    run_folder = make_run()
    weights = run_folder.parent / "base" / "model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert "is not the base that" in refusal(run_folder, tmp_path / "out", to=to)


def edit_adapter(run_folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = run_folder / "adapter" / WEIGHTS_NAME
    save_file({key: change(key, tensor).contiguous() for key, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("to", ["16bit", "peft", "gguf-lora"])
def test_adapters_that_do_not_fit_are_refused(make_run: Callable, tmp_path: Path, to: str) -> None:
    run_folder = make_run()
    edit_adapter(run_folder, lambda key, t: t[:3] if "lora_A" in key else t[:, :3])  # another rank than the config's
    assert "has the rank 3, its adapter_config.json says 4" in refusal(run_folder, tmp_path / "out", to=to)
    edit_adapter(run_folder, lambda key, t: torch.zeros(4, 60) if "lora_A" in key else t[:, :1].expand(-1, 4))
    assert "should have shape (4, " in refusal(run_folder, tmp_path / "out", to=to)


@pytest.mark.parametrize("to", ["16bit", "peft", "nf4", "gguf", "gguf-lora"])
def test_adapters_with_nan_are_refused(make_run: Callable, tmp_path: Path, to: str) -> None:
    run_folder = make_run()
    edit_adapter(run_folder, lambda key, t: t.index_fill(0, torch.tensor([1]), torch.nan) if "layers.1" in key else t)
    assert "not finite" in refusal(run_folder, tmp_path / "out", to=to)


def test_a_damaged_adapter_is_refused(make_run: Callable, tmp_path: Path) -> None:
    run_folder = make_run()
    file = run_folder / "adapter" / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in refusal(run_folder, tmp_path / "out")


@pytest.mark.parametrize("to", ["gguf", "gguf-lora"])
def test_families_that_gguf_does_not_know_are_refused(make_run: Callable, tmp_path: Path, to: str) -> None:
    shown = refusal(make_run("gpt2"), tmp_path / "out", to=to)
    assert "'gpt2'" in shown and ", ".join(ARCHITECTURES) in shown


def test_existing_output_is_refused_and_kept(make_run: Callable, tmp_path: Path) -> None:
    run_folder = make_run()
    for name in ("out", "out.unverified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
        code, shown = run("export", "--run", run_folder, "--to", "peft", "--out", tmp_path / "out")
        assert code == 2 and "already exists" in shown
        assert (tmp_path / name / "precious").read_text() == "mine"
        (tmp_path / name / "precious").unlink()


@pytest.mark.parametrize("to", ["nf4", "16bit", "gguf"])
def test_a_disk_that_fills_leaves_nothing(make_run: Callable, tmp_path: Path, disk: Any, to: str) -> None:
    """The system refuses to let any file grow beyond 100 KB, in the midst of the weights."""
    run_folder, out = make_run(hidden_size=128, intermediate_size=512), tmp_path / "out"
    with disk.largest_file(100_000):
        code, shown = run("export", "--run", run_folder, "--to", to, "--out", out)
    assert code == 2 and "cannot be written: " in shown, shown
    # blocks in four bits may wait for the next attempt, under a name that says that they are not all
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert not [name for name in left if not name.endswith(".partial")]


def test_runs_from_before_the_base_was_recorded_are_let_through(make_run: Callable) -> None:
    run_folder = make_run()
    (run_folder / "base.json").unlink()
    assert open_run(run_folder).config.adapters.rank == 4
    (run_folder / "base.json").write_text("{")
    with pytest.raises(NybbleError, match="damaged"):
        open_run(run_folder)
