"""The rounds of ``farthest_points`` as one launch: a program holds a sample's distances in registers from first to last."""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS

MOST = 8192
"""Points that fit into the registers of a program, and whose matrix the reference keeps."""


def supports(features: Tensor) -> bool:
    return features.dtype in FLOATS and 0 < features.shape[1] <= MOST


@triton.jit
def _rounds(matrix, nearest, first, chosen, points, count, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    # The highest cosine of each point to one chosen: inf for those chosen, for those that are not valid and beyond the last.
    closest = tl.load(nearest + sample * points + offsets, mask=offsets < points, other=float("inf"))
    point = tl.load(first + sample).to(tl.int32)
    for number in range(count):
        tl.store(chosen + sample * count + number, point)
        row = matrix + (sample * points + point) * points
        cosines = tl.load(row + offsets, mask=offsets < tl.where(point >= 0, points, 0), other=float("-inf"))
        closest = tl.where(offsets == point, float("inf"), tl.maximum(closest, cosines))
        value, place = tl.min(closest, axis=0, return_indices=True, return_indices_tie_break_left=True)
        point = tl.where(value == float("inf"), -1, place)


def rounds(matrix: Tensor, nearest: Tensor, first: Tensor, count: int) -> Tensor:
    """See :func:`vlprune.kernels.farthest_points.reference.rounds`."""
    batch, points = nearest.shape
    chosen = torch.empty(batch, count, dtype=torch.int64, device=matrix.device)
    block = triton.next_power_of_2(points)
    matrix, nearest, first = matrix.contiguous(), nearest.contiguous(), first.contiguous()
    with torch.cuda.device_of(matrix):  # Triton launches on the current device, wherever its arguments are
        _rounds[(batch,)](
            matrix, nearest, first, chosen, points, count,
            BLOCK=block, num_warps=min(16, max(4, block // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return chosen
