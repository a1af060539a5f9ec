"""What ``farthest_points`` means, in PyTorch. The cosines are made here for both backends: their choices are the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlprune.kernels.bipartite_match.reference import inverse_norms, products, ready, wide

AT_ONCE = 2**26
"""Cosines that are kept at one time, at most: 256 MB in float32."""
TOGETHER = 384
"""Points whose cosines are one product on a CPU: with fewer, calls cost more than what they save."""
LAST = torch.finfo(torch.float32).max
"""Takes the place of a point's cosine to the nearest one chosen, if the point has no cosines: it comes after all others."""

Rounds = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def farthest_points(
    features: Tensor, count: int, start: Tensor | None, valid: Tensor | None, rounded: bool, rounds: Rounds | None = None
) -> Tensor:
    """See :func:`vlprune.kernels.farthest_points`. ``rounds``: a kernel that does the same as :func:`rounds`."""
    batch, points, _ = features.shape
    if batch * points * count == 0:
        return features.new_full((batch, count), -1, dtype=torch.int64)
    samples, parts = max(1, AT_ONCE // points**2), []
    for first in range(0, batch, samples):
        some = slice(first, first + samples)
        here, begin = (None if given is None else given[some] for given in (valid, start))
        parts.append(_of_some(features[some], count, begin, here, rounded, rounds))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_some(
    features: Tensor, count: int, start: Tensor | None, valid: Tensor | None, rounded: bool, kernel: Rounds | None
) -> Tensor:
    cosines = Cosines(features, rounded)
    nearest = torch.full_like(cosines.known, -math.inf, dtype=cosines.wide).masked_fill_(~cosines.known, LAST)
    neighbours = cosines.known
    if valid is not None:
        nearest, neighbours = nearest.masked_fill(~valid, math.inf), neighbours & valid
    if features.shape[1] ** 2 > AT_ONCE:
        first = _loneliest(nearest, neighbours, cosines.block) if start is None else start
        return _rounds(cosines.of, nearest, first, count)
    if features.device.type == "cpu" and kernel is None:
        return _on_cpu(cosines, nearest, neighbours, start, count)
    matrix = cosines.all()
    if start is None:
        # It may write into the matrix: what a point is to itself, or one that is no neighbour to others, is not asked again.
        first = _loneliest(nearest, neighbours, lambda some, rows: matrix[:, some : some + rows])
    else:
        first, samples = start, torch.arange(len(start), device=start.device)
        matrix[samples, start] = matrix[samples, start].masked_fill(~cosines.known.gather(1, start[:, None]), -math.inf)
    return (kernel or rounds)(matrix, nearest, first, count)


def _on_cpu(cosines: Cosines, nearest: Tensor, neighbours: Tensor, start: Tensor | None, count: int) -> Tensor:
    """Sample by sample, each with a :class:`Triangle`."""
    chosen = []
    for sample, rows in enumerate(cosines.rows):
        triangle = Triangle(rows, cosines.rounded_again)
        if start is None:
            highest = triangle.highest(neighbours[sample])
            first = int(_lowest(torch.maximum(nearest[sample], highest)[None]))
        else:
            first = int(start[sample])
        chosen.append(triangle.rounds(nearest[sample], cosines.known[sample], first, count))
    return torch.tensor(chosen)


class Cosines:
    """The cosines between the points of ``features (B, N, D)``, less 1 if ``rounded``.

    ``known (B, N)``: points that are numbers. The cosines of others are 0, and those who ask leave them out.
    """

    def __init__(self, features: Tensor, rounded: bool):
        self.dtype, self.wide, self.rounded = features.dtype, wide(features.dtype), rounded
        scale = inverse_norms(features)
        self.known = scale > 0
        self.scale = None
        rows = ready(features)
        if rounded:
            norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
            rows = ready(features / norms.masked_fill(norms == 0, 1))
        elif rows.dtype == self.wide:
            rows = rows * scale[..., None]
        else:  # halves would be rounded once more
            self.scale = scale.masked_fill(~self.known, 0)
            rows = rows.clone()
        self.rows = rows.masked_fill_(~self.known[..., None], 0)

    def _between(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        """``(B, M, N)`` of some ``rows (B, M, D)``, whose inverse norms are ``scale (B, M)``, with all points."""
        out = products(rows, self.rows)
        if self.scale is not None and scale is not None:
            out *= self.scale[:, None]
            out *= scale[..., None]
        return self.rounded_again(out)

    def rounded_again(self, products: Tensor) -> Tensor:
        """Distances are rounded once more, and coarsely around 1. What counts is their order."""
        return (products.to(self.dtype) - 1).to(products.dtype) if self.rounded else products

    def block(self, first: int, rows: int) -> Tensor:
        """``(B, rows, N)`` of the points from ``first`` on."""
        some = slice(first, first + rows)
        return self._between(self.rows[:, some], None if self.scale is None else self.scale[:, some])

    def all(self) -> Tensor:
        """``(B, N, N)``."""
        batch, points, _ = self.rows.shape
        if self.rows.is_cuda or self.scale is not None:
            return self.block(0, points)
        return torch.stack([Triangle(rows, self.rounded_again).matrix() for rows in self.rows])

    def of(self, point: Tensor) -> Tensor:
        """``(B, N)`` of one point of each sample, -inf if it is not a number."""
        index = point.clamp(min=0)[:, None]
        row = self.rows.gather(1, index[..., None].expand(-1, -1, self.rows.shape[2]))
        out = self._between(row, None if self.scale is None else self.scale.gather(1, index))[:, 0]
        return out.masked_fill(~self.known.gather(1, index), -math.inf)


class Triangle:
    """Cosines between the points of one sample on a CPU, of each two of them once.

    Strips of :data:`TOGETHER` points, with these and all behind them. That is little more than half of the arithmetic, and of
    memory, which a CPU is as slow to get as to fill.
    """

    def __init__(self, rows: Tensor, rounded: Callable[[Tensor], Tensor]):
        self.rows, self.size = rows, TOGETHER
        with torch.autocast(rows.device.type, enabled=False):
            products = [torch.mm(rows[first : first + self.size], rows[first:].mT) for first in self._starts()]
        self.strips = list(map(rounded, products))

    def _starts(self) -> range:
        return range(0, len(self.rows), self.size)

    def highest(self, neighbours: Tensor) -> Tensor:
        """``(N,)`` of each point to the neighbour that is most alike. Overwrites those of points that are no neighbours."""
        highest = self.rows.new_full((len(self.rows),), -math.inf)
        everyone = bool(neighbours.all())
        for first, strip in zip(self._starts(), self.strips, strict=True):
            strip.diagonal().fill_(-math.inf)
            behind, own = slice(first, None), slice(first, first + self.size)
            if not everyone:
                strip.masked_fill_(~(neighbours[own, None] & neighbours[behind]), -math.inf)
            highest[behind] = torch.maximum(highest[behind], strip.amax(0))
            highest[own] = torch.maximum(highest[own], strip.amax(1))
        return highest

    def rounds(self, nearest: Tensor, known: Tensor, point: int, count: int) -> list[int]:
        """:func:`rounds` of one sample: in arrays, whose operations cost a tenth of a tensor's where they are that small."""
        import numpy as np

        strips, lowest = [strip.numpy() for strip in self.strips], nearest.numpy().copy()
        has_cosines, chosen = known.numpy(), []
        for _ in range(count):
            chosen.append(point)
            if point < 0:
                continue
            if has_cosines[point]:
                place, within = divmod(point, self.size)
                for number, strip in enumerate(strips[:place]):
                    before = lowest[number * self.size : (number + 1) * self.size]
                    np.maximum(before, strip[:, point - number * self.size], out=before)
                behind = lowest[place * self.size :]
                np.maximum(behind, strips[place][within], out=behind)
            lowest[point] = math.inf
            point = int(lowest.argmin())
            point = -1 if lowest[point] == math.inf else point
        return chosen

    def matrix(self) -> Tensor:
        """``(N, N)``."""
        matrix = self.rows.new_empty(len(self.rows), len(self.rows))
        for first, strip in zip(self._starts(), self.strips, strict=True):
            end = first + len(strip)
            matrix[first:end, first:] = strip
            matrix[end:, first:end] = strip[:, len(strip) :].mT
        return matrix


def _loneliest(nearest: Tensor, neighbours: Tensor, block_of: Callable[[int, int], Tensor]) -> Tensor:
    """``(B,)`` the point of each sample whose highest cosine to another is lowest, -1 where there is none.

    ``neighbours (B, N)``: the points that count. ``block_of(first, rows)``: cosines ``(B, rows, N)``, which are overwritten.
    """
    points, step = nearest.shape[1], max(1, AT_ONCE // (16 * nearest.numel()))
    # A GPU is not waited for; a CPU is spared a pass over the matrix.
    everyone = not neighbours.is_cuda and bool(neighbours.all())
    highest = torch.empty_like(nearest)
    for first in range(0, points, step):
        rows = block_of(first, step)
        rows.diagonal(first, 1, 2).fill_(-math.inf)
        if not everyone:
            rows.masked_fill_(~neighbours[:, None], -math.inf)
        highest[:, first : first + step] = rows.amax(-1)
    return _lowest(torch.maximum(nearest, highest))


def _lowest(nearest: Tensor) -> Tensor:
    """The first of the lowest, -1 where no point is left."""
    value, index = nearest.min(1)
    return torch.where(value == math.inf, -1, index)


def rounds(matrix: Tensor, nearest: Tensor, first: Tensor, count: int) -> Tensor:
    """``(B, count)`` points in the order chosen.

    Args:
        matrix: ``(B, N, N)`` cosines without NaN.
        nearest: ``(B, N)`` where each point starts: -inf, :data:`LAST` if it has no cosines, inf if it does not exist.
        first: ``(B,)`` the first points.
    """
    samples = torch.arange(matrix.shape[0], device=matrix.device)
    return _rounds(lambda point: matrix[samples, point.clamp(min=0)], nearest, first, count)


def _rounds(cosines_of: Callable[[Tensor], Tensor], nearest: Tensor, first: Tensor, count: int) -> Tensor:
    chosen = first.new_empty(first.shape[0], count)
    point = first
    for number in range(count):
        chosen[:, number] = point
        nearest = torch.maximum(nearest, cosines_of(point))
        nearest.scatter_(1, point.clamp(min=0)[:, None], math.inf)
        point = _lowest(nearest)
    return chosen
