"""Greedy selection from a determinantal point process: relevant points that are unlike each other."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import on_triton
from vlprune.kernels.dpp_map import reference


def dpp_map(kernel: Tensor, count: int, valid: Tensor | None = None, floor: float = 1e-10) -> Tensor:
    """Chooses ``count`` points of every sample, each the one that multiplies the determinant of those chosen by most.

    That factor is the point's residual ``d_i``: its diagonal entry at first, and after ``j`` is chosen in round ``t``

        c_t[i] = (kernel[j, i] - sum over s < t of c_s[j] c_s[i]) / sqrt(d_j),    d_i -= c_t[i] ** 2

    which is an incremental Cholesky decomposition (Chen, Zhang and Zhou 2018).

    Args:
        kernel: ``(B, N, N)`` symmetric and positive semi-definite, float32 (halves are read as float32); any strides.
        count: how many to choose.
        valid: ``(B, N)`` bool, the points that exist, where samples have different numbers of them. All do by default.
        floor: a residual at most this large is nothing, or rounding. Once it is the largest one, the kernel's rank is used
            up: the points that are still missing follow in the order of their residuals, which no longer change.

    Returns:
        ``(B, count)`` int64 in the order chosen; -1 once a sample has no more valid points. No point comes twice.

        The lowest index wins among equal residuals. NaN and -inf count as lowest among valid points. Kernel and reference
        add up the factors in orders of their own: of residuals that differ by rounding only, each may take another first.

    Residuals and factors are float32 (float64 for float64). Extra memory: the factors, ``(B, count, N)``.

    On a GPU one function does the rounds in either of two ways, and in both no program waits for another, so that nothing
    depends on which of them run at the same time. A small sample (N count <= 2^19, N <= 4096) belongs to one program, and
    all rounds are one launch. The factors of a larger one are more than a single multiprocessor reads in time: its points
    are split among programs, a round is one launch, and each leaves the best of its points to the next. A barrier across
    the programs of a launch would spare those launches, at the price of a deadlock where they do not all run at once.
    """
    return torch.ops.vlprune.dpp_map(kernel, count, valid, floor)


@torch.library.custom_op("vlprune::dpp_map", mutates_args=())
def _operator(kernel: Tensor, count: int, valid: Tensor | None, floor: float) -> Tensor:
    if on_triton(kernel):
        from vlprune.kernels.dpp_map import triton

        if triton.supports(kernel):
            return triton.dpp_map(kernel, count, valid, floor)
    return reference.dpp_map(kernel, count, valid, floor)


@_operator.register_fake
def _(kernel: Tensor, count: int, valid: Tensor | None, floor: float) -> Tensor:
    return kernel.new_empty(kernel.shape[0], count, dtype=torch.int64)
