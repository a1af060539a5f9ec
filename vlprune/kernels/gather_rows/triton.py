"""``gather_rows`` as one launch: a program copies a piece of one row of one tensor."""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 4
"""Tensors in one launch."""
BLOCK = 2048
"""Elements that a program copies, at most."""


def supports(tensors: Sequence[Tensor], rows: Tensor) -> bool:
    return 0 < len(tensors) <= MOST and all(tensor.ndim >= 2 and not tensor.is_complex() for tensor in tensors)


@triton.jit
def _piece(source, target, rows, sample, place, length, stride_sample, stride_row, width, piece, BLOCK: tl.constexpr):
    row = tl.maximum(tl.load(rows + sample * length + place), 0).to(tl.int64)
    within = piece * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + sample.to(tl.int64) * stride_sample + row * stride_row + within, mask=within < width)
    tl.store(target + (sample * length + place).to(tl.int64) * width + within, values, mask=within < width)


@triton.jit
def _gather_rows(
    rows,
    length,
    source_0,
    source_1,
    source_2,
    source_3,
    target_0,
    target_1,
    target_2,
    target_3,
    samples_0,
    samples_1,
    samples_2,
    samples_3,
    strides_0,
    strides_1,
    strides_2,
    strides_3,
    width_0,
    width_1,
    width_2,
    width_3,
    end_0,
    end_1,
    end_2,
    BLOCK: tl.constexpr,
):
    place, piece, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if piece < end_0:
        _piece(source_0, target_0, rows, sample, place, length, samples_0, strides_0, width_0, piece, BLOCK)
    elif piece < end_1:
        _piece(source_1, target_1, rows, sample, place, length, samples_1, strides_1, width_1, piece - end_0, BLOCK)
    elif piece < end_2:
        _piece(source_2, target_2, rows, sample, place, length, samples_2, strides_2, width_2, piece - end_1, BLOCK)
    else:
        _piece(source_3, target_3, rows, sample, place, length, samples_3, strides_3, width_3, piece - end_2, BLOCK)


def gather_rows(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """See :func:`vlprune.kernels.gather_rows`."""
    batch, length = rows.shape
    out = [tensor.new_empty(batch, length, *tensor.shape[2:]) for tensor in tensors]
    sources = [_rows(tensor) for tensor in tensors]
    targets = [_rows(tensor) for tensor in out]
    widths = [source.shape[2] for source in sources]
    if batch * length * sum(widths) == 0:
        return out
    block = min(BLOCK, triton.next_power_of_2(max(widths)))
    missing = MOST - len(sources)
    sources, targets, widths = sources + sources[:1] * missing, targets + targets[:1] * missing, widths + [0] * missing
    ends = [0]
    for width in widths:
        ends.append(ends[-1] + triton.cdiv(width, block))
    samples = [source.stride(0) if source.shape[0] > 1 else 0 for source in sources]
    strides = [source.stride(1) for source in sources]
    grid = (length, ends[-1], batch)
    with torch.cuda.device_of(rows):  # Triton launches on the current device, wherever its arguments are
        _gather_rows[grid](rows.contiguous(), length, *sources, *targets, *samples, *strides, *widths, *ends[1:4], BLOCK=block)
    return out


def _rows(tensor: Tensor) -> Tensor:
    """``(samples, rows, width)`` whose last dimension is dense; a view wherever there is one."""
    flat = tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None]
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    return flat if flat.stride(2) == 1 or flat.shape[2] == 1 else flat.contiguous()
