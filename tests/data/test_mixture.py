"""Data sets with weights: shares, repeats, resuming, and what is said of them."""

import json
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest

import nybble
from nybble.data.mixture import Mixture
from nybble.data.prepare import prepare
from nybble.data.sampler import StepSampler
from nybble.data.template import ChatTemplate
from nybble.errors import DataError, RunError
from nybble.training.resume import DataDigests, check_data


def mixture(rows: list[int], weights: list[str]) -> Mixture:
    return Mixture.of([f"set {n}" for n in range(len(rows))], rows, [Fraction(weight) for weight in weights])


def draw(mixed: Mixture, steps: int, rows_per_step: int = 8, seed: int = 3) -> list[int]:
    sampler = StepSampler(sum(mixed.rows), rows_per_step, seed, mixed)
    return [row for _ in range(steps) for row in sampler.next_step()]


def parts_of(mixed: Mixture, rows: list[int]) -> list[list[int]]:
    """Rows of each part, numbered within it."""
    found: list[list[int]] = [[] for _ in mixed.rows]
    for row in rows:
        part = next(n for n in range(len(mixed.rows)) if row < sum(mixed.rows[: n + 1]))
        found[part].append(row - sum(mixed.rows[:part]))
    return found


@pytest.mark.parametrize(
    "rows, weights",
    [
        ([50, 7], ["0.7", "0.3"]),
        ([5, 40, 13], ["1", "2.5", "0.5"]),
        ([3, 300], ["0.999", "0.001"]),
        ([20, 20], ["1", "1"]),
    ],
)
def test_every_beginning_has_the_shares_and_every_row_its_turn(rows, weights):
    mixed = mixture(rows, weights)
    drawn = draw(mixed, steps=90)
    total = sum(map(Fraction, weights))
    for count in range(1, len(drawn) + 1, 41):
        counts = [len(part) for part in parts_of(mixed, drawn[:count])]
        assert counts == mixed.drawn(count)
        for got, weight in zip(counts, weights, strict=True):
            assert abs(got - count * Fraction(weight) / total) < 1
    for own, size in zip(parts_of(mixed, drawn), rows, strict=True):
        passes = [own[i : i + size] for i in range(0, len(own), size)]
        assert all(sorted(each) == list(range(size)) for each in passes[:-1])
        assert max(Counter(passes[-1]).values(), default=0) <= 1, "no row comes again before the others of its set"
        assert len(passes) < 3 or size < 4 or passes[0] != passes[1], "each pass has an order of its own"


def test_a_restored_sampler_goes_on_where_it_was_and_the_seed_decides():
    mixed = mixture([5, 40, 13], ["1", "2.5", "0.5"])
    whole = draw(mixed, 40)
    for stop in (1, 7, 23):
        first, second = (StepSampler(58, 8, seed, mixed) for seed in (3, 99))
        seen = [row for _ in range(stop) for row in first.next_step()]
        second.load_state(json.loads(json.dumps(first.state())))
        assert seen + [row for _ in range(40 - stop) for row in second.next_step()] == whole
    assert draw(mixed, 40, seed=4) != whole
    assert draw(mixed, 40, rows_per_step=5) == whole[:200], "how rows are cut into steps changes nothing"


def test_only_how_weights_compare_says_anything():
    assert mixture([5, 9], ["0.7", "0.3"]) == mixture([5, 9], ["70", "30"]) == mixture([5, 9], ["2.1", "0.9"])
    assert mixture([5, 9], ["0.7", "0.3"]).weights == (7, 3)


@pytest.fixture
def read(tokenizer_of, tmp_path):
    template = ChatTemplate(tokenizer_of("bytes", "chatml"))

    def read(*given: str, **options):
        for name, count, answer in (("a", 30, "yes"), ("b", 10, "a longer answer of more tokens")):
            rows = ({"prompt": f"{name} {n} ?", "completion": f"{answer} {n * n}"} for n in range(count))
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare([f"{tmp_path}/{name}" for name in given], template, max_seq_len=512, **options)

    return read


def test_what_weights_come_to_is_in_the_audit(read):
    data = read("a.jsonl:1", "b.jsonl:1", validation_fraction=0.1)
    assert data.mixture is not None and data.mixture.weights == (1, 1)
    assert sum(data.mixture.rows) == len(data.train) == 36
    first, second = data.audit.to_json()["mixture"]
    own = [[row for row in data.train if row.origin.startswith(name)] for name in "ab"]
    assert [first["rows"], second["rows"]] == [len(rows) for rows in own] == list(data.mixture.rows)
    assert (first["share"], second["share"]) == (0.5, 0.5) and first["drawn"] == second["drawn"] == 18
    means = [sum(row.supervised_tokens for row in rows) / len(rows) for rows in own]
    assert second["supervised_share"] == pytest.approx(means[1] / sum(means))
    assert "10 rows" not in data.mixture.describe(
        36
    ) and f"({18 / len(own[1]):.2f} times each)" in data.mixture.describe(36)
    assert read("a.jsonl", "b.jsonl").mixture is None


def test_weights_need_rows_and_are_not_for_held_out_ones(read, tmp_path):
    with pytest.raises(DataError, match=r"b\.jsonl: a weight, and no row of it is left to train on"):
        read(
            "a.jsonl:1", "b.jsonl:1", validation_fraction=0.9, validation_rows=500, seed=next(seeds_that_take_all(read))
        )
    with pytest.raises(DataError, match=r"held-out rows are all evaluated"):
        read("a.jsonl", validation_source=[f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:2"])


def seeds_that_take_all(read):
    """Seeds whose split leaves no row of b.jsonl to train on."""
    for seed in range(500):
        data = read("a.jsonl", "b.jsonl", validation_fraction=0.9, validation_rows=500, seed=seed)
        if data.train and not any(row.origin.startswith("b") for row in data.train):
            yield seed


def test_a_run_notices_other_weights(read, tmp_path):
    before, after = read("a.jsonl:2", "b.jsonl:1"), read("a.jsonl:1", "b.jsonl:1")
    folder = tmp_path / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    digests = DataDigests.of(before)
    digests.write(tmp_path / "data_rows.safetensors")
    checkpoint = SimpleNamespace(about={"data": digests.fingerprint}, folder=folder)
    check_data(checkpoint, before, digests, ())
    for data in (after, read("a.jsonl", "b.jsonl")):
        with pytest.raises(RunError, match=r"other examples: their weights: \d+:2 \d+:1 were, (\d+:1 \d+:1|none) are"):
            check_data(checkpoint, data, DataDigests.of(data), ())
        check_data(checkpoint, data, DataDigests.of(data), ("data",))


def test_a_run_by_weight_says_what_it_draws_and_resumes_to_the_bit(tiny_model, tmp_path):
    for name, count in (("a", 12), ("b", 5)):
        rows = ({"prompt": f"{name} {n} ?", "completion": f"{n * n}"} for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:2"]
    options = {"model": tiny_model, "rows_per_step": 4, "schedule": "constant", "warmup": 0, "max_seq_len": 128}
    heard = []
    nybble.train(out=tmp_path / "whole", data=data, max_steps=5, on_event=heard.append, **options)
    told = [event.sentence for event in heard if event.kind == "note" and "drawn by weight" in event.sentence]
    assert len(told) == 1 and told[0].startswith("20 rows are drawn by weight") and "b.jsonl 8 of its" in told[0]
    assert [part["share"] for part in json.loads((tmp_path / "whole/data_audit.json").read_text())["mixture"]] == [
        0.6,
        0.4,
    ]

    nybble.train(out=tmp_path / "parts", data=data, max_steps=2, **options)
    nybble.train(resume=True, out=tmp_path / "parts", max_steps=5, allow_change="config")
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert adapters[0] == adapters[1]
    with pytest.raises(RunError, match="their weights"):
        nybble.train(resume=True, out=tmp_path / "parts", data=[data[0], f"{data[1]}1"], allow_change="config")

    planned = []
    nybble.plan(model=tiny_model, data=data, rows_per_step=4, max_steps=5, on_event=planned.append)
    assert told[0] in [event.sentence for event in planned if event.kind == "note"]
