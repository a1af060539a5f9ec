"""``dpp_map``: all rounds of a small sample in one launch, or one round of a large one, split among programs."""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS
from vlprune.kernels.dpp_map.reference import LEAST, first_residual

ALONE = 2**19
"""Factors (points times rounds) up to which one program does a sample's rounds faster than one launch does a round."""
MOST = 4096
"""Points of a sample that a program takes alone, at most."""
PIECE = 64
"""Points of a program that is not alone."""


def supports(kernel: Tensor) -> bool:
    return kernel.dtype in FLOATS and kernel.ndim == 3 and kernel.shape[1] == kernel.shape[2]


@triton.jit
def _factor(
    row, factors, point, value, number, points, column, floor, offsets, there, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    """``(BLOCK,)`` of the factor of round ``number``, in which ``point`` of residual ``value`` is chosen."""
    sums = tl.zeros((STEP, BLOCK), dtype=tl.float32)
    number = tl.where(point >= 0, number, 0)
    for first in range(0, number, STEP):
        rounds = first + tl.arange(0, STEP)
        before = rounds < number
        lines = factors + rounds.to(tl.int64) * points
        weights = tl.load(lines + point, mask=before, other=0.0)
        sums += weights[:, None] * tl.load(lines[:, None] + offsets[None, :], mask=before[:, None] & there[None, :], other=0.0)
    entries_there = offsets < tl.where(point >= 0, points, 0)
    entries = tl.load(row + offsets.to(tl.int64) * column, mask=entries_there, other=0.0).to(tl.float32)
    gains = value > floor
    # Rounded to the nearest as in PyTorch: the approximations that are the default differ in the last bit.
    root = tl.sqrt_rn(tl.where(gains, value, 1.0))
    return tl.where(gains, tl.div_rn(entries - tl.sum(sums, axis=0), tl.zeros_like(entries) + root), 0.0)


@triton.jit(do_not_specialize=["begin", "end"])
def _rounds(
    kernel,
    residual,
    factors,
    best,
    best_index,
    chosen,
    begin,
    end,
    count,
    points,
    floor,
    kernel_sample,
    kernel_row,
    kernel_column,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds ``begin`` to ``end`` of a sample: one alone if the sample has several parts."""
    part, parts, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    there = offsets < points
    kernel += sample * kernel_sample
    factors += sample * count * points
    line = factors + points * (begin + sample * 0)  # of round begin, in 64 bits
    # The best of every part, left by the launch before. Two sets in turn, for other programs may still be reading.
    which = tl.arange(0, PARTS)
    read = ((begin % 2) * tl.num_programs(1) + sample) * parts
    value, winner = tl.max(tl.load(best + read + which, mask=which < parts, other=float("-inf")), axis=0, return_indices=True)
    point = tl.load(best_index + read + winner)
    left = tl.load(residual + sample * points + offsets, mask=there, other=float("-inf"))
    for number in range(begin, end):
        point = tl.where(value == float("-inf"), -1, point)
        tl.store(chosen + sample * count + number, point, mask=part == 0)
        row = kernel + point.to(tl.int64) * kernel_row
        factor = _factor(row, factors, point, value, number, points, kernel_column, floor, offsets, there, STEP, BLOCK)
        tl.store(line + offsets, factor, mask=there)
        line += points
        tl.debug_barrier()  # the next round reads what other threads of the program have just written
        changed = left - factor * factor
        changed = tl.where(changed >= LEAST, changed, LEAST)
        left = tl.where((left == float("-inf")) | (offsets == point), float("-inf"), changed)
        value, place = tl.max(left, axis=0, return_indices=True)
        point = part * BLOCK + place
    tl.store(residual + sample * points + offsets, left, mask=there)
    write = ((end % 2) * tl.num_programs(1) + sample) * parts + part
    tl.store(best + write, value)
    tl.store(best_index + write, point)


def dpp_map(kernel: Tensor, count: int, valid: Tensor | None, floor: float) -> Tensor:
    """See :func:`vlprune.kernels.dpp_map`."""
    batch, points, _ = kernel.shape
    chosen = torch.full((batch, count), -1, dtype=torch.int64, device=kernel.device)
    if chosen.numel() * points == 0:
        return chosen
    residual = first_residual(kernel, valid)
    alone = points <= MOST and points * count <= ALONE
    block, step, warps = _shape(points) if alone else (PIECE, PIECE, 4)
    parts = triton.cdiv(points, block)
    best, best_index = _first_best(residual, parts)
    factors = residual.new_empty(batch, count, points)
    rounds = count if alone else 1
    with torch.cuda.device_of(kernel):  # Triton launches on the current device, wherever its arguments are
        for begin in range(0, count, rounds):
            _rounds[(parts, batch)](
                kernel, residual, factors, best, best_index, chosen, begin, begin + rounds, count, points, floor,
                *kernel.stride(), LEAST=LEAST, PARTS=max(2, triton.next_power_of_2(parts)), STEP=step, BLOCK=block,
                num_warps=warps,
                enable_fp_fusion=False,  # a square is rounded before it is subtracted, as in PyTorch
            )  # fmt: skip
    return chosen


def _shape(points: int) -> tuple[int, int, int]:
    """Points, rounds read at a time, and warps of a program that has a sample for itself."""
    block = max(16, triton.next_power_of_2(points))
    warps = 16 if block >= 1024 else 8
    return block, max(1, warps * 1024 // block), warps


def _first_best(residual: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """``(2, B, parts)`` values and indices of the best points: the whole sample's is that of part 0 before round 0."""
    value, index = residual.max(1)
    best = residual.new_full((2, residual.shape[0], parts), -math.inf)
    best[0, :, 0] = value
    best_index = torch.zeros(best.shape, dtype=torch.int32, device=best.device)
    best_index[0, :, 0] = index
    return best, best_index
