"""Counts, row maps and grids, for every input that there is: properties instead of examples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from vlprune import budget
from vlprune.engine.rows import FILLER, RowMap, put, right_align, take
from vlprune.errors import BudgetError, IncompatibleCacheError
from vlprune.methods.grids import cells

# ------------------------------------------------------------------ budgets

COUNTS = st.integers(1, 3000)
FRACTIONS = st.floats(0, 1, exclude_min=True)


@given(COUNTS | FRACTIONS, st.integers(0, 3000))
def test_a_budget_keeps_at_least_one_token_and_no_more_than_there_are(given_budget, total):
    kept = budget.tokens(given_budget, total)
    assert min(total, 1) <= kept <= total


@given(FRACTIONS, st.integers(1, 3000))
def test_a_fraction_is_rounded_down(fraction, total):
    """But for the noise of floating point: 0.07 of 100 is 7."""
    kept = budget.tokens(fraction, total)
    assert kept == max(1, math.floor(fraction * total + 1e-6)) or kept == max(1, math.floor(fraction * total))


@given(st.integers(1, 3000))
def test_everything_is_everything(total):
    assert budget.tokens(1.0, total) == total == budget.tokens(total, total) == budget.tokens(10**9, total)


@given(FRACTIONS, FRACTIONS, st.integers(0, 3000))
def test_a_larger_budget_keeps_no_less(a, b, total):
    low, high = sorted((a, b))
    assert budget.tokens(low, total) <= budget.tokens(high, total)


@given(COUNTS | FRACTIONS)
def test_valid_budgets_pass_unchanged(value):
    assert budget.check(value) is value


@given(st.integers(max_value=0) | st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | st.just(math.nan))
def test_other_numbers_are_refused(value):
    with pytest.raises(BudgetError, match="allowed is"):
        budget.check(value)


# ------------------------------------------------------------------ apportionment

PARTS = st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 60)), min_size=1, max_size=6)


@st.composite
def shares(draw) -> tuple[int, list[float], list[int]]:
    parts = draw(PARTS)
    weights, capacities = [w for w, _ in parts], [c for _, c in parts]
    return draw(st.integers(0, sum(capacities))), weights, capacities


@given(shares())
def test_shares_add_up_exactly_within_their_capacities(given_shares):
    count, weights, capacities = given_shares
    parts = budget.apportion(count, weights, capacities)
    assert sum(parts) == count
    assert all(0 <= part <= capacity for part, capacity in zip(parts, capacities, strict=True))


@given(st.integers(0, 100), st.lists(st.floats(0.01, 1e3), min_size=1, max_size=6))
def test_shares_are_proportional_within_one_where_there_is_room(count, weights):
    parts = budget.apportion(count, weights, [count] * len(weights))
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - count * weight / sum(weights)) < 1 + 1e-6


@given(shares())
def test_a_heavier_part_of_equal_size_gets_no_less(given_shares):
    count, weights, _ = given_shares
    parts = budget.apportion(min(count, 60), weights, [60] * len(weights))
    for i, a in enumerate(weights):
        for j, b in enumerate(weights):
            assert a <= b or parts[i] >= parts[j]


def test_more_tokens_than_room_is_an_error():
    with pytest.raises(BudgetError, match="5 tokens do not fit"):
        budget.apportion(5, [1.0, 1.0], [2, 2])


# ------------------------------------------------------------------ counts over layers


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(-3, 400))
def test_the_largest_count_that_fits(steps, room):
    """Of costs that never fall."""
    costs = [sum(steps[:i]) for i in range(1, len(steps) + 1)]
    found = budget.largest(lambda n: costs[n - 1], room, len(costs))
    assert found == max((n for n in range(1, len(costs) + 1) if costs[n - 1] <= room), default=0)


def test_stages_last_until_the_next_one():
    assert budget.lengths([3, 7, 11, 15], 32) == [3, 4, 4, 4, 17]
    assert budget.lengths([], 5) == [5]


@st.composite
def schedules(draw) -> tuple[int, int, list[int], int]:
    lengths = draw(st.lists(st.integers(1, 20), min_size=2, max_size=6))
    lowest = draw(st.integers(0, 100))
    first = draw(st.integers(lowest, 700))
    least = first * lengths[0] + lowest * sum(lengths[1:])
    return first, lowest, lengths, draw(st.integers(least, first * sum(lengths) + 10))


@given(schedules())
def test_a_schedule_falls_and_meets_its_budget(schedule):
    first, lowest, lengths, room = schedule
    counts = budget.geometric(first, lowest, lengths, room)
    assert counts[0] == first
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= lowest
    left = room - sum(count * length for count, length in zip(counts, lengths, strict=True))
    assert left >= 0
    # No single stage could have one more.
    raisable = [n for n, now, before in zip(lengths[1:], counts[1:], counts, strict=False) if now < before]
    assert all(left < length for length in raisable)


def test_a_schedule_falls_by_one_factor():
    assert budget.geometric(512, 0, [1, 1, 1, 1], 512 + 256 + 128 + 64) == [512, 256, 128, 64]
    assert budget.geometric(512, 100, [1, 1, 1, 1], 512 + 256 + 128 + 100) == [512, 256, 128, 100]
    assert budget.geometric(100, 0, [3, 4, 4, 4, 17], 100 * 32) == [100] * 5
    assert budget.geometric(100, 7, [3, 29], 100 * 3 + 7 * 29) == [100, 7]


def test_a_schedule_that_cannot_be_met_is_an_error():
    with pytest.raises(BudgetError, match="cost more than 502"):
        budget.geometric(100, 7, [3, 29], 100 * 3 + 7 * 29 - 1)


# ------------------------------------------------------------------ rows


@st.composite
def keeps(draw) -> Tensor:
    """A batch of kept positions; every sample keeps one at least."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    keep = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    keep = torch.tensor(keep)
    keep[:, draw(st.integers(0, length - 1))] = True
    return keep


@given(keeps())
def test_rows_are_the_kept_positions_right_aligned(keep):
    rows = right_align(keep, int(keep.sum(1).max()))
    for row, sample in zip(rows, keep, strict=True):
        kept = sample.nonzero()[:, 0].tolist()
        assert row.tolist() == [FILLER] * (rows.shape[1] - len(kept)) + kept


@given(keeps())
def test_put_gives_back_what_take_took(keep):
    """Kept positions have their own rows, dropped ones the last kept row before them, or zeros."""
    rows = right_align(keep, int(keep.sum(1).max()))
    tensor = torch.arange(1.0, 2 * keep.numel() + 1).view(*keep.shape, 2)
    back = put(take(tensor, rows, 1), rows, keep.shape[1])
    for sample, original, result in zip(keep, tensor, back, strict=True):
        last = torch.zeros(2)
        for kept, before, after in zip(sample, original, result, strict=True):
            last = before if kept else last
            assert torch.equal(after, last)


@given(keeps())
def test_take_shares_a_batch_of_one(keep):
    rows = right_align(keep, int(keep.sum(1).max()))
    table = torch.randn(1, 3, keep.shape[1])
    assert torch.equal(take(table, rows, 2), take(table.expand(len(rows), -1, -1), rows, 2))


@given(st.lists(keeps(), min_size=1, max_size=4), st.integers(0, 5))
def test_a_row_map_names_the_logical_position_of_every_slot(turns, tail):
    """Forwards that prune and forwards that do not, one after the other; then tokens behind them."""
    batch = turns[0].shape[0]
    assume(all(keep.shape[0] == batch for keep in turns))
    row_map = RowMap.identity(batch, 0, torch.device("cpu"))
    slots = torch.zeros(batch, 0, dtype=torch.long)
    past = 0
    for turn, keep in enumerate(turns):
        length = keep.shape[1]
        rows = right_align(keep, int(keep.sum(1).max())) if turn % 2 == 0 else None
        row_map = row_map.extended(rows, past, length, filler=rows is not None and bool((rows < 0).any()))
        stored = torch.arange(length).expand(batch, -1) if rows is None else rows
        slots = torch.cat([slots, torch.where(stored < 0, FILLER, stored + past)], 1)
        past += length
    assert row_map.base == past
    assert row_map.dropped == past - slots.shape[1]
    assert row_map.filler == bool((slots < 0).any())
    expected = torch.cat([slots, (past + torch.arange(tail)).expand(batch, -1)], 1)
    assert torch.equal(row_map.columns(slots.shape[1] + tail), expected)
    for fewer in range(slots.shape[1]):
        assert torch.equal(row_map.columns(fewer), slots[:, :fewer])


@given(keeps(), st.integers(1, 6), st.integers(0, 12))
def test_a_cropped_map_is_the_map_before_the_tokens_came(keep, tail, remove):
    """Tokens behind the pruned ones may go; the pruned ones stay."""
    length = keep.shape[1]
    before = RowMap.identity(len(keep), 0, torch.device("cpu"))
    before = before.extended(right_align(keep, int(keep.sum(1).max())), 0, length, filler=True)
    after = before.extended(None, length, tail, filler=False)
    if remove <= tail:
        after.crop(length + tail - remove)
        assert after.base == length + tail - remove
        assert after.dropped == before.dropped
        assert torch.equal(after.columns(10), before.columns(10))
    elif not keep[:, -(remove - tail) :].all():
        with pytest.raises(IncompatibleCacheError, match="behind the image"):
            after.crop(max(0, length + tail - remove))


@given(keeps(), st.integers(1, 3))
def test_a_map_follows_its_samples(keep, copies):
    """Beams: repeated samples have repeated columns, those that a static cache keeps at hand too."""
    row_map = RowMap.identity(len(keep), 0, torch.device("cpu"))
    row_map = row_map.extended(right_align(keep, int(keep.sum(1).max())), 0, keep.shape[1], filler=True)
    row_map.fix(20)
    columns = row_map.columns(20)
    samples = torch.arange(len(keep)).repeat_interleave(copies).flip(0)
    row_map.select(samples)
    assert torch.equal(row_map.columns(20), columns[samples])
    assert row_map.fixed is not None
    fixed, valid = row_map.fixed
    inside = (columns[samples] >= 0) & (columns[samples] < 20)
    assert torch.equal(valid, inside)
    assert torch.equal(fixed[inside], columns[samples][inside])


# ------------------------------------------------------------------ grids


@st.composite
def divisions(draw) -> tuple[int, int, int]:
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    return rows, columns, draw(st.integers(1, rows * columns))


@given(divisions())
def test_cells_cover_a_grid_exactly_and_hold_their_centres(division):
    """Every patch is in one cell, every cell has a patch, and its centre is its own."""
    rows, columns, count = division
    cell, centres = cells(rows, columns, count)
    assert cell.shape == (rows, columns)
    assert cell.unique().tolist() == list(range(count))
    assert torch.equal(cell.flatten()[centres], torch.arange(count))


@given(divisions())
def test_cells_are_rectangles(division):
    rows, columns, count = division
    cell, _ = cells(rows, columns, count)
    for index in range(count):
        where = (cell == index).nonzero()
        height, width = (where.max(0).values - where.min(0).values + 1).tolist()
        assert height * width == len(where)
