"""Tokens that a person picks, as a method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlprune.image import ImageTokens
from vlprune.method import Method, Selection
from vlprune.visualize import View


@dataclass(kw_only=True)
class ByHand(Method):
    """``tokens``: which of an image's visual tokens enter the LLM; None for all."""

    name: ClassVar[str] = "by hand"
    adaptive: ClassVar[bool] = True

    tokens: tuple[int, ...] | None = None

    def select(self, image: ImageTokens) -> Selection:
        total = image.layout.total
        chosen = range(total) if self.tokens is None else sorted(token for token in set(self.tokens) if 0 <= token < total)
        return Selection(torch.tensor(list(chosen), dtype=torch.long, device=image.device))


def near(views: Sequence[View], place: tuple[float, float], brush: int) -> set[int]:
    """Tokens of each view under a square brush of ``brush`` tokens a side around a place on the picture."""
    found: set[int] = set()
    for view in views:
        (rows, columns), (left, top, right, bottom) = view.tokens.shape, view.box
        across, down = (place[0] - left) / (right - left) * columns, (place[1] - top) / (bottom - top) * rows
        if 0 <= across < columns and 0 <= down < rows:
            first = [max(0, round(middle - brush / 2)) for middle in (down, across)]
            part = view.tokens[first[0] : first[0] + brush, first[1] : first[1] + brush]
            found |= set(part.flatten().tolist())
    return found


def toggled(kept: Iterable[int], picked: set[int]) -> list[int]:
    """``picked`` leave if all of them are there, else those that are missing come back."""
    now = set(kept)
    return sorted(now - picked if picked <= now else now | picked)
