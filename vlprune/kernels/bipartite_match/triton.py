"""``bipartite_match``: a program compares a block of sources with a range of targets, and a reduction joins the ranges."""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.bipartite_match.reference import inverse_norms
from vlprune.kernels.dispatch import FLOATS

PROGRAMS = 256
"""How many programs make a GPU busy: with few sources their targets are split among more."""


def supports(source: Tensor, target: Tensor) -> bool:
    fit = source.ndim == target.ndim == 3 and source.shape[::2] == target.shape[::2]
    return fit and source.dtype in FLOATS and source.dtype == target.dtype and target.device == source.device


@triton.jit
def _products(
    source, target, rows, columns, sources, targets, width, source_row, source_dim, target_row, target_dim,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``(BLOCK_S, BLOCK_T)`` float32 dot products of ``rows`` of the sources and ``columns`` of the targets."""
    sums = tl.zeros((BLOCK_S, BLOCK_T), dtype=tl.float32)
    left_row = source + rows.to(tl.int64)[:, None] * source_row
    right_row = target + columns.to(tl.int64)[None, :] * target_row
    for first in range(0, width, BLOCK_D):
        dims = first + tl.arange(0, BLOCK_D)
        there = dims < width
        left_there, right_there = (rows < sources)[:, None] & there[None, :], (columns < targets)[None, :] & there[:, None]
        left = tl.load(left_row + dims.to(tl.int64)[None, :] * source_dim, mask=left_there, other=0.0)
        right = tl.load(right_row + dims.to(tl.int64)[:, None] * target_dim, mask=right_there, other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    return sums


@triton.jit
def _bipartite_match(
    source,
    target,
    source_scale,
    target_scale,
    valid,
    best,
    index,
    sources,
    targets,
    width,
    source_sample,
    source_row,
    source_dim,
    target_sample,
    target_row,
    target_dim,
    length,
    NORMALISE: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    source += sample * source_sample
    target += sample * target_sample
    value = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
    place = tl.zeros((BLOCK_S,), dtype=tl.int32)
    for first in range(part * length, tl.minimum(part * length + length, targets), BLOCK_T):
        columns = first + tl.arange(0, BLOCK_T)
        scores = _products(
            source, target, rows, columns, sources, targets, width, source_row, source_dim, target_row, target_dim,
            BLOCK_S, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        if NORMALISE:  # the order of the reference: equal products give equal cosines
            scores *= tl.load(target_scale + sample * targets + columns, mask=columns < targets, other=0.0)[None, :]
            scores *= tl.load(source_scale + sample * sources + rows, mask=rows < sources, other=0.0)[:, None]
        there = columns < targets
        if VALID:
            there = there & (tl.load(valid + sample * targets + columns, mask=columns < targets, other=0) != 0)
        scores = tl.where(there[None, :] & (scores == scores), scores, float("-inf"))
        highest, nearest = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        place = tl.where(highest > value, first + nearest, place)
        value = tl.where(highest > value, highest, value)
    slot = (sample * tl.num_programs(1) + part) * sources + rows
    tl.store(best + slot, value, mask=rows < sources)
    tl.store(index + slot, place, mask=rows < sources)


def bipartite_match(source: Tensor, target: Tensor, normalise: bool, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`vlprune.kernels.bipartite_match`."""
    if source.dtype == torch.bfloat16 and not source.is_cuda:  # Triton's interpreter would multiply the bits as integers
        source, target = source.float(), target.float()
    (batch, sources, width), targets = source.shape, target.shape[1]
    block_s, block_t, block_d = _blocks(source, targets)
    length, parts = _split(batch * triton.cdiv(sources, block_s), targets, block_t)
    best = source.new_empty(batch, parts, sources, dtype=torch.float32)
    index = source.new_empty(batch, parts, sources, dtype=torch.int64)
    scales = (inverse_norms(source), inverse_norms(target)) if normalise else (best, best)
    mask = best if valid is None else valid.expand(batch, targets).contiguous().view(torch.uint8)
    if batch * sources:
        grid = (triton.cdiv(sources, block_s), parts, batch)
        with torch.cuda.device_of(source):  # Triton launches on the current device, wherever its arguments are
            _bipartite_match[grid](
                source, target, *scales, mask, best, index, sources, targets, width,
                *source.stride(), *target.stride(), length,
                NORMALISE=normalise, VALID=valid is not None, BLOCK_S=block_s, BLOCK_T=block_t, BLOCK_D=block_d,
                num_warps=4, num_stages=3, enable_fp_fusion=True,
            )  # fmt: skip
    if parts == 1:
        return best[:, 0], index[:, 0]
    # Parts are in the order of their targets and the first maximum wins: still the lowest index among equals.
    best, part = best.max(1)
    return best, index.gather(1, part[:, None])[:, 0]


def _blocks(source: Tensor, targets: int) -> tuple[int, int, int]:
    """Sources, targets and dimensions of a step. float32 goes without tensor cores, and takes twice the shared memory."""
    most_targets, most_dims = (64, 32) if source.dtype == torch.float32 else (128, 64)
    wanted = ((source.shape[1], 64), (targets, most_targets), (source.shape[2], most_dims))
    block_s, block_t, block_d = (min(most, max(16, triton.next_power_of_2(size))) for size, most in wanted)
    return block_s, block_t, block_d


def _split(programs: int, targets: int, block: int) -> tuple[int, int]:
    """Targets of a part, a multiple of ``block``, and the number of parts, at least 1."""
    blocks = max(1, triton.cdiv(targets, block))
    parts = min(blocks, max(1, PROGRAMS // max(1, programs)))
    length = triton.cdiv(blocks, parts) * block
    return length, max(1, triton.cdiv(targets, length))
