"""Medians, spreads, and how far a median can be trusted."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

DRAWS = 1000
"""Samples of the bootstrap."""
MOST_OFF = 0.025
"""Of the bootstrapped medians, the share that lies below the interval, and that which lies above."""


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float], name: str, factor: float = 1.0) -> dict[str, float]:
    """``name_p20``, ``name_p50`` and ``name_p80`` of ``values`` times ``factor``."""
    return {f"{name}_p{share}": factor * quantile(values, share / 100) for share in (20, 50, 80)}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median, bootstrapped; the same draws each time."""
    generator = random.Random(0)
    medians = [statistics.median(generator.choices(values, k=len(values))) for _ in range(DRAWS)]
    return quantile(medians, MOST_OFF), quantile(medians, 1 - MOST_OFF)


def paired(values: Sequence[float], name: str) -> dict[str, float]:
    """``name``: the median of ratios that were taken round by round; ``name_low`` and ``name_high``: its 95 % interval."""
    low, high = median_interval(values)
    return {name: statistics.median(values), f"{name}_low": low, f"{name}_high": high}
