"""Greedy max-min diversity: every point chosen is the one farthest from those chosen before."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import on_triton
from vlprune.kernels.farthest_points import reference


def farthest_points(
    features: Tensor, count: int, start: Tensor | None = None, valid: Tensor | None = None, rounded: bool = False
) -> Tensor:
    """Chooses ``count`` points of every sample, each as far as possible from the nearest one chosen before it.

    The distance is 1 - cosine. A row of zeros has the cosine 0 to everything.

    Args:
        features: ``(B, N, D)``, half precision or float32; any strides.
        count: how many to choose.
        start: ``(B,)`` int64 in [0, N), the first point of each sample, as k-centre takes it. By default the loneliest, whose
            nearest other point is farthest: DivPrune's rule.
        valid: ``(B, N)`` bool, the points that exist, where samples have different numbers of them. All do by default. Others
            are neither chosen, unless as ``start``, nor neighbours.
        rounded: unit rows, cosines and distances are rounded to the dtype of ``features``, as in DivPrune's published
            numbers (float16). Many distances become equal then. By default products of half precision are kept in float32.

    Returns:
        ``(B, count)`` int64 in the order chosen; -1 once a sample has no more valid points. No point comes twice.

        The lowest index wins among equal distances. NaN counts as lowest: points with a NaN or an infinity come after all
        others, by index, and no distance to them counts.

    Extra memory: the matrices of cosines for as many samples as fit into 256 MB (one sample of N <= 8192 does), from which
    a round needs no more than a row. Samples with more points than that have no matrix, but a product of the features with
    the last point in every round, in PyTorch on every device. Linear in N beside that.

    On a GPU the rounds of a launch's samples are one launch, one program a sample: distances stay in its registers, and no
    program reads what another wrote.
    """
    return torch.ops.vlprune.farthest_points(features, count, start, valid, rounded)


@torch.library.custom_op("vlprune::farthest_points", mutates_args=())
def _operator(features: Tensor, count: int, start: Tensor | None, valid: Tensor | None, rounded: bool) -> Tensor:
    rounds = None
    if on_triton(features):
        from vlprune.kernels.farthest_points import triton

        if triton.supports(features):
            rounds = triton.rounds
    return reference.farthest_points(features, count, start, valid, rounded, rounds)


@_operator.register_fake
def _(features: Tensor, count: int, start: Tensor | None, valid: Tensor | None, rounded: bool) -> Tensor:
    return features.new_empty(features.shape[0], count, dtype=torch.int64)
