"""DPO, IPO, SimPO, ORPO, KTO and the loss of reward models are TRL's: loss, metrics and every gradient, in fp32.

TRL lives in an environment of its own, the one that the benchmarks measure against: `make .venv-peers/.installed`.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_data, tune
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from nybble.data.prepare import prepare
from nybble.data.row_kinds import ROW_KINDS
from nybble.data.sampler import permutation
from nybble.data.template import ChatTemplate
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of
from nybble.layers.scored import ScoredModel
from nybble.layers.trained import train_modules, trained_modules
from nybble.runs.adapter_writing import adapter_tensors, module_tensors
from nybble.training.accumulation import forward_backward
from nybble.training.kto import KTO
from nybble.training.objective import Objective
from nybble.training.preference import DPO, IPO, ORPO, SimPO
from nybble.training.reward import RewardModelling

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
READER = Path(__file__).with_name("preference_with_trl.py")
PAIRS = [
    {"prompt": f"What is {n} plus {n}?", "chosen": f" It is {2 * n}.", "rejected": f" {'No' * (n % 3)} {n}{'?' * n}"}
    for n in range(7)
]
WITH_MARGINS = [row | {"margin": n / 3} for n, row in enumerate(PAIRS)]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": n % 3 > 0}
    for n, row in enumerate(PAIRS)
]
RANK = 3
CONFIG = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[Objective, str, str, dict[str, Any]]] = {  # ours, its name, TRL's trainer and its options
    "dpo": (DPO(0.3), "dpo", "dpo", {"beta": 0.3}),
    "ipo": (IPO(0.3), "ipo", "dpo", {"beta": 0.3, "loss_type": ["ipo"]}),
    "simpo": (
        SimPO(1.5, 0.7, 0.1),
        "simpo",
        "cpo",
        {"beta": 1.5, "simpo_gamma": 0.7, "label_smoothing": 0.1, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    "orpo": (ORPO(0.3), "orpo", "orpo", {"beta": 0.3}),
    "kto": (KTO(0.3, 1.5, 0.7), "kto", "kto", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}),
}


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What TRL finds of each case, and the folder with its gradients and the adapter."""
    folder = tmp_path_factory.mktemp("trl")
    save_file(adapter_tensors(adapters_of(tuned(tiny_model))), folder / "adapter.safetensors")
    scored = scoring(tiny_model)
    tensors = adapter_tensors(adapters_of(scored)) | module_tensors(trained_modules(scored))
    save_file(tensors, folder / "scored.safetensors")
    order = permutation(len(JUDGED), 0, "epoch 0")  # along which ours gives each prompt the answer before it
    objectives = {
        case: {
            "trainer": trainer,
            "options": options,
            "rows": [JUDGED[row] for row in order] if case == "kto" else PAIRS,
            "adapter": str(folder / "adapter.safetensors"),
            "config": CONFIG,
        }
        for case, (_, _, trainer, options) in CASES.items()
    }
    objectives["reward"] = {
        "trainer": "reward",
        "options": {"center_rewards_coefficient": 0.3},
        "rows": WITH_MARGINS,
        "adapter": str(folder / "scored.safetensors"),
        "config": CONFIG | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    }
    asked = {"model": str(tiny_model), "out": str(folder)}
    done = subprocess.run(
        [PYTHON, READER], input=json.dumps(asked | {"objectives": objectives}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def tuned(model: Path) -> Any:
    torch.manual_seed(0)  # draws B
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    return tune(loaded, rank=RANK, alpha=2.0 * RANK)


def scoring(model: Path) -> Any:
    """As `tuned`, with a head of one row that is trained."""
    torch.manual_seed(0)
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=1)
    tune(loaded.requires_grad_(False), rank=RANK, alpha=2.0 * RANK)
    train_modules(loaded, ["score"])
    return loaded


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with TRL: `make .venv-peers/.installed` needs PyPI")
@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_are_trls(case: str, found: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder, theirs = found
    objective, name, _, _ = CASES[case]
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny_model), "none")
    data = make_data(tmp_path / "rows.jsonl", JUDGED if case == "kto" else PAIRS)
    rows = prepare(str(data), template, kind=ROW_KINDS[name], max_seq_len=512, validation_fraction=0).train
    rows = objective.complete(rows, 0, 512)
    model = tuned(tiny_model)
    ours = CausalLM.of(model)
    totals = objective.totals(ours, rows, 3)
    parts = [
        forward_backward(objective, ours, objective.collate(rows[start : start + 3], ours), totals)
        for start in range(0, len(rows), 3)
    ]
    assert sum(part.loss.item() for part in parts) == pytest.approx(theirs[case]["loss"], abs=1e-5)
    summed = sum(part.metrics for part in parts if part.metrics is not None)
    metrics = dict(zip(objective.metrics, summed.tolist(), strict=True))
    assert metrics == pytest.approx({name: theirs[case]["metrics"][name] for name in metrics}, rel=1e-5, abs=1e-5)
    gradients = load_file(folder / f"{case}.safetensors")
    assert len(gradients) == 2 * len(adapters_of(model))
    for key, adapter in adapters_of(model).items():
        for leaf, own in (("lora_A", adapter.lora_A.grad), ("lora_B", adapter.lora_B.grad)):
            assert own is not None
            other = gradients[f"base_model.model.{key}.{leaf}.weight"]
            assert (own - other).norm() <= 1e-5 * max(1.0, float(other.norm())), (key, leaf)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with TRL: `make .venv-peers/.installed` needs PyPI")
def test_the_loss_of_a_reward_model_is_trls(found: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Bare text, with eos behind, as TRL writes rows that are no conversations."""
    folder, theirs = found
    objective, model = RewardModelling(0.3), scoring(tiny_model)
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny_model), "none")
    data = make_data(tmp_path / "rows.jsonl", WITH_MARGINS)
    rows = prepare(str(data), template, kind=ROW_KINDS["reward"], max_seq_len=512, validation_fraction=0).train
    ours = ScoredModel.of(model)
    totals = objective.totals(ours, rows, 3)
    parts = [
        forward_backward(objective, ours, objective.collate(rows[start : start + 3], ours), totals)
        for start in range(0, len(rows), 3)
    ]
    told = theirs["reward"]
    assert sum(part.loss.item() for part in parts) == pytest.approx(told["loss"], abs=1e-5)
    summed = sum(part.metrics for part in parts if part.metrics is not None)
    chosen, rejected, margin, accuracy = summed.tolist()
    found = {"mean_reward": (chosen + rejected) / 2, "margin": margin, "accuracy": accuracy}
    assert found == pytest.approx({name: told["metrics"][name] for name in found}, rel=1e-5, abs=1e-5)
    gradients = load_file(folder / "reward.safetensors")
    own = {
        f"{key}.lora_{leaf}.weight": getattr(adapter, f"lora_{leaf}").grad
        for key, adapter in adapters_of(model).items()
        for leaf in "AB"
    }
    own["score.modules_to_save.weight"] = trained_modules(model)["score"].trained.weight.grad
    assert len(gradients) == len(own)
    for key, gradient in own.items():
        other = gradients[f"base_model.model.{key}"]
        assert (gradient - other).norm() <= 1e-5 * max(1.0, float(other.norm())), key
