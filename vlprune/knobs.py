"""What a calibration may try of a method's knobs: a method draws each of them from a range that it names itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Draw(Protocol):
    """Draws values for knobs, each by its own name; what was drawn before decides on the next draw, or chance."""

    def number(self, name: str, low: float, high: float) -> float: ...

    def whole(self, name: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        ...

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        """One of ``values``, which are strings, numbers, booleans or None."""
        ...


def ascending(draw: Draw, name: str, count: int, low: int, high: int) -> list[int]:
    """``count`` different integers from ``low`` to ``high``, or as many as there are, the smallest first.

    The gap in front of each is drawn, so that every set can be drawn and none twice as often by its order.
    """
    found: list[int] = []
    for left in reversed(range(min(count, high - low + 1))):
        lowest = found[-1] + 1 if found else low
        found.append(draw.whole(f"{name}.{len(found)}", lowest, high - left))
    return found


def falling(draw: Draw, name: str, count: int, least: float = 0.2) -> list[float]:
    """``count`` shares, each at most the one before and at least ``least`` of it; the first is a share of 1."""
    found: list[float] = []
    for stage in range(count):
        found.append(draw.number(f"{name}.{stage}", least, 0.98) * (found[-1] if found else 1.0))
    return found
