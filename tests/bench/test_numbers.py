"""Quantiles, intervals of time, and peaks of memory, against numbers that were worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vlprune.bench.memory import PeakTensors, cache_bytes
from vlprune.bench.stats import median_interval, paired, quantile, spread
from vlprune.bench.timing import beyond, covered


def test_quantiles_lie_between_neighbours():
    values = [30.0, 10.0, 20.0, 50.0, 40.0]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([10, 18, 30, 42, 50])
    assert quantile([7.0], 0.2) == 7.0


def test_spread_names_three_quantiles_in_the_wanted_unit():
    assert spread([0.001, 0.002, 0.003], "ms", 1000) == pytest.approx({"ms_p20": 1.4, "ms_p50": 2.0, "ms_p80": 2.6})


def test_the_interval_of_a_median_holds_it_and_is_the_same_each_time():
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 5.0, 1.0]
    low, high = median_interval(values)
    assert 0.9 <= low <= 1.0 <= high <= 5.0
    assert (low, high) == median_interval(values)
    assert median_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_paired_gives_the_median_of_ratios_and_its_interval():
    found = paired([2.0, 2.0, 4.0], "speedup")
    assert found["speedup"] == 2.0
    assert found["speedup_low"] == 2.0
    assert found["speedup_high"] == 4.0


def test_spans_that_overlap_are_counted_once():
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4
    assert covered([(0, 10), (2, 3)]) == 10
    assert covered([]) == 0


def test_a_part_does_not_count_what_lies_in_other_parts():
    assert beyond([(0, 10)], [(2, 4), (8, 12)]) == 6
    assert beyond([(2, 3)], [(0, 10)]) == 0


def test_peak_is_the_most_that_was_alive_at_once():
    known = torch.zeros(1000)
    with PeakTensors([known]) as tensors:
        first = torch.zeros(100)  # 400 bytes
        second = first + 1  # 800
        view = second[:50]  # shares memory
        del first, second  # 400 are held by the view
        third = torch.zeros(50)  # 600
        known + 0  # 4000 for a moment
        del view, third
        assert tensors.now == 0
    assert tensors.peak == 600 + 4000


def test_cache_bytes_are_those_of_keys_and_values():
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for layer, length in enumerate((5, 3)):
        cache.update(torch.zeros(1, 2, length, 4), torch.zeros(1, 2, length, 4), layer)
    assert cache_bytes(cache) == 2 * (5 + 3) * 2 * 4 * 4
