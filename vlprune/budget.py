"""From a budget to exact counts, on the host, without a look at the pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlprune.errors import BudgetError

Budget = int | float
"""``int``: visual tokens of an image that enter the LLM. ``float`` in (0, 1]: that fraction of the image's tokens."""

ALLOWED = "an int >= 1 (visual tokens per image) or a float in (0, 1] (fraction of an image's visual tokens)"


def check(budget: object) -> Budget:
    """Returns ``budget``, or raises :class:`BudgetError`."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise BudgetError(f"budget={budget!r} is of type {type(budget).__name__}; allowed is {ALLOWED}")
    valid = budget >= 1 if isinstance(budget, int) else 0.0 < budget <= 1.0
    if not valid:
        meant_count = isinstance(budget, float) and 1 < budget < 1e6
        hint = f"; for {int(budget)} tokens write budget={int(budget)}" if meant_count else ""
        raise BudgetError(f"budget={budget!r} is out of range; allowed is {ALLOWED}{hint}")
    return budget


def tokens(budget: Budget, total: int) -> int:
    """How many of an image's ``total`` visual tokens ``budget`` keeps: at most ``total`` and at least 1 (0 of 0).

    A fraction is rounded down, as HiRED's official code does.
    """
    if total == 0:
        return 0
    if isinstance(budget, int):
        return min(budget, total)
    return max(1, math.floor(round(budget * total, 6)))


def apportion(count: int, weights: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Splits ``count`` in proportion to ``weights``, exactly, no part above its capacity (largest remainders first).

    Seat j of a part with quota q is worth q - j; the ``count`` best seats win, of equal ones those of the earlier part.
    Raises :class:`BudgetError` if the capacities do not add up to ``count``.
    """
    if count > sum(capacities):
        raise BudgetError(f"{count} tokens do not fit into parts of {list(capacities)}")
    mass = sum(weights)
    quotas = [count * weight / mass if mass else 0.0 for weight in weights]
    seats = sorted((seat + 1 - quota, i) for i, quota in enumerate(quotas) for seat in range(capacities[i]))
    winners = [i for _, i in seats[:count]]
    return [winners.count(i) for i in range(len(weights))]
