"""ToMe chooses what its specification says."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlprune import BudgetError, OptionError, ToMe
from vlprune.methods.tome import assignment
from vlprune.schedule import counts_of, linear, solved


def naive(metric: list[list[float]], prefix: int, r: int) -> list[int]:
    """The assignment of one image, row by row from the specification, sharing nothing with the library."""
    rows = range(len(metric))

    def cosine(i: int, j: int) -> float:
        a, b = (torch.tensor(metric[k], dtype=torch.float64) for k in (i, j))
        return float((a / a.norm()) @ (b / b.norm()))

    sources = [i for i in rows if i % 2 == 0 and i >= prefix]
    targets = [i for i in rows if i % 2 == 1 and i >= prefix]
    partner = {}
    for source in sources:
        values = [round(cosine(source, target), 12) for target in targets]
        partner[source] = (max(values), targets[values.index(max(values))])
    merged = sorted(sources, key=lambda source: -partner[source][0])[:r]
    order = [*range(prefix), *[s for s in sources if s not in merged], *targets]
    return [order.index(partner[i][1] if i in merged else i) for i in rows]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("rows", [9, 12, 25, 30])
def test_the_assignment_is_that_of_the_specification(rows, prefix):
    metric = torch.randn(3, rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    for r in (1, (rows - prefix) // 4, (rows - prefix) // 2):
        expected = [naive(image, prefix, r) for image in metric.tolist()]
        assert assignment(metric, prefix, r).tolist() == expected


@given(st.integers(0, 2**20), st.integers(6, 24), st.integers(0, 5))
def test_of_equal_similarities_the_first_target_and_the_earlier_source_win(seed, rows, prefix):
    """Rows of four signs: their cosines are exact in floating point, and most of them equal."""
    signs = torch.randint(0, 2, (1, rows, 4), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    for r in range((rows - prefix) // 2 + 1):
        assert assignment(signs, prefix, r).tolist() == [naive(signs[0].tolist(), prefix, r)]


@given(st.integers(0, 2**20), st.integers(2, 40), st.integers(0, 6))
def test_every_output_row_is_used_and_protected_rows_stay_alone(seed, rows, prefix):
    rows += prefix
    metric = torch.randn(2, rows, 3, generator=torch.Generator().manual_seed(seed))
    metric[0, prefix] = float("nan")
    r = (rows - prefix) // 2
    for image in assignment(metric, prefix, r).tolist():
        assert sorted(set(image)) == list(range(rows - r))
        assert image[:prefix] == list(range(prefix))
        assert not set(image[:prefix]) & set(image[prefix:])


@given(st.integers(1, 300), st.integers(1, 24), st.floats(0.05, 1.0))
def test_a_budget_is_met_exactly(tokens, blocks, budget):
    room = int(round(budget * tokens * blocks, 6))
    fewest = sum(counts_of([tokens] * blocks, tokens))
    if room < fewest:
        with pytest.raises(BudgetError):
            solved(budget, tokens, blocks)
        return
    counts = solved(budget, tokens, blocks)
    assert sum(counts) == room
    for before, after in itertools.pairwise([tokens, *counts]):
        assert before - before // 2 <= after <= before


def test_a_solved_rate_is_as_even_as_the_sum_allows():
    counts = solved(0.5, 196, 12)
    rates = [before - after for before, after in itertools.pairwise([196, *counts])]
    assert sum(counts) == 196 * 6
    assert max(rates) - min(rates) <= 1
    assert solved(98, 196, 12) == counts
    assert solved(500, 196, 12) == [196] * 12


def test_schedules_of_rates():
    assert linear(8, 0, 4) == [8, 8, 8, 8]
    assert linear(8, -1, 5) == [16, 12, 8, 4, 0]
    assert linear(8, 1, 5) == [0, 4, 8, 12, 16]
    assert linear(8, -1, 1) == [16]
    assert ToMe(r=8).counts(100, 3) == [92, 84, 76]
    assert ToMe(r=8, inflection=-1.0).counts(100, 3) == [84, 76, 76]
    assert ToMe(r=[0, 60]).counts(100, 4) == [100, 50, 50, 50]
    assert ToMe(r=3).counts(4, 4) == [2, 1, 1, 1]


@pytest.mark.parametrize("wrong", [{"r": -1}, {"r": 1.5}, {"r": [1, "2"]}, {"r": True}, {"r": 1, "inflection": 2.0}])
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(OptionError):
        ToMe(**wrong)
