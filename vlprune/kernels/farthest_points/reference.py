"""What ``farthest_points`` means, in PyTorch. The cosines are made here for both backends: their choices are the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlprune.kernels.bipartite_match.reference import inverse_norms, products, ready

AT_ONCE = 2**26
"""Cosines that are kept at one time, at most: 256 MB in float32."""
LAST = torch.finfo(torch.float32).max
"""Takes the place of a point's cosine to the nearest one chosen, if the point has no cosines: it comes after all others."""

Rounds = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def farthest_points(
    features: Tensor, count: int, start: Tensor | None, valid: Tensor | None, rounded: bool, rounds: Rounds
) -> Tensor:
    """See :func:`vlprune.kernels.farthest_points`. ``rounds``: :func:`rounds`, or what does the same."""
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
    features: Tensor, count: int, start: Tensor | None, valid: Tensor | None, rounded: bool, rounds: Rounds
) -> Tensor:
    cosines = Cosines(features, rounded)
    nearest = torch.full_like(cosines.scale, -math.inf).masked_fill_(~cosines.known, LAST)
    if valid is not None:
        nearest = nearest.masked_fill(~valid, math.inf)
    if features.shape[1] ** 2 > AT_ONCE:
        first = _loneliest(cosines, nearest, valid) if start is None else start
        return _rounds(cosines.of, nearest, first, count)
    matrix = cosines.matrix()
    first = _loneliest(cosines, nearest, valid, matrix) if start is None else start
    return rounds(matrix, nearest, first, count)


class Cosines:
    """The cosines between the points of ``features (B, N, D)``, less 1 if ``rounded``; -inf where they are not numbers."""

    def __init__(self, features: Tensor, rounded: bool):
        self.dtype = features.dtype
        self.rounded = rounded
        self.scale = inverse_norms(features)
        self.known = self.scale > 0
        if rounded:
            norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
            features = features / norms.masked_fill(norms == 0, 1)
        self.rows = ready(features)

    def between(self, rows: Tensor, scale: Tensor) -> Tensor:
        """``(B, M, N)`` of some ``rows (B, M, D)``, whose inverse norms are ``scale (B, M)``, with all points."""
        out = products(rows, self.rows)
        if self.rounded:  # distances are rounded once more, and coarsely around 1; what counts is their order
            out.copy_(out.to(self.dtype).sub_(1))
        else:
            out *= self.scale[:, None]
            out *= scale[..., None]
        return out.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    def matrix(self) -> Tensor:
        return self.between(self.rows, self.scale)

    def block(self, first: int, rows: int) -> Tensor:
        return self.between(self.rows[:, first : first + rows], self.scale[:, first : first + rows])

    def of(self, point: Tensor) -> Tensor:
        """``(B, N)`` of one point of each sample."""
        index = point.clamp(min=0)[:, None]
        row = self.rows.gather(1, index[..., None].expand(-1, -1, self.rows.shape[2]))
        return self.between(row, self.scale.gather(1, index))[:, 0]


def _loneliest(cosines: Cosines, nearest: Tensor, valid: Tensor | None, matrix: Tensor | None = None) -> Tensor:
    """``(B,)`` the point of each sample whose highest cosine to another is lowest, -1 where there is none."""
    points, block = nearest.shape[1], max(1, AT_ONCE // (16 * nearest.numel()))
    highest = torch.empty_like(nearest)
    for first in range(0, points, block):
        some = slice(first, first + block)
        rows = cosines.block(first, block) if matrix is None else matrix[:, some].clone()
        rows.diagonal(first, 1, 2).fill_(-math.inf)
        if valid is not None:
            rows.masked_fill_(~valid[:, None], -math.inf)
        highest[:, some] = rows.amax(-1)
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
