"""From a budget to exact counts, on the host, without a look at the pixels."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

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


def rounded_up(share: float, total: int) -> int:
    """The part ``share`` of ``total`` tokens, rounded up but for rounding errors of the product."""
    return math.ceil(round(share * total, 6))


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


def over_layers(mean: int, weights: Sequence[float], total: int) -> list[int]:
    """``mean`` tokens a layer, shared out in proportion to ``weights``: from 1 to ``total`` each, exact in sum."""
    counts = apportion(mean * len(weights), weights, [total] * len(weights))
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


# ------------------------------------------------------------------ counts over the layers of the LLM
#
# Methods that drop inside the LLM spend `room` = budget x layers: a token costs one for each layer that it goes through.


def room(budget: Budget, total: int, layers: int) -> int:
    """What a method may spend on an image of ``total`` visual tokens in an LLM of ``layers``."""
    mean = min(budget, total) if isinstance(budget, int) else budget * total
    return math.floor(round(mean * layers, 6))


def largest(cost: Callable[[int], int], room: int, high: int) -> int:
    """The largest n in 1..``high`` with ``cost(n) <= room``, 0 if there is none. ``cost`` must never fall."""
    return bisect_right(range(1, high + 1), room, key=cost)


def stepped(first: int, after: int, start: int, layers: int) -> int:
    """What ``first`` tokens cost that are ``after`` from layer ``start`` on."""
    return first * start + after * (layers - start)


def lengths(starts: Sequence[int], layers: int) -> list[int]:
    """How many of an LLM's ``layers`` each stage lasts: the first one from layer 0 on, the others from ``starts`` on."""
    edges = [0, *starts, layers]
    return [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]


def geometric(first: int, lowest: int, lengths: Sequence[int], room: int) -> list[int]:
    """Tokens in each stage: ``first``, then falling by one factor from stage to stage, but not below ``lowest``; see
    :func:`shaped`."""
    return shaped(first, lowest, range(1, len(lengths)), lengths, room)


def shaped(first: int, lowest: int, exponents: Sequence[float], lengths: Sequence[int], room: int) -> list[int]:
    """Tokens in each stage: ``first``, then ``first x factor^exponent`` of each later stage, but not below ``lowest``.

    So the logarithms of published ratios give a published schedule its shape, and ``factor`` its budget: it is the highest at
    which the sum of count times length is at most ``room``. What rounding leaves goes to the longest stages, none above the
    one before. ``exponents`` must not fall. Raises :class:`BudgetError` if even ``lowest`` costs more.
    """

    def counts(factor: float) -> list[int]:
        return [first] + [max(lowest, math.floor(first * factor**exponent)) for exponent in exponents]

    def cost(found: Sequence[int]) -> int:
        return sum(count * length for count, length in zip(found, lengths, strict=True))

    steps = 1 << 16
    found = counts(largest(lambda step: cost(counts(step / steps)), room, steps) / steps)
    if cost(found) > room:
        raise BudgetError(f"{first} tokens that fall to {lowest} over stages of {list(lengths)} layers cost more than {room}")
    longest_first = sorted(range(1, len(lengths)), key=lambda stage: -lengths[stage])
    left, before = room - cost(found), -1
    while left != before:
        before = left
        for stage in longest_first:
            if found[stage] < found[stage - 1] and lengths[stage] <= left:
                found[stage] += 1
                left -= lengths[stage]
    return found


def unreachable(method: str, budget: Budget, total: int, lowest: float) -> BudgetError:
    """The error of a budget below ``lowest``, the smallest mean over LLM layers that ``method`` can reach for an image."""
    least = math.ceil(lowest)
    return BudgetError(
        f"budget={budget!r} allows {tokens(budget, total)} of an image's {total} visual tokens, on average over its layers; "
        f"for this image on this model {method} allows {least} to {total}, or a fraction of {least / total:.3f} to 1; "
        "raise the budget"
    )
