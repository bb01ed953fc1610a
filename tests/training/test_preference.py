"""DPO, IPO, SimPO, ORPO and KTO against plain formulas over the model's own logits: losses, metrics, gradients; steps
that do not depend on how they are cut; what a reference is.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_device import WithoutDoubles, as_there
from tiny import SMALL, tune
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.data.examples import EncodedExample
from nybble.data.preference_rows import EncodedPair, JudgedAnswer, PreferenceRow, with_mismatched
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, enable_adapters
from nybble.training.accumulation import forward_backward
from nybble.training.kto import KTO
from nybble.training.loop import validation_loss
from nybble.training.objective import Objective
from nybble.training.preference import DPO, IPO, ORPO, SimPO
from nybble.training.reference import References

SIZES = ((4, 5, 7), (3, 9, 2), (6, 3, 4), (2, 8, 8))  # tokens of prompt, chosen and rejected answer
OBJECTIVES: dict[str, Objective] = {
    "dpo": DPO(0.3),
    "dpo, smoothed": DPO(0.3, 0.1),
    "ipo": IPO(0.2),
    "simpo": SimPO(2.0, 0.5, 0.1),
    "orpo": ORPO(0.4),
    "kto": KTO(0.3, 1.5, 0.7),
}


def document(prompt: Tensor, answer: Tensor, origin: str) -> EncodedExample:
    ids = torch.cat([prompt, answer]).int()
    return EncodedExample(ids, torch.arange(len(ids)) >= len(prompt), origin)


def rows(objective: Objective, seed: int = 1) -> list[PreferenceRow]:
    """Pairs, or the same answers judged by themselves; the last row of these has a prompt and an answer of its own."""
    generator = torch.Generator().manual_seed(seed)
    made: list[PreferenceRow] = []
    for i, sizes in enumerate(SIZES):
        prompt, *answers = (torch.randint(SMALL["vocab_size"], (n,), generator=generator) for n in sizes)
        if i == 1:
            answers[1][:1] = answers[0][:1]  # they begin alike
        chosen, rejected = (document(prompt, answer, f"rows:{i}") for answer in answers)
        if isinstance(objective, KTO):
            made += [JudgedAnswer.of(chosen, True), JudgedAnswer.of(rejected, False)][: 1 + i % 2]
        else:
            made.append(EncodedPair.of(chosen, rejected, learns_prompt=isinstance(objective, ORPO)))
    return [*objective.complete(made, 0, 64)]  # type: ignore[list-item]


def adapted_model(targets: str = "all-linear", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.2)).requires_grad_(False)
    return tune(model, targets, **options)


# ---- the plain formulas --------------------------------------------------------------------------


def token_log_p(model: nn.Module, row: EncodedExample, learnt: Tensor | None = None) -> Tensor:
    """log p of the row's supervised tokens, by the model's own forward."""
    ids = row.input_ids.long()
    log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_p[(row.supervised if learnt is None else learnt)[1:]]


def plain(objective: Objective, model: nn.Module, base: nn.Module, rows: Sequence[PreferenceRow]) -> dict[str, Tensor]:
    """Loss and metrics, as the papers write them."""
    if isinstance(objective, KTO):
        return plain_kto(objective, model, base, rows)
    pairs = [row.documents for row in rows]
    policy = [[token_log_p(model, document) for document in pair] for pair in pairs]
    with torch.no_grad():
        reference = [[token_log_p(base, document) for document in pair] for pair in pairs]
    sums = torch.stack([torch.stack([side.sum() for side in pair]) for pair in policy])
    means = torch.stack([torch.stack([side.mean() for side in pair]) for pair in policy])
    ratios = sums - torch.stack([torch.stack([side.sum() for side in pair]) for pair in reference])
    more: dict[str, Tensor] = {}
    if isinstance(objective, DPO):
        x, e = objective.beta * (ratios[:, 0] - ratios[:, 1]), objective.label_smoothing
        losses = (1 - e) * torch.log1p(torch.exp(-x)) + e * torch.log1p(torch.exp(x))
        rewards, told = objective.beta * ratios, sums
    elif isinstance(objective, IPO):
        mean_ratios = ratios / torch.tensor([[len(side) for side in pair] for pair in policy])
        losses = (mean_ratios[:, 0] - mean_ratios[:, 1] - 0.5 / objective.beta) ** 2
        rewards, told = objective.beta * ratios, sums
    elif isinstance(objective, SimPO):
        x, e = objective.beta * (means[:, 0] - means[:, 1]) - objective.gamma, objective.label_smoothing
        losses = (1 - e) * torch.log1p(torch.exp(-x)) + e * torch.log1p(torch.exp(x))
        rewards, told = objective.beta * means, means
    else:
        assert isinstance(objective, ORPO)
        odds = means.exp() / (1 - means.exp())
        ratio = torch.log(torch.sigmoid(torch.log(odds[:, 0] / odds[:, 1])))
        whole = [token_log_p(model, chosen, torch.ones_like(chosen.supervised)) for chosen, _ in pairs]
        nll = -torch.cat(whole).mean()
        losses = nll - objective.lambda_ * ratio
        rewards, told = objective.lambda_ * means, means
        more = {"nll_loss": nll, "log_odds_ratio": ratio.mean()}
    return {
        "loss": losses.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float().mean(),
        "logps/chosen": told[:, 0].mean(),
        "logps/rejected": told[:, 1].mean(),
    } | more


def plain_kto(objective: KTO, model: nn.Module, base: nn.Module, rows: Sequence[PreferenceRow]) -> dict[str, Tensor]:
    with torch.no_grad():
        z = [token_log_p(model, row.documents[1]).sum() - token_log_p(base, row.documents[1]).sum() for row in rows]
        kl = torch.stack(z).mean().clamp(min=0)
        reference = torch.stack([token_log_p(base, row.documents[0]).sum() for row in rows])
    log_p = torch.stack([token_log_p(model, row.documents[0]).sum() for row in rows])
    good = torch.tensor([row.desirable for row in rows if isinstance(row, JudgedAnswer)])
    ratio = log_p - reference
    losses = torch.where(
        good,
        objective.desirable_weight * (1 - torch.sigmoid(objective.beta * (ratio - kl))),
        objective.undesirable_weight * (1 - torch.sigmoid(objective.beta * (kl - ratio))),
    )
    rewards = objective.beta * ratio
    return {
        "loss": losses.mean(),
        "rewards/chosen": rewards[good].mean(),
        "rewards/rejected": rewards[~good].mean(),
        "rewards/margins": rewards[good].mean() - rewards[~good].mean(),
        "logps/chosen": log_p[good].mean(),
        "logps/rejected": log_p[~good].mean(),
        "kl": kl,
    }


# ---- losses and gradients ------------------------------------------------------------------------


def step(objective: Objective, model: CausalLM, rows: Sequence[EncodedExample], size: int) -> dict[str, float]:
    """Loss and metrics of a step in micro-batches of `size` rows; gradients are left in place."""
    totals = objective.totals(model, rows, size)
    loss, metrics = 0.0, torch.zeros(len(objective.metrics), dtype=torch.float64)
    for start in range(0, len(rows), size):
        batch = objective.collate(rows[start : start + size], model)
        part = forward_backward(objective, model, batch, totals)
        assert part.metrics is not None
        loss, metrics = loss + part.loss.item(), metrics + part.metrics
    return {"loss": loss} | dict(zip(objective.metrics, metrics.tolist(), strict=True))


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


WAYS = [(name, True, "all-linear") for name in OBJECTIVES]
WAYS += [("dpo", False, "all-linear"), ("orpo", False, "all-linear"), ("kto", False, "all-linear")]
WAYS += [("orpo", True, "q_proj,lm_head"), ("kto", True, "lm_head")]


@pytest.mark.parametrize(("name", "packing", "targets"), WAYS)
def test_a_step_is_the_formula_however_it_is_cut(name: str, packing: bool, targets: str) -> None:
    objective = OBJECTIVES[name]
    train, model = rows(objective), adapted_model(targets)
    theirs, base = copy.deepcopy(model), copy.deepcopy(model)
    enable_adapters(base, False)
    expected = plain(objective, theirs, base, train)
    expected["loss"].backward()
    wanted = gradients(theirs)
    assert wanted.norm() > 1e-3
    ours = CausalLM.of(model, packing=packing)
    for size in (1, 3, len(train)):
        found = step(objective, ours, train, size)
        assert found == pytest.approx({key: value.item() for key, value in expected.items()}, rel=2e-5, abs=2e-5)
        assert (gradients(model) - wanted).norm() <= 2e-5 * wanted.norm()
        model.zero_grad()
    measured = validation_loss(objective, ours, train, 2)
    assert {"loss": measured.loss} | measured.metrics == pytest.approx(found, rel=1e-5, abs=1e-5)
    assert all(adapter.enabled for adapter in adapters_of(model).values())


def test_what_a_pair_begins_with_is_computed_once() -> None:
    """On decoder blocks, where only attention tells its documents apart; padded rows and other models' are whole."""
    train, model = rows(OBJECTIVES["dpo"]), CausalLM.of(adapted_model())
    batch = OBJECTIVES["dpo"].collate(train, model)
    prompts, answers = sum(prompt for prompt, *_ in SIZES), sum(sum(rest) for _, *rest in SIZES)
    assert model.verdict.path == "blocks"
    assert batch.num_tokens == prompts + answers - 1, "one token of the answers too"
    padded = CausalLM.of(adapted_model(), packing=False)
    assert OBJECTIVES["dpo"].collate(train, padded).num_tokens == 2 * prompts + answers
    first = batch.supervised_positions.tolist()
    assert len(first) == answers and len(set(first)) < answers, "two targets after the last token of a prompt"


def test_dropped_inputs_of_the_heads_adapter_are_dropped_again() -> None:
    """Its gradient comes from a second pass over the head."""
    model = adapted_model("lm_head", dropout=0.5)
    train, ours = rows(OBJECTIVES["simpo"]), CausalLM.of(model, packing=True).train()
    adapter = adapters_of(model)["lm_head"]

    def loss(moved: float) -> float:
        with torch.no_grad():
            adapter.lora_B.add_(moved * direction)
        torch.manual_seed(5)
        found = step(OBJECTIVES["simpo"], ours, train, len(train))["loss"]
        with torch.no_grad():
            adapter.lora_B.sub_(moved * direction)
        return found

    direction = torch.zeros_like(adapter.lora_B)
    loss(0.0)
    assert adapter.lora_B.grad is not None
    gradient = adapter.lora_B.grad.clone()
    direction = gradient / gradient.norm()
    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(float(gradient.norm()), rel=2e-2)


# ---- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_asked_before_is_the_one_asked_in_the_step(name: str, tmp_path: Path) -> None:
    """And what was asked is not asked again, by whoever opens the file."""
    objective, model = OBJECTIVES[name], adapted_model(std=0.0)
    ours, train = CausalLM.of(model), rows(OBJECTIVES[name])
    references = References.open(tmp_path / "reference", "tiny", "")
    references.ask(ours, train, 2)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.lora_B, std=0.2)
    again = References.open(tmp_path / "reference", "tiny", "")
    assert len(again.records.unknown(train)) == 0
    asked = [*again.attached(train)]
    assert len(References.open(tmp_path / "reference", "other", "").records.unknown(train)) == len(train)
    assert all(isinstance(row, PreferenceRow) and all(map(math.isfinite, row.reference)) for row in asked)
    assert step(objective, ours, asked, 2) == pytest.approx(step(objective, ours, train, 2), rel=1e-5, abs=1e-6)


def test_what_a_reference_said_is_kept_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.data.row_records.ROWS_AT_ONCE", 1)
    train, ours = rows(OBJECTIVES["dpo"]), CausalLM.of(adapted_model())
    whole = References.open(tmp_path / "whole", "tiny", "")
    whole.ask(ours, train, 1)
    stopped = References.open(tmp_path / "stopped", "tiny", "")
    losses, calls = ours.token_losses, []

    def fail(batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) > 2:  # of four, a row each
            raise KeyboardInterrupt
        return losses(batch)

    monkeypatch.setattr(ours, "token_losses", fail)
    with pytest.raises(KeyboardInterrupt):
        stopped.ask(ours, train, 1)
    monkeypatch.undo()
    stopped = References.open(tmp_path / "stopped", "tiny", "")
    assert 0 < len(stopped.records.unknown(train)) < len(train)
    stopped.ask(ours, train, 1)
    assert [stopped.records.read(row) for row in train] == [whole.records.read(row) for row in train]


# ---- rows ----------------------------------------------------------------------------------------


def test_a_cut_pair_keeps_both_answers_or_teaches_nothing() -> None:
    prompt = torch.arange(6)
    pair = EncodedPair.of(
        document(prompt, torch.tensor([7, 8, 9]), "r:1"), document(prompt, torch.tensor([7, 8]), "r:1")
    )
    assert (len(pair), pair.document_lengths, pair.supervised_tokens, pair.num_targets) == (17, (9, 8), 5, 5)
    cut = pair.truncate(8)
    assert (cut.document_lengths, cut.num_truncated, cut.supervised_tokens) == ((8, 8), 1, 0), "they are the same now"
    assert pair.truncate(6).supervised_tokens == 0 and pair.truncate(9) is pair
    whole = EncodedPair.of(*pair.documents, learns_prompt=True)
    assert whole.num_targets == 8 + 2


def test_each_prompt_is_given_another_rows_answer() -> None:
    judged = [row for row in rows(OBJECTIVES["kto"]) if isinstance(row, JudgedAnswer)]
    answers = []
    for row in judged:
        assert row.mismatched is not None
        assert row.mismatched.prompt_ids == row.prompt_ids
        answers.append(row.mismatched.input_ids[len(row.prompt_ids) :].tolist())
    own = [row.input_ids[len(row.prompt_ids) :].tolist() for row in judged]
    assert sorted(answers) == sorted(own), "each answer once"
    assert all(answer != theirs for answer, theirs in zip(answers, own, strict=True))
    again: Callable[[int], list[Any]] = lambda seed: [r.mismatched.content for r in with_mismatched(judged, seed, 64)]  # type: ignore[union-attr]  # noqa: E731
    assert again(0) == again(0) != again(1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_gpu_without_fp64_compares_answers_too(name, monkeypatch):
    objective = OBJECTIVES[name]
    model, given = CausalLM.of(adapted_model()), rows(OBJECTIVES[name])

    batch, totals = objective.collate(given, model), objective.totals(model, given, 2)
    expected = forward_backward(objective, model, batch, totals)
    as_there(monkeypatch)
    batch = batch.to(torch.device("cpu"))
    with WithoutDoubles():
        found = forward_backward(objective, model, batch, totals)
    assert expected.metrics is not None and found.metrics is not None
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert found.metrics.tolist() == pytest.approx(expected.metrics.tolist(), rel=1e-4, abs=1e-5)
