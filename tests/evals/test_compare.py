"""Differences of two runs over the same samples, against values that were worked out by other means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlprune.errors import VLPruneError
from vlprune.evals import compare


def rows(scores: Any, predictions: Any = None) -> list[dict[str, Any]]:
    predictions = predictions or ["yes"] * len(scores)
    return [
        {"id": str(place), "score": float(score), "prediction": prediction}
        for place, (score, prediction) in enumerate(zip(scores, predictions, strict=True))
    ]


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 2**5),
        (0, 6, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_counts_coins(better: int, worse: int, p: float):
    assert compare.mcnemar(better, worse) == pytest.approx(p)


def test_mcnemar_of_many_samples():
    """By the normal approximation with continuity correction: z = (400 - 1) / sqrt(40000) = 1.995, p = 0.0460."""
    assert compare.mcnemar(20_200, 19_800) == pytest.approx(0.0460, abs=0.0002)


def test_scores_of_zero_and_one_are_tested_by_mcnemar():
    got = compare.difference(rows([0] * 8 + [1] * 2 + [1] * 90), rows([1] * 8 + [0] * 2 + [1] * 90))
    assert got.value == pytest.approx(-0.06)
    assert (got.test, got.samples) == (compare.MCNEMAR, 100)
    assert got.p == pytest.approx(2 * 56 / 2**10)
    assert got.low < got.value < got.high


def test_interval_of_a_difference_is_that_of_pairs():
    """Scores that vary a lot, with a difference that hardly does: an unpaired interval would be ±0.12."""
    scores = np.random.default_rng(0).random(100)
    got = compare.difference(rows(scores + 0.1 * (np.arange(100) % 2)), rows(scores))
    margin = 1.96 * 0.05 / 10
    assert (got.value, got.low, got.high) == pytest.approx((0.05, 0.05 - margin, 0.05 + margin), abs=0.002)


def test_other_scores_are_permuted():
    """Of 2^5 signs, two give as large a sum as +1 five times: p = 2 / 32; of unequal ones all are counted by hand below."""
    got = compare.difference(rows([0.6] * 5), rows([0.3] * 5))
    assert got.test == compare.PERMUTATION
    assert got.p == pytest.approx(2 / 32, abs=0.008)


def test_permutation_counts_every_sign():
    change = np.array([0.5, -0.3, 0.7, 0.1, 0.9, -0.2])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = float((abs(signs.T @ change) >= abs(change.sum()) - 1e-9).mean())
    assert compare.permutation(change, np.random.default_rng(0)) == pytest.approx(exact, abs=0.015)


def test_tests_that_are_made_together_are_corrected():
    """By hand: the smallest p counts for all tests, the next for one less, and none becomes smaller than the one before."""
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert compare.holm([]) == []


def test_no_difference_at_all():
    got = compare.difference(rows([0.3, 0.6, 1]), rows([0.3, 0.6, 1]))
    assert (got.value, got.low, got.high, got.p) == (0, 0, 0, 1)


def test_a_seed_gives_the_same_numbers():
    mine, theirs = rows(np.linspace(0, 1, 50)), rows(np.linspace(0.1, 0.8, 50))
    assert compare.difference(mine, theirs) == compare.difference(mine, theirs)


def test_agreement_is_of_answers_not_of_scores():
    mine = rows([1, 0, 0, 1, 0], ["Yes ", "cat", "dog", "4", None])
    theirs = rows([1, 0, 1, 0, 0], ["yes", "bird", "dog", "5", None])
    assert compare.agreement(mine, theirs) == 2 / 5


def test_what_is_left_where_the_others_fail():
    got = compare.on_failures(rows([1, 0, 1, 0.8]), rows([0, 0.3, 1, 0.5]))
    assert got is not None
    assert (got.value, got.samples) == (0.5, 2)
    assert compare.on_failures(rows([0, 0]), rows([1, 0.6])) is None


@pytest.mark.parametrize("others", [rows([1]), list(reversed(rows([1, 1]))), []])
def test_runs_over_other_samples_are_refused(others: list[dict[str, Any]]):
    for function in (compare.difference, compare.agreement, compare.on_failures):
        with pytest.raises(VLPruneError, match="same samples"):
            function(rows([1, 1]), others)


def test_nothing_to_compare():
    with pytest.raises(VLPruneError, match="no samples"):
        compare.difference([], [])
