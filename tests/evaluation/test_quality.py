"""KL and its company against their definitions, and `nybble eval quality` from end to end."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nybble.errors import ConfigError, ModelError
from nybble.evaluation.compare_arms import bits_per_weight, compare_arms, parse_arm
from nybble.evaluation.quality import Comparison, bootstrap_interval
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.options.option import build_options
from nybble.options.verbs import EvalQualityConfig
from nybble.quantization.folder import quantize_folder
from nybble.sources.load import load_model
from nybble.sources.open import open_model

DOCUMENTS = [torch.randint(259, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 300, 40)]


@pytest.fixture(scope="module")
def models(tiny_model: Path):
    source = open_model(str(tiny_model))
    return load_model(source, None, torch.float32), load_model(source, BaseFormats(), torch.float32)


@torch.no_grad()
def test_the_figures_are_those_of_whole_logits(models) -> None:
    base, arm = models
    found = Comparison(base, DOCUMENTS).compare(arm)
    kl, difference, losses, agree = [], [], [], []
    for tokens in DOCUMENTS:
        p, q = (F.log_softmax(m(tokens[None]).logits[0, :-1].double(), -1) for m in models)
        kl.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        losses.append(F.nll_loss(q, tokens[1:], reduction="none"))
        difference.append(losses[-1] - F.nll_loss(p, tokens[1:], reduction="none"))
        agree.append((p.argmax(-1) == q.argmax(-1)).double())
    kl = torch.cat(kl)
    assert found.positions == len(kl) == sum(map(len, DOCUMENTS)) - 3
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-2)
    assert found.kl_median == pytest.approx(float(kl.median()), rel=1e-2)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=2e-2)
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert found.loss_difference == pytest.approx(float(torch.cat(difference).mean()), abs=1e-4)
    assert found.top1_agreement == pytest.approx(float(torch.cat(agree).mean()), abs=0.01)
    assert found.difference_low < found.loss_difference < found.difference_high


def test_a_model_loses_nothing_against_itself(models) -> None:
    found = Comparison(models[0], DOCUMENTS).compare(models[0])
    assert (found.kl_mean, found.kl_p99, found.loss_difference, found.top1_agreement) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_covers_the_mean_and_heeds_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(40, generator=generator).double()
    alike = effects.repeat_interleave(25)  # tokens of a document are the same: only documents count
    low, high = bootstrap_interval(alike, [25] * 40, seed=0)
    half = 1.96 * float(effects.std()) / 40**0.5
    assert low < float(alike.mean()) < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_bits_per_weight_are_those_of_the_folder(tiny_model: Path, tmp_path: Path, models) -> None:
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), tmp_path / "out")
    model = load_model(open_model(str(tmp_path / "out")), BaseFormats(), torch.float32)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    others = sum(p.numel() for p in models[0].parameters()) - linears
    bytes_of_linears = 2 * sum(QuantSpec().bytes(n) for n in (4096, 4096, 2048, 2048, 8192, 8192, 8192))
    assert bits_per_weight(model) == pytest.approx((8 * bytes_of_linears + 16 * others) / (linears + others))


def test_the_verb_measures_each_arm(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = {"model": str(tiny_model), "data": str(data), "out": str(tmp_path / "out"), "validation_fraction": "0.2"}
    arms = "nf4:absmax,int4:search,nf4:calibrated"
    given = options | {"arms": arms, "calibration_tokens": "2048", "compute_dtype": "fp32"}
    results = compare_arms(build_options(EvalQualityConfig, given))
    assert [result.arm for result in results] == arms.split(",")
    assert results[2].quality.kl_mean < results[0].quality.kl_mean
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [arm["arm"] for arm in report["arms"]] == arms.split(",")
    assert report["arms"][0]["quality"]["kl_mean"] == results[0].quality.kl_mean
    assert any("calibrated on" in note for note in report["notes"])
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000


def test_arms_and_models_that_cannot_be_compared(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    for text in ("nf4", "nf5:absmax", "nf4:best", ":"):
        with pytest.raises(ConfigError, match="FORMAT:QUALITY"):
            parse_arm(text)
    quantize_folder(open_model(str(tiny_model)), BaseFormats(), tmp_path / "four")
    given = {"model": str(tmp_path / "four"), "data": str(data)}
    with pytest.raises(ModelError, match="already in 4 bits"):
        compare_arms(build_options(EvalQualityConfig, given))
