"""Scores of answers and intervals of losses, against plain formulas."""

import numpy as np
import pytest

from nybble.evaluation.scores import (
    choose_metrics,
    exact_match,
    last_number,
    mean_loss,
    mean_score,
    number_match,
    token_f1,
)


def test_words_in_common() -> None:
    assert token_f1("The cat sat.", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("dog dog", "dog") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1 and token_f1("x", "") == 0
    assert exact_match(" a  b\n", "a b") == 1 and exact_match("A b", "a b") == 0


def test_last_numbers() -> None:
    assert last_number("16 - 3 - 4 = 9\n#### 1,234.50") == 1234.5
    assert last_number("no number") is None and last_number("-7 degrees.") == -7
    assert number_match("so it is 18.0.", "9 * 2 = $18\n#### 18") == 1
    assert number_match("nothing", "nothing") == 0


def test_metrics_that_references_allow() -> None:
    assert choose_metrics("auto", ["#### 3", "It is 4."]) == ["exact", "f1", "number"]
    assert choose_metrics("auto", ["#### 3", "none"]) == ["exact", "f1"]
    assert choose_metrics("f1", []) == ["f1"] and choose_metrics("none", ["1"]) == []


def test_a_mean_is_over_tokens_and_its_interval_covers_it() -> None:
    losses, tokens = np.array([10.0, 2.0, 6.0]), np.array([10, 1, 4])
    estimate = mean_loss(losses, tokens)
    assert estimate.value == pytest.approx(18 / 15)
    assert 1.0 <= estimate.low <= estimate.value <= estimate.high <= 2.0


def test_pairing_takes_out_what_rows_have_in_common() -> None:
    random = np.random.default_rng(1)
    tokens = np.full(200, 10)
    hard = random.normal(20, 8, 200)
    theirs, ours = hard + random.normal(0, 0.1, 200), hard - 0.5 + random.normal(0, 0.1, 200)
    paired = mean_loss(ours - theirs, tokens)
    assert paired.low < -0.05 < paired.high < 0 and paired.high - paired.low < 0.01
    alone = mean_loss(ours, tokens)
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


def test_an_interval_is_as_wide_as_theory_says() -> None:
    scores = np.random.default_rng(2).integers(0, 2, 400).astype(float)
    estimate = mean_score(list(scores))
    width = 2 * 1.96 * scores.std() / 20
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.15)
