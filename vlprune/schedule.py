"""How many tokens leave in which block of a vision transformer. On the host, without a look at the pixels.

A *rate* is how many rows a block merges away, a *count* how many rows other than protected ones are left behind it. A block
pairs its rows, so it can merge away half of them at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlprune.budget import Budget
from vlprune.errors import BudgetError


def counts_of(rates: Sequence[int], tokens: int) -> list[int]:
    """Counts behind each block, of ``tokens`` in front of the first; rates that are too high are cut to half of the rows."""
    counts = []
    for rate in rates:
        tokens -= min(rate, tokens // 2)
        counts.append(tokens)
    return counts


def linear(rate: int, inflection: float, blocks: int) -> list[int]:
    """Rates that fall (``inflection`` < 0) or rise (> 0) evenly around ``rate``, cut to integers, as ToMe defines them.

    -1 goes from twice the rate down to 0, 0 is constant, 1 goes from 0 up to twice the rate.
    """
    first = int(rate * (1 - inflection))
    last = 2 * rate - first
    step = (last - first) / max(1, blocks - 1)
    return [int(first + step * block) for block in range(blocks)]


def solved(budget: Budget, tokens: int, blocks: int) -> list[int]:
    """Counts behind each block whose mean is the budget: ``floor(budget x tokens x blocks)`` token-layers exactly.

    The rate is the same in all blocks, up to what the exact sum asks for, and up to half of the rows.
    Raises :class:`BudgetError` where merging half of the rows in every block leaves more than that.
    """
    per_layer = min(budget, tokens) if isinstance(budget, int) else budget * tokens
    room = math.floor(round(per_layer * blocks, 6))
    fewest = sum(counts_of([tokens] * blocks, tokens))
    if room < fewest:
        raise BudgetError(
            f"budget={budget!r} of {tokens} tokens is a mean of {room / blocks:.4g} over {blocks} blocks; a block merges half "
            f"of its rows at most, so that the least is "
            f"{math.ceil(fewest / blocks)} tokens ({fewest / blocks / max(1, tokens):.3f})"
        )
    rate = _highest_rate(room, tokens, blocks)
    rates = [rate] * blocks
    for block in range(blocks):
        # Without the limit of half of the rows, one more in a block lowers the sum by the blocks left: some of 1, 2, 3, ...
        # add up to what is missing, and taking the largest that fits finds them.
        higher = [*rates[:block], rate + 1, *rates[block + 1 :]]
        if sum(counts_of(higher, tokens)) >= room:
            rates = higher
    counts = counts_of(rates, tokens)
    return _lowered(counts, counts_of([rate + 1] * blocks, tokens), sum(counts) - room, tokens)


def _highest_rate(room: int, tokens: int, blocks: int) -> int:
    """The highest rate whose counts still add up to ``room`` or more."""
    low, high = 0, tokens
    while low < high:
        middle = (low + high + 1) // 2
        if sum(counts_of([middle] * blocks, tokens)) >= room:
            low = middle
        else:
            high = middle - 1
    return low


def _lowered(counts: list[int], floor: list[int], excess: int, tokens: int) -> list[int]:
    """``counts`` with ``excess`` taken off one by one, later blocks first, never below ``floor``.

    The limit of half of the rows leaves such an excess. No count comes to exceed the one before it, or to fall below half of
    it: rules that only compare neighbours and that both sequences keep, so single steps always lead from one to the other.
    """
    counts = list(counts)
    while excess > 0:
        for block in reversed(range(len(counts))):
            before = counts[block - 1] if block else tokens
            after = counts[block + 1] if block + 1 < len(counts) else 0
            lower = counts[block] - 1
            if excess > 0 and lower >= max(floor[block], after, -(-before // 2)):
                counts[block], excess = lower, excess - 1
    return counts
