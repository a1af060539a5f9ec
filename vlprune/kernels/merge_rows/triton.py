"""``merge_rows`` as sorting and one launch: a program sums a slice of the members of one segment."""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS

WIDTH = 512
"""Elements of a row that a program sums, at most."""


def supports(values: Tensor, target: Tensor, count: int) -> bool:
    there_is_something = values.numel() > 0 and count > 0
    return there_is_something and values.dtype in FLOATS and values.shape[0] < 2**16 and values.device == target.device


@triton.jit(do_not_specialize=["length", "count"])
def _merge_rows(
    values,
    order,
    starts,
    weight,
    means,
    mass,
    length,
    count,
    width,
    stride_sample,
    stride_row,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``order (B, length)``: rows, segment after segment; those of a segment lie between two of ``starts (B, count + 1)``."""
    segment, piece, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.load(starts + sample * (count + 1) + segment)
    last = tl.load(starts + sample * (count + 1) + segment + 1)
    within = piece * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < last
        row = tl.load(order + sample * length + place, mask=inside, other=0).to(tl.int64)
        own = (
            tl.load(weight + sample * length + row, mask=inside, other=0).to(tl.float32) if WEIGHTED else inside.to(tl.float32)
        )
        source = values + sample * stride_sample + row[:, None] * stride_row + within[None, :]
        rows = tl.load(source, mask=inside[:, None] & (within < width)[None, :], other=0).to(tl.float32)
        sums += rows * own[:, None]
        weights += own
    total = tl.sum(weights, 0)
    mean = tl.where(total == 0, 0.0, tl.sum(sums, 0) / tl.where(total == 0, 1.0, total))
    target = sample * count + segment
    tl.store(means + target * width + within, mean.to(means.dtype.element_ty), mask=within < width)
    if piece == 0:
        tl.store(mass + target, total)


def merge_rows(values: Tensor, target: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """See :func:`vlprune.kernels.merge_rows`."""
    batch, length, width = values.shape
    values = values if values.stride(2) == 1 or width == 1 else values.contiguous()
    means, mass = values.new_empty(batch, count, width), values.new_empty(batch, count, dtype=torch.float32)
    # A stable sort: members of a segment are summed in the order of their rows, each time the same. It keeps the strides
    # of what it sorts, and the kernel reads dense rows.
    segments, order = target.to(torch.int32).contiguous().sort(dim=1, stable=True)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=target.device).repeat(batch, 1)
    starts = torch.searchsorted(segments, bounds, out_int32=True)
    rows = min(max(triton.next_power_of_2(triton.cdiv(length, count)), 2), 16)
    block = min(triton.next_power_of_2(width), WIDTH)
    grid = (count, triton.cdiv(width, block), batch)
    sizes = length, count, width, values.stride(0), values.stride(1)
    weight = None if weight is None else weight.contiguous()
    tuning = {"WEIGHTED": weight is not None, "ROWS": rows, "WIDTH": block}
    with torch.cuda.device_of(values):
        _merge_rows[grid](values, order, starts, weight, means, mass, *sizes, **tuning)
    return means, mass
