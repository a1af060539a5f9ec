"""Where the tokens of a pruned prompt stand: where they would stand in the whole one.

vLLM fills in the positions of a prompt before its images are encoded, and asks again when they are (its interface for
pruning). How far the text behind an image moves is known from the image's size, so the first answer is final for text. Which
tokens of an image are left is known with its features: each brings its offset from the image's first position along in a few
more columns. Positions are ``(3, tokens)``: time, row and column for M-RoPE. A model with one position a token uses row 0; in
the others a visual token notes where its image begins, and its last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.image import ImageLayout

DIGIT = 256
"""Offsets travel as two digits to this base: bfloat16 holds no larger numbers exactly."""
COLUMNS = 6


@dataclass(frozen=True)
class Span:
    """An image in a prompt: ``length`` placeholders from ``start`` on, which stand on ``extent`` positions."""

    start: int
    length: int
    extent: int


def offsets(layout: ImageLayout, mrope: bool) -> Tensor:
    """``(total, 3)`` int64: how far each visual token is from the image's first position."""
    index = torch.arange(layout.total)
    if not mrope:
        return torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], 1)
    columns = layout.grid[1]
    return torch.stack([torch.zeros_like(index), index // columns, index % columns], 1)


def extent(layout: ImageLayout, mrope: bool) -> int:
    """How many positions an image takes: text behind it goes on from there."""
    return max(layout.grid) if mrope else layout.total


def to_columns(found: Tensor, like: Tensor) -> Tensor:
    """``found (T, 3)`` as ``(T, COLUMNS)`` in the dtype of the features ``like``, and on their device."""
    return torch.cat([found // DIGIT, found % DIGIT], 1).to(like)


def from_columns(columns: Tensor) -> Tensor:
    high, low = columns.long().chunk(2, 1)
    return high * DIGIT + low


def of_prompt(length: int, spans: Sequence[Span]) -> tuple[Tensor, int]:
    """Positions ``(3, length)``, and how much further than its index the first token behind the prompt stands."""
    positions = torch.empty(3, length, dtype=torch.long)
    token = position = 0
    for span in (*sorted(spans, key=lambda span: span.start), Span(length, 0, 0)):
        text = span.start - token
        positions[:, token : span.start] = torch.arange(position, position + text)
        position, token = position + text, span.start + span.length
        positions[:2, span.start : token] = position
        positions[2, span.start : token] = position + span.extent - 1
        position += span.extent
    return positions, position - length


def with_images(positions: Tensor, visual: Tensor, computed: int, found: Tensor, mrope: bool) -> tuple[Tensor, int]:
    """``positions (3, L)`` with those of the visual tokens whose offsets are ``found (T, 3)``, and the delta as above.

    ``visual (L,)`` bool. The offsets are of the first ones that are not among the ``computed`` first tokens. Asked twice it
    gives the same.
    """
    new, index = positions.clone(), torch.arange(visual.shape[0], device=visual.device)
    places = (visual & (index >= computed)).nonzero()[: found.shape[0], 0]
    if mrope:
        # Some text stands in front of each image.
        before = torch.where(visual, -1, index).cummax(0).values[places]
        base = torch.where(before >= 0, positions[0, before.clamp(min=0)] + 1, 0)
        new[:, places] = base + found.T
    else:
        new[0, places] = positions[1, places] + found[:, 0]
    return new, delta_of(new)


def delta_of(positions: Tensor) -> int:
    """How much further than its index the first token behind a prompt with ``positions (3, L)`` stands."""
    return int(positions.max()) + 1 - positions.shape[1]
