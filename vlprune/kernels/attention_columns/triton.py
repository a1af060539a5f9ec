"""``attention_columns`` in two launches: the log-sum-exp of every query, then the sums of every key.

A program of the first owns queries and goes over keys, one of the second owns keys and goes over queries, both within a head.
So each number has one writer, and the result is the same every time. Nothing of the map leaves the registers.
"""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels import attention_tiles as tiles
from vlprune.kernels.attention_tiles import load, scores

LOG2_E = tl.constexpr(math.log2(math.e))
SCAN = 4096
"""Weights that a program looks at, at a time, to find where they begin and end."""


def supports(query: Tensor, key: Tensor) -> bool:
    return tiles.supports(query, key)


@triton.jit
def _sum_more(
    top,
    total,
    left,
    left_tail,
    row,
    key,
    sample,
    shared,
    start,
    length,
    key_0,
    key_1,
    key_2,
    valid,
    valid_0,
    valid_1,
    shift,
    factor,
    cap,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    KEYS: tl.constexpr,
    BORDER: tl.constexpr,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Maximum and sum of each query with the keys from ``start``. ``BORDER``: the queries may not see all of them."""
    place = start + tl.arange(0, KEYS)
    present = place < length
    right, right_tail = load(key, sample, shared, place, present, key_0, key_1, key_2, WIDTH, SIZE, TAIL, ALIGN)
    values = scores(left, left_tail, right, right_tail, factor, cap, TAIL, SOFTCAP)
    if BORDER:
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (place[None, :] <= row[:, None] + shift)
        values = tl.where(seen, values, -float("inf"))
    if VALID:
        real = tl.load(valid + sample.to(tl.int64) * valid_0 + place * valid_1, mask=present, other=0) != 0
        values = tl.where(real[None, :], values, -float("inf"))
    higher = tl.maximum(top, tl.max(values, 1))
    level = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, total * tl.exp2(top - level) + tl.sum(tl.exp2(values - level[:, None]), 1)


@triton.jit
def _log_sums(
    query,
    key,
    weights,
    valid,
    out,
    query_0,
    query_1,
    query_2,
    key_0,
    key_1,
    key_2,
    weights_0,
    weights_1,
    valid_0,
    valid_1,
    group,
    heads,
    count,
    length,
    shift,
    factor,
    cap,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Log-sum-exp of ``QUERIES`` queries of a head, infinite where there is nothing to sum or nothing counts."""
    # The last queries, which see the most keys, begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sample = tl.program_id(1), tl.program_id(2)
    row = block * QUERIES + tl.arange(0, QUERIES)
    weight = tl.load(weights + sample.to(tl.int64) * weights_0 + row * weights_1, mask=row < count, other=0.0)
    counts = weight != 0
    left, left_tail = load(query, sample, head, row, counts, query_0, query_1, query_2, WIDTH, SIZE, TAIL, ALIGN)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    end = block * 0 + length
    whole = end
    if CAUSAL:
        end = tl.minimum(end, tl.minimum((block + 1) * QUERIES, count) + shift)
        whole = tl.minimum(whole, block * QUERIES + shift + 1)
    # Keys before `whole` are seen by all queries of the block, from `end` on by none.
    end = tl.where(tl.max(counts.to(tl.int32)) > 0, tl.maximum(end, 0), 0)
    whole = tl.minimum(end, tl.maximum(whole, 0)) // KEYS * KEYS
    for start in range(0, whole, KEYS):
        top, total = _sum_more(
            top, total, left, left_tail, row, key, sample, head // group, start, length, key_0, key_1, key_2,
            valid, valid_0, valid_1, shift, factor, cap, WIDTH, SIZE, TAIL, ALIGN, KEYS, False, CAUSAL, VALID, SOFTCAP,
        )  # fmt: skip
    for start in range(whole, end, KEYS):
        top, total = _sum_more(
            top, total, left, left_tail, row, key, sample, head // group, start, length, key_0, key_1, key_2,
            valid, valid_0, valid_1, shift, factor, cap, WIDTH, SIZE, TAIL, ALIGN, KEYS, True, CAUSAL, VALID, SOFTCAP,
        )  # fmt: skip
    level = tl.where(top == -float("inf"), 0.0, top)
    found = tl.where(total == 0, float("inf"), (level + tl.log2(total)) / LOG2_E)
    tl.store(out + (sample * heads + head).to(tl.int64) * count + row, found, mask=row < count)


@triton.jit
def _counted(weights, weights_1, count, SCAN: tl.constexpr):
    """From where to where there are weights other than zero."""
    first = tl.full((), 0, tl.int32) + count
    last = tl.full((), 0, tl.int32)
    for start in range(0, count, SCAN):
        row = start + tl.arange(0, SCAN)
        counts = tl.load(weights + row * weights_1, mask=row < count, other=0.0) != 0
        first = tl.minimum(first, tl.min(tl.where(counts, row, count)))
        last = tl.maximum(last, tl.max(tl.where(counts, row + 1, 0)))
    return first, last


@triton.jit
def _add_more(
    total,
    left,
    left_tail,
    place,
    query,
    weights,
    lse,
    sample,
    head,
    heads,
    start,
    count,
    query_0,
    query_1,
    query_2,
    weights_1,
    shift,
    factor,
    cap,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    QUERIES: tl.constexpr,
    BORDER: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Sums of the keys with the queries from ``start``. ``BORDER``: these may not see all of the keys."""
    row = start + tl.arange(0, QUERIES)
    weight = tl.load(weights + row * weights_1, mask=row < count, other=0.0)
    counts = weight != 0
    right, right_tail = load(query, sample, head, row, row < count, query_0, query_1, query_2, WIDTH, SIZE, TAIL, ALIGN)
    values = scores(left, left_tail, right, right_tail, factor, cap, TAIL, SOFTCAP)
    level = tl.load(lse + row, mask=row < count, other=0.0)
    level = tl.where(level == -float("inf"), float("inf"), level) * LOG2_E
    seen = counts[None, :]
    if BORDER:
        seen = seen & (place[:, None] <= row[None, :] + shift)
    return total + tl.sum(tl.where(seen, tl.exp2(values - level[None, :]) * weight[None, :], 0.0), 1)


@triton.jit
def _attention_columns(
    query,
    key,
    weights,
    valid,
    lse,
    out,
    query_0,
    query_1,
    query_2,
    key_0,
    key_1,
    key_2,
    weights_0,
    weights_1,
    valid_0,
    valid_1,
    group,
    heads,
    count,
    length,
    shift,
    factor,
    cap,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SCAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Sums of ``KEYS`` keys of a head."""
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = block * KEYS + tl.arange(0, KEYS)
    present = place < length
    left, left_tail = load(key, sample, head // group, place, present, key_0, key_1, key_2, WIDTH, SIZE, TAIL, ALIGN)
    weights += sample.to(tl.int64) * weights_0
    lse += (sample * heads + head).to(tl.int64) * count
    first, last = _counted(weights, weights_1, count, SCAN)
    whole = first
    if CAUSAL:
        first = tl.maximum(first, block * KEYS - shift)
        whole = tl.maximum(first, tl.minimum(last, (block + 1) * KEYS - 1 - shift))
        whole = first + tl.cdiv(whole - first, QUERIES) * QUERIES
    # Queries before `first` see none of the keys, from `whole` on all.
    total = tl.zeros((KEYS,), tl.float32)
    if CAUSAL:
        for start in range(first, tl.minimum(whole, last), QUERIES):
            total = _add_more(
                total, left, left_tail, place, query, weights, lse, sample, head, heads, start, count,
                query_0, query_1, query_2, weights_1, shift, factor, cap, WIDTH, SIZE, TAIL, ALIGN, QUERIES, True, SOFTCAP,
            )  # fmt: skip
    for start in range(whole, last, QUERIES):
        total = _add_more(
            total, left, left_tail, place, query, weights, lse, sample, head, heads, start, count,
            query_0, query_1, query_2, weights_1, shift, factor, cap, WIDTH, SIZE, TAIL, ALIGN, QUERIES, False, SOFTCAP,
        )  # fmt: skip
    if VALID:
        real = tl.load(valid + sample.to(tl.int64) * valid_0 + place * valid_1, mask=present, other=0) != 0
        total = tl.where(real, total, 0.0)
    tl.store(out + (sample * heads + head).to(tl.int64) * length + place, total, mask=present)


def attention_columns(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    softcap: float | None,
    lse: Tensor | None,
) -> Tensor:
    """See :func:`vlprune.kernels.attention_columns`."""
    batch, heads, count, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    out = query.new_empty(batch, heads, length, dtype=torch.float32)
    if out.numel() == 0 or count == 0:
        return out.zero_()
    query, key, weights = tiles.dense(query), tiles.dense(key), weights.float()
    first, second = tiles.pieces(width)
    large, small, options = _plan(query.element_size(), first + second)
    constants = dict(
        WIDTH=width,
        SIZE=first,
        TAIL=second,
        ALIGN=tiles.alignment(query, key),
        CAUSAL=causal_shift is not None,
        VALID=valid is not None,
        SOFTCAP=softcap is not None,
        **options,
    )
    real = tiles.bytes_of(valid, query)
    strides = (*query.stride()[:3], *key.stride()[:3], *weights.stride(), *(valid.stride() if valid is not None else (0, 0)))
    # Scores in units of log 2, since a GPU takes powers of two.
    numbers = (causal_shift or 0, *tiles.factors(scaling, softcap, LOG2_E.value))
    rest = (*strides, heads // groups, heads, count, length, *numbers)
    with tiles.device_of(query):
        if lse is None:
            lse = query.new_empty(batch, heads, count, dtype=torch.float32)
            grid = (triton.cdiv(count, large), heads, batch)
            _log_sums[grid](query, key, weights, real, lse, *rest, QUERIES=large, KEYS=small, **constants)
        lse = lse.float().contiguous()
        scan = min(SCAN, triton.next_power_of_2(count))
        grid = (triton.cdiv(length, large), heads, batch)
        _attention_columns[grid](query, key, weights, real, lse, out, *rest, QUERIES=small, KEYS=large, SCAN=scan, **constants)
    return out


def _plan(bytes_each: int, width: int) -> tuple[int, int, dict[str, int]]:
    """Rows that a program owns, rows that it goes over at a time, and how it runs, for ``width`` elements of a size."""
    if bytes_each * width <= 128:
        return 128, 64, {"num_warps": 4, "num_stages": 3}
    if bytes_each * width <= 256:
        return 128, 64, {"num_warps": 8, "num_stages": 3}
    if bytes_each * width <= 512:
        return 64, 32, {"num_warps": 4, "num_stages": 2}
    return 32, 32, {"num_warps": 4, "num_stages": 1}
