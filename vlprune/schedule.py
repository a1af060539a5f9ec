"""How many tokens leave in which block of a vision transformer. On the host, without a look at the pixels.

A *rate* is how many rows a block merges away, a *count* how many rows other than protected ones are left behind it. A block
pairs its rows, so it can merge away half of them at most.
"""

from __future__ import annotations

import itertools
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


def by_ratio(ratio: float, tokens: int, blocks: int) -> list[int]:
    """Counts where each block keeps the share ``ratio`` of its rows: ``floor(n - ratio x n)`` of n leave, half at most."""
    counts = []
    for _ in range(blocks):
        tokens -= min(math.floor(tokens - tokens * ratio), tokens // 2)
        counts.append(tokens)
    return counts


def room_of(budget: Budget, tokens: int, blocks: int) -> int:
    """The token-layers that a budget allows."""
    return math.floor(round((min(budget, tokens) if isinstance(budget, int) else budget * tokens) * blocks, 6))


def solved(budget: Budget, tokens: int, blocks: int, first: int = 0) -> list[int]:
    """Counts behind each block whose mean is the budget: ``floor(budget x tokens x blocks)`` token-layers exactly.

    Nothing leaves in blocks before ``first``; from there on the rate is the same in all blocks, up to what the exact sum asks
    for, and up to half of the rows. Raises :class:`BudgetError` where merging half of the rows in each of them leaves more
    than that.
    """
    first = min(first, blocks)
    room = room_of(budget, tokens, blocks)
    fewest = tokens * first + sum(counts_of([tokens] * (blocks - first), tokens))
    if room < fewest:
        raise BudgetError(
            f"budget={budget!r} of {tokens} tokens is a mean of {room / blocks:.4g} over {blocks} blocks; a block merges half "
            f"of its rows at most{f', from block {first} on' if first else ''}, so that the least is "
            f"{math.ceil(fewest / blocks)} tokens ({fewest / blocks / max(1, tokens):.3f})"
        )
    return [tokens] * first + _evenly(room - tokens * first, tokens, blocks - first)


def _evenly(room: int, tokens: int, blocks: int) -> list[int]:
    """Counts that add up to ``room`` by rates that are as even as possible."""
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


def staged(budget: Budget, tokens: int, blocks: int, stages: Sequence[int], keep: float | None = None) -> list[int]:
    """Counts behind each block of a method that drops in the blocks ``stages`` alone, in each the same share of what is left.

    The share is ``keep``, or without it the one whose mean meets the budget. A stage's count holds for all blocks up to the
    next one, so fewer token-layers than the longest stage is long may be left unused. One row is always left.
    Raises :class:`BudgetError` where even that is more than the budget.
    """
    stages = sorted({stage for stage in stages if 0 <= stage < blocks})
    lengths = [end - begin for begin, end in zip(stages, [*stages, blocks][1:], strict=True)]
    whole = (blocks - sum(lengths)) * tokens

    def left(share: float) -> list[int]:
        """Behind each stage."""
        return [max(min(1, tokens), math.floor(round(tokens * share ** (1 + stage), 6))) for stage in range(len(stages))]

    def total(counts: Sequence[int]) -> int:
        return whole + sum(length * count for length, count in zip(lengths, counts, strict=True))

    if keep is not None:
        return _spread(left(keep), lengths, tokens, blocks)
    room = room_of(budget, tokens, blocks)
    if room < total(left(0.0)):
        raise BudgetError(
            f"budget={budget!r} of {tokens} tokens is a mean of {room / blocks:.4g} over {blocks} blocks; what drops in the "
            f"blocks {', '.join(map(str, stages)) or 'none'} has a mean of {total(left(0.0)) / blocks:.4g} at least"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total(left(middle)) <= room else (low, middle)
    counts = left(1.0) if total(left(1.0)) <= room else left(low)
    for stage in range(len(stages)):
        before = counts[stage - 1] if stage else tokens
        counts[stage] += min(before - counts[stage], (room - total(counts)) // lengths[stage])
    return _spread(counts, lengths, tokens, blocks)


def _spread(counts: Sequence[int], lengths: Sequence[int], tokens: int, blocks: int) -> list[int]:
    """Behind each block what is left behind the stages."""
    behind = [count for count, length in zip(counts, lengths, strict=True) for _ in range(length)]
    return [tokens] * (blocks - len(behind)) + behind


def quarters(blocks: int) -> list[int]:
    """The blocks behind which a quarter, half and three quarters of them lie: 3, 6 and 9 of twelve."""
    return sorted({max(1, blocks * part // 4) for part in (1, 2, 3)} & set(range(blocks)))


def staged_exactly(budget: Budget, tokens: int, blocks: int, stages: Sequence[int]) -> list[int]:
    """:func:`staged`, for methods that can drop a row or two in any block: with the budget's token-layers exactly.

    What the lengths of the stages leave over goes to the first stages with room for it, and to the first of their blocks.
    """
    return _raised(staged(budget, tokens, blocks, stages), tokens, room_of(budget, tokens, blocks))


def staged_pairs(budget: Budget, tokens: int, blocks: int, stages: Sequence[int]) -> list[int]:
    """:func:`staged_exactly`, for methods that pair rows. Raises :class:`BudgetError` where more than half would leave."""
    counts = staged_exactly(budget, tokens, blocks, stages)
    for block, (before, after) in enumerate(itertools.pairwise([tokens, *counts])):
        if after < before - before // 2:
            raise BudgetError(
                f"budget={budget!r} of {tokens} tokens wants {before - after} of {before} rows to leave in block {block}, "
                "which pairs them; allowed are larger budgets, and more blocks where rows leave"
            )
    return counts


def _raised(counts: list[int], tokens: int, room: int) -> list[int]:
    """``counts`` raised one by one from the front until they add up to ``room``, none above the one before it."""
    counts, missing = list(counts), room - sum(counts)
    while missing > 0:
        for block in range(len(counts)):
            if missing > 0 and counts[block] < (counts[block - 1] if block else tokens):
                counts[block], missing = counts[block] + 1, missing - 1
    return counts


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
