"""Distillation: steps against plain PyTorch over all logits, however they are cut; what a teacher says, kept on the
disk; teachers whose tokens differ.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_device import WithoutDoubles, as_there
from tiny import SMALL, byte_tokenizer, tune
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.data.examples import EncodedExample
from nybble.data.row_records import RECORDS, RowRecords
from nybble.errors import ConfigError, RunError
from nybble.layers.causal_lm import CausalLM
from nybble.layers.distillation import Mixture
from nybble.training.accumulation import forward_backward
from nybble.training.distill import Distillation
from nybble.training.loop import validation_loss
from nybble.training.teacher import Question, Taught
from nybble.training.teacher_tokens import check_tokens

TOP_K = 7
OBJECTIVE = Distillation(Mixture(0.4, 1.5))


def a_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.2)).requires_grad_(False)


def some_rows(weighted: bool = False) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, length in enumerate((9, 14, 5, 11, 7)):
        ids = torch.randint(SMALL["vocab_size"], (length,), generator=generator, dtype=torch.int32)
        weights = torch.rand(length, generator=generator) if weighted else None
        found.append(EncodedExample(ids, torch.arange(length) >= 2, f"rows:{i}", weights=weights))
    return found


def asked(folder: Path, rows: Sequence[EncodedExample], top_k: int = TOP_K, model: nn.Module | None = None) -> Taught:
    question = Question("tiny", "none", "float32", 2, top_k, SMALL["vocab_size"], OBJECTIVE.mixture.temperature)
    taught = Taught(RowRecords(folder, vars(question)), question)
    taught.ask(CausalLM.of(model or a_model(5)), rows, lambda event: None)
    return taught


def plainly(model: nn.Module, teacher: nn.Module, rows: Sequence[EncodedExample], top_k: int) -> dict[str, Tensor]:
    """Loss and metrics over all logits of each row alone."""
    told, t, a = [], OBJECTIVE.mixture.temperature, OBJECTIVE.mixture.alpha
    for row in rows:
        ids, learnt = row.input_ids.long(), row.supervised[1:]
        logits, theirs = (each(input_ids=ids[None]).logits[0, :-1][learnt] for each in (model, teacher))
        q, p = (logits / t).softmax(-1), (theirs / t).softmax(-1)
        top = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0)
        q, p = (
            torch.cat([each.gather(1, p.topk(top_k).indices), (each * (1 - top)).sum(1, True)], 1) for each in (q, p)
        )
        kl = (p * ((p + 1e-30).log() - (q + 1e-30).log())).sum(1)
        ce = -logits.log_softmax(-1).gather(1, ids[1:][learnt][:, None])[:, 0]
        weights = torch.ones(len(kl)) if row.weights is None else row.weights[1:][learnt]
        same = (logits.argmax(-1) == theirs.argmax(-1)).float()
        told.append(torch.stack([weights * (a * t**2 * kl + (1 - a) * ce), weights * kl, weights * ce, same]))
    return dict(zip(("loss", *OBJECTIVE.metrics), torch.cat(told, dim=1).mean(dim=1), strict=True))


@pytest.mark.parametrize(
    ("packing", "targets", "top_k", "weighted"),
    [
        (True, "all-linear", TOP_K, True),
        (False, "all-linear", SMALL["vocab_size"], False),
        (True, "q_proj,lm_head", 1, True),
    ],
)
def test_a_step_is_the_formula_however_it_is_cut(
    packing: bool, targets: str, top_k: int, weighted: bool, tmp_path: Path
) -> None:
    rows, model, teacher = some_rows(weighted), tune(a_model(0), targets), a_model(5)
    theirs = copy.deepcopy(model)
    expected = plainly(theirs, teacher, rows, top_k)
    expected["loss"].backward()
    wanted = gradients(theirs)
    ours, taught = CausalLM.of(model, packing=packing), asked(tmp_path / "teacher", rows, top_k).attached(rows)
    totals = OBJECTIVE.totals(ours, taught, 9)
    for size in (1, 2, len(rows)):
        found = torch.zeros(1 + len(OBJECTIVE.metrics), dtype=torch.float64)
        for start in range(0, len(rows), size):
            part = forward_backward(OBJECTIVE, ours, OBJECTIVE.collate(taught[start : start + size], ours), totals)
            assert part.metrics is not None
            found += torch.cat([part.loss.double()[None], part.metrics])
        told = dict(zip(expected, found.tolist(), strict=True))
        assert told == pytest.approx({name: value.item() for name, value in expected.items()}, rel=2e-3, abs=2e-4)
        assert (gradients(model) - wanted).norm() <= 2e-3 * wanted.norm() and wanted.norm() > 1e-3
        model.zero_grad()
    measured = validation_loss(OBJECTIVE, ours, taught, 2)
    assert {"loss": measured.loss} | measured.metrics == pytest.approx(told, rel=1e-5, abs=1e-5)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def test_a_gpu_without_fp64_learns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ours = some_rows(weighted=True), CausalLM.of(tune(a_model(0)))
    taught = [*asked(tmp_path / "teacher", rows).attached(rows)]
    batch, totals = OBJECTIVE.collate(taught, ours), OBJECTIVE.totals(ours, taught, 9)
    expected = forward_backward(OBJECTIVE, ours, batch, totals)
    as_there(monkeypatch)
    batch = batch.to(torch.device("cpu"))
    with WithoutDoubles():
        found = forward_backward(OBJECTIVE, ours, batch, totals)
    assert expected.metrics is not None and found.metrics is not None
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert found.metrics.tolist() == pytest.approx(expected.metrics.tolist(), rel=1e-4)


# ---- what a teacher said, on the disk ------------------------------------------------------------


def test_what_was_said_is_not_asked_again_and_half_a_record_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.data.row_records.ROWS_AT_ONCE", 2)
    rows = some_rows()
    whole = asked(tmp_path / "whole", [*rows, rows[0]])
    content = (tmp_path / "whole" / RECORDS).read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        folder = tmp_path / f"cut-{cut}"
        asked(folder, rows[:0])
        (folder / RECORDS).write_bytes(content[:cut])
        known = RowRecords(folder, vars(whole.question))
        assert (len(known.unknown(rows)) == 0) is False
        again = asked(folder, rows)
        assert [again.records.read(row) for row in rows] == [whole.records.read(row) for row in rows]
    never = lambda part: pytest.fail("asked again")  # noqa: E731
    whole.records.ask(rows, never, "asking")
    other = replace(whole.question, top_k=3)
    assert len(RowRecords(tmp_path / "whole", vars(other)).unknown(rows)) == len(rows), "of another question"


@pytest.mark.parametrize("place", [3, 40])
def test_damage_is_named(place: int, tmp_path: Path) -> None:
    rows = some_rows()
    taught = asked(tmp_path / "teacher.partial", rows)
    file = tmp_path / "teacher.partial" / RECORDS
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"teacher/rows\.bin of the run says of rows:\d is not"):
        list(taught.attached(rows))
    (tmp_path / "teacher.partial" / "about.json").write_text("{")
    with pytest.raises(RunError, match=r"about\.json is damaged"):
        asked(tmp_path / "teacher.partial", rows)


# ---- tokens --------------------------------------------------------------------------------------


class Named:
    """A stored model of which the tokenizer alone is asked."""

    name = "theirs"

    def __init__(self, tokenizer: Any):
        self.load_tokenizer = lambda: tokenizer


def row_of(tokenizer: Any, text: str) -> EncodedExample:
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int32)
    return EncodedExample(ids, torch.ones(len(ids), dtype=torch.bool), "rows.jsonl:1")


def test_a_teacher_with_other_tokens_is_refused_by_their_names() -> None:
    ours = byte_tokenizer()
    rows = [[row_of(ours, "What is 3 plus 3?")]]
    more = byte_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    for theirs in (byte_tokenizer(), more):  # what it knows beside is nobody's harm
        check_tokens(Named(theirs), ours, rows, 999)  # type: ignore[arg-type]
    for tokenizer, vocabulary, words in (
        (byte_tokenizer(300), 999, r"rows\.jsonl:1 is read as 'W' .* here where it is read as '[^']{2,}'"),
        (byte_tokenizer(), 60, r"tokens differ: \d+ is '\S+' here and nothing there"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_tokens(Named(tokenizer), ours, rows, vocabulary)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is '<\|more\|>' here and nothing there"):
        check_tokens(Named(ours), more, [[row_of(more, "Hm <|more|>")]], 999)  # type: ignore[arg-type]
    check_tokens(Named(ours), more, rows, 999)  # type: ignore[arg-type]
