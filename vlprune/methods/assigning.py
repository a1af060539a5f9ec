"""From which row goes into which to the assignment that a block method gives."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.image import top


def numbered(into: Tensor, rank: Tensor | None = None) -> Tensor:
    """The output row ``(B, N)`` of every row, -1 for one that is dropped.

    ``into (B, N)`` int64: the row that a row is merged into, itself for one that stays, -1 for one that is dropped. Rows that
    stay follow each other as they do now, or by ``rank (B, N)``, lowest first.
    """
    stays = into == torch.arange(into.shape[1], device=into.device)
    if rank is None:
        place = stays.cumsum(1) - 1
    else:
        last = torch.where(stays, rank, torch.iinfo(rank.dtype).max)
        place = last.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(into < 0, -1, place.gather(1, into.clamp(min=0)))


def staying(rows: Tensor) -> Tensor:
    """Every row for itself, ``(B, N)`` int64, for as many rows as ``rows (B, N, ...)`` has."""
    return torch.arange(rows.shape[1], device=rows.device).repeat(rows.shape[0], 1)


def taken(rows: Tensor, index: Tensor) -> Tensor:
    """``rows (B, N, d)`` at ``index (B, n)``: ``(B, n, d)``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def lowest(scores: Tensor, prefix: int, leaving: int) -> Tensor:
    """``(B, N)`` bool: the ``leaving`` lowest ``scores (B, N)``, protected rows left out; of equal ones the later rows."""
    kept = top(scores[:, prefix:], scores.shape[1] - prefix - leaving) + prefix
    leaves = torch.ones_like(scores, dtype=torch.bool).scatter(1, kept, False)
    leaves[:, :prefix] = False
    return leaves


def leaving(assigned: Tensor, prefix: int) -> Tensor:
    """``(B, N)`` bool: rows at even places that go into one at an odd place, in an assignment by ToMe's pairs."""
    places = torch.arange(assigned.shape[1], device=assigned.device)
    even = (places % 2 == 0) & (places >= prefix)
    members = torch.zeros_like(assigned).scatter_add(1, assigned, torch.ones_like(assigned))
    return even & (members.gather(1, assigned) > 1)
