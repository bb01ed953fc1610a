"""One adapter of several, compared with PEFT's add_weighted_adapter."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import nn
from transformers import AutoModelForCausalLM

import nybble
from nybble.errors import ConfigError, RunError
from nybble.runs.adapter_files import StoredAdapter

TOKENS = torch.tensor([[70, 5, 33, 90, 12, 200, 41, 7, 8, 9]])


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """PEFT's, with an effect."""

    def make(name: str, seed: int, **options) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | options)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def logits(base: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(input_ids=TOKENS).logits


@pytest.mark.parametrize("method", ["cat", "linear", "ties"])
def test_each_way_is_pefts(adapter, tiny_model: Path, tmp_path: Path, method: str) -> None:
    both = {"target_modules": ["q_proj", "down_proj"]}
    first, second = adapter("first", 1, **both), adapter("second", 2, lora_alpha=6, use_rslora=True, **both)
    options = {"method": method, "density": 0.4} if method == "ties" else {"method": method}
    nybble.merge(adapters=[first, second], weights=[0.7, -0.3], out=tmp_path / "merged", **options)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), first, adapter_name="first")
    theirs.load_adapter(second, adapter_name="second")
    theirs.add_weighted_adapter(["first", "second"], [0.7, -0.3], "merged", combination_type=method, density=0.4)
    theirs.set_adapter("merged")
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    assert (expected - logits(tiny_model, first)).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(logits(tiny_model, tmp_path / "merged"), expected, rtol=1e-4, atol=1e-5)
    StoredAdapter(tmp_path / "merged")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_what_is_drawn_is_merged_as_peft_does(adapter, tmp_path: Path, method: str) -> None:
    """Of one layer: PEFT's own function on its matrices, A first, and the same draws."""
    first, second = (adapter(name, seed, layers_to_transform=[0]) for name, seed in (("first", 1), ("second", 2)))
    out = nybble.merge(
        adapters=[first, second], weights=[0.7, 0.3], out=tmp_path / "o", method=method, seed=5, density=0.4
    )
    stored = [StoredAdapter(folder) for folder in (first, second, out)]
    (name,) = stored[0].names
    pairs = [each.matrices(name, *each.features(name)) for each in stored]
    roots = torch.tensor([0.7 * 2, 0.3 * 2]).sqrt()  # times alpha / rank
    torch.manual_seed(5)
    for ours, *theirs in ((pairs[2][part], pairs[0][part], pairs[1][part]) for part in (0, 1)):
        torch.testing.assert_close(ours, getattr(merge_utils, method)(theirs, roots, 0.4))


def test_ranks_and_layers_that_differ_are_added_exactly(adapter, tiny_model: Path, tmp_path: Path) -> None:
    first = adapter("first", 1, rank_pattern={"layers.1.+q_proj": 2})
    second = adapter("second", 2, r=3, target_modules=["q_proj", "v_proj"])
    assert nybble.merge(adapters=[first, second], weights=[1, 1], out=tmp_path / "sum") == tmp_path / "sum"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for folder in (first, second):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(tiny_model, tmp_path / "sum"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="ranks 4, 3"):
        nybble.merge(adapters=[first, second], method="ties", out=tmp_path / "refused")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapters": ["a"]}, "adapters are 1"),
        ({"adapters": ["a", "b"], "weights": [1]}, "weights 1"),
        ({"adapters": ["a", "b"], "run": "r"}, "both given"),
        ({"adapters": ["a", "b"], "onto": "original"}, "onto"),
        ({"adapters": ["a", "b"], "to": "nf4"}, "and to"),
        ({"run": "r", "density": 0.2}, "density"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        nybble.merge(out=tmp_path / "out", **options)


def test_adapters_of_runs_on_other_bases_and_damaged_records_are_refused(adapter, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        (tmp_path / f"run-{name}").mkdir()
        runs.append(adapter(name, 0).rename(tmp_path / f"run-{name}" / "adapter").parent)
        (runs[-1] / "base.json").write_text(f'{{"fingerprint": "{name}"}}')
    merge = partial(nybble.merge, adapters=[str(run / "adapter") for run in runs], weights=[1, 1], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"run-a and .*run-b were trained on different bases"):
        merge()
    (runs[1] / "base.json").write_text("[]")
    with pytest.raises(RunError, match=r"run-b/base\.json is damaged"):
        merge()
