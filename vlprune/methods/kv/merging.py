"""Entries that leave the cache, merged into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels import bipartite_match
from vlprune.method import Merge, Mixture


def nearest(keys: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each entry ``(heads, N)`` would go, of ``keys (heads, N, D)``, if those at ``keep (heads, T)`` stay.

    Returns the cosine with the kept key that is most alike, which one of ``keep`` that is, and which entries stay; these
    are their own.
    """
    targets = keys.gather(1, keep[..., None].expand(-1, -1, keys.shape[-1]))
    likeness, target = bipartite_match(keys, targets)
    own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    stays = torch.zeros_like(target, dtype=torch.bool).scatter(1, keep, True)
    return likeness.float(), target.scatter(1, keep, own), stays


def average(target: Tensor) -> Merge:
    """Kept entries become the mean of themselves and of those that go to them, ``target (heads, N)``, -1 for lost ones."""
    return Merge(target)


def pivot(target: Tensor, stays: Tensor, count: int) -> Merge:
    """Kept entries become the mean of themselves and of the midpoints between them and each that goes to them.

    Half of each midpoint is the kept entry, so with n of them it weighs 1 + n / 2, and each of the others 1 / 2.
    """
    half = 0.5 * (~stays)
    come = torch.zeros(*target.shape[:-1], count, device=target.device).scatter_add(-1, target, half)
    return Merge(target, torch.where(stays, 1 + come.gather(-1, target), half))


def weighted(target: Tensor, stays: Tensor, likeness: Tensor, count: int) -> Mixture:
    """As :func:`average`, but with those that go to a kept entry times their cosine with it."""
    slots = torch.arange(count, device=target.device)[:, None]
    member = (target[..., None, :] == slots).float()
    factors = torch.where(stays, 1.0, likeness)[..., None, :]
    return Mixture(member * factors / member.sum(-1, keepdim=True))
