"""``attention_rows`` in two launches: maximum and sum of every row, piece by piece of the keys, then the rows themselves.

A program takes the rows of all heads that share a key as one tile, so that a key is loaded once and the tensor cores are
filled: a tile is ``(heads of the group, rows)``, both padded to powers of two, flattened. Both launches are divided along the
keys, since a few rows alone would not occupy a GPU.
"""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels import attention_tiles as tiles
from vlprune.kernels.attention_tiles import load, scores

WIDEST_GROUP = 64
"""Heads that share a key, at most."""
TILE = 64
"""Queries in a tile, at most, and keys."""
LARGE = 512
"""Bytes of a head beyond which tiles are half as high and as wide, so that they fit into any GPU's shared memory."""
PROGRAMS = 512
"""As many should run at a time; the keys are divided until they do."""
PARTS = 32
"""Pieces of the keys, at most."""


def supports(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    group = query.shape[1] // max(1, key.shape[1])
    known = mask is None or mask.dtype in (torch.bool, *tiles.FLOATS)
    return known and tiles.supports(query, key) and 0 < group <= WIDEST_GROUP


@triton.jit
def _tile_rows(rows, sample, block, count, group, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Of each line of a tile: head within the group, place in ``rows``, whether it is one, and the query, negative if none."""
    line = tl.arange(0, GROUP * ROWS)
    member = line // ROWS
    place = block * ROWS + line % ROWS
    exists = (member < group) & (place < count)
    row = tl.load(rows + sample.to(tl.int64) * count + place, mask=exists, other=-1).to(tl.int32)
    return member, place, exists, row


@triton.jit
def _hide(
    values,
    sample,
    head,
    row,
    place,
    present,
    shift,
    valid,
    valid_0,
    valid_1,
    mask,
    mask_0,
    mask_1,
    mask_2,
    mask_3,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    MASK: tl.constexpr,
):
    """The scores ``values`` with minus infinity wherever a key, at ``place``, is not seen."""
    seen = present
    if VALID:
        seen = seen & (tl.load(valid + sample.to(tl.int64) * valid_0 + place * valid_1, mask=present, other=0) != 0)
    if MASK != "none":
        lines = head.to(tl.int64) * mask_1 + row.to(tl.int64) * mask_2
        at = mask + sample.to(tl.int64) * mask_0 + lines[:, None] + place.to(tl.int64)[None, :] * mask_3
        given = tl.load(at, mask=(row >= 0)[:, None] & present[None, :], other=0)
        if MASK == "bool":
            values = tl.where(given != 0, values, -float("inf"))
        else:
            values += given.to(tl.float32)
    values = tl.where(seen[None, :], values, -float("inf"))
    if CAUSAL:
        values = tl.where(place[None, :] <= row[:, None] + shift, values, -float("inf"))
    return values


@triton.jit
def _statistics(
    query,
    key,
    rows,
    valid,
    mask,
    tops,
    totals,
    query_0,
    query_1,
    query_2,
    key_0,
    key_1,
    key_2,
    valid_0,
    valid_1,
    mask_0,
    mask_1,
    mask_2,
    mask_3,
    groups,
    group,
    count,
    length,
    parts,
    span,
    shift,
    factor,
    cap,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Of every row the maximum over ``span`` keys, and the sum of the exponentials relative to it."""
    part, block = tl.program_id(0), tl.program_id(1)
    sample, shared = tl.program_id(2) // groups, tl.program_id(2) % groups
    member, number, exists, row = _tile_rows(rows, sample, block, count, group, GROUP, ROWS)
    head = shared * group + member
    left, left_tail = load(query, sample, head, row, row >= 0, query_0, query_1, query_2, WIDTH, SIZE, TAIL, ALIGN)
    top = tl.full((GROUP * ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP * ROWS,), tl.float32)
    end = tl.minimum(part * span + span, length)
    if CAUSAL:
        end = tl.minimum(end, tl.max(row) + shift + 1)
    for start in range(part * span, end, KEYS):
        place = start + tl.arange(0, KEYS)
        present = place < length
        right, right_tail = load(key, sample, shared, place, present, key_0, key_1, key_2, WIDTH, SIZE, TAIL, ALIGN)
        values = scores(left, left_tail, right, right_tail, factor, cap, TAIL, SOFTCAP)
        values = _hide(
            values, sample, head, row, place, present, shift, valid, valid_0, valid_1,
            mask, mask_0, mask_1, mask_2, mask_3, CAUSAL, VALID, MASK,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(values, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - level) + tl.sum(tl.exp(values - level[:, None]), 1)
        top = higher
    at = ((sample * groups * group + head).to(tl.int64) * count + number) * parts + part
    tl.store(tops + at, top, mask=exists)
    tl.store(totals + at, total, mask=exists)


@triton.jit
def _whole(tops, totals, line, exists, parts, PARTS: tl.constexpr):
    """Maximum and sum of whole rows, harmless where there is nothing in them."""
    part = tl.arange(0, PARTS)
    at, mask = line[:, None] * parts + part[None, :], exists[:, None] & (part < parts)[None, :]
    top = tl.load(tops + at, mask=mask, other=-float("inf"))
    level = tl.max(top, 1)
    level = tl.where(level == -float("inf"), 0.0, level)
    total = tl.sum(tl.load(totals + at, mask=mask, other=0.0) * tl.exp(top - level[:, None]), 1)
    return level, tl.where(total == 0, 1.0, total)


@triton.jit
def _attention_rows(
    query,
    key,
    rows,
    valid,
    mask,
    tops,
    totals,
    out,
    query_0,
    query_1,
    query_2,
    key_0,
    key_1,
    key_2,
    valid_0,
    valid_1,
    mask_0,
    mask_1,
    mask_2,
    mask_3,
    groups,
    group,
    count,
    length,
    parts,
    shift,
    factor,
    cap,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """A tile of the result: of one group of heads, or with ``REDUCE`` the mean over all."""
    block = tl.program_id(1)
    place = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    present = place < length
    # Reduced, a program goes over all groups of its sample, else it has one.
    if REDUCE:
        sample, first, last = tl.program_id(2), 0, groups
    else:
        sample, first = tl.program_id(2) // groups, tl.program_id(2) % groups
        last = first + 1
    mean = tl.zeros((ROWS, KEYS), tl.float32)
    for shared in range(first, last):
        member, number, exists, row = _tile_rows(rows, sample, block, count, group, GROUP, ROWS)
        head = shared * group + member
        left, left_tail = load(query, sample, head, row, row >= 0, query_0, query_1, query_2, WIDTH, SIZE, TAIL, ALIGN)
        right, right_tail = load(key, sample, shared, place, present, key_0, key_1, key_2, WIDTH, SIZE, TAIL, ALIGN)
        values = scores(left, left_tail, right, right_tail, factor, cap, TAIL, SOFTCAP)
        values = _hide(
            values, sample, head, row, place, present, shift, valid, valid_0, valid_1,
            mask, mask_0, mask_1, mask_2, mask_3, CAUSAL, VALID, MASK,
        )  # fmt: skip
        line = (sample * groups * group + head).to(tl.int64) * count + number
        level, total = _whole(tops, totals, line, exists, parts, PARTS)
        values = tl.where((row >= 0)[:, None], tl.exp(values - level[:, None]) / total[:, None], 0.0)
        if REDUCE:
            mean += tl.sum(tl.reshape(values, (GROUP, ROWS, KEYS)), 0)
        else:
            tl.store(out + line[:, None] * length + place[None, :], values, mask=exists[:, None] & present[None, :])
    if REDUCE:
        number = block * ROWS + tl.arange(0, ROWS)
        line = sample.to(tl.int64) * count + number
        keep = (number < count)[:, None] & present[None, :]
        tl.store(out + line[:, None] * length + place[None, :], mean / (groups * group), mask=keep)


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    reduce_heads: bool,
) -> Tensor:
    """See :func:`vlprune.kernels.attention_rows`."""
    batch, heads, queries, width = query.shape
    groups, length, count = key.shape[1], key.shape[2], rows.shape[1]
    out = query.new_empty(batch, *(() if reduce_heads else (heads,)), count, length, dtype=torch.float32)
    if out.numel() == 0 or queries == 0:
        return out.zero_()
    query, key, rows = tiles.dense(query), tiles.dense(key), rows.contiguous()
    group = heads // groups
    keys = TILE if width * query.element_size() <= LARGE else TILE // 2
    sizes = _sizes(group, count, keys)
    blocks = triton.cdiv(count, sizes["ROWS"])
    parts, span = _division(length, batch * groups * blocks, keys)
    tops, totals = query.new_empty(2, batch, heads, count, parts, dtype=torch.float32)
    first, second = tiles.pieces(width)
    kind, mask_strides = "none", (0, 0, 0, 0)
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "float"
        mask = mask.expand(batch, heads, queries, length)
        mask_strides = mask.stride()
    flags = dict(
        WIDTH=width,
        SIZE=first,
        TAIL=second,
        ALIGN=tiles.alignment(query, key),
        KEYS=keys,
        CAUSAL=causal_shift is not None,
        VALID=valid is not None,
        MASK=kind,
        SOFTCAP=softcap is not None,
        num_stages=2,
        **sizes,
    )
    sources = (query, key, rows, tiles.bytes_of(valid, query), tiles.bytes_of(mask, query))
    strides = (*query.stride()[:3], *key.stride()[:3], *(valid.stride() if valid is not None else (0, 0)), *mask_strides)
    extents = (groups, group, count, length, parts)
    numbers = (causal_shift or 0, *tiles.factors(scaling, softcap))
    with tiles.device_of(query):
        grid = (parts, blocks, batch * groups)
        _statistics[grid](*sources, tops, totals, *strides, *extents, span, *numbers, **flags)
        grid = (triton.cdiv(length, keys), blocks, batch * (1 if reduce_heads else groups))
        _attention_rows[grid](
            *sources,
            tops,
            totals,
            out,
            *strides,
            *extents,
            *numbers,
            **flags,
            PARTS=triton.next_power_of_2(parts),
            REDUCE=reduce_heads,
        )
    return out


def _sizes(group: int, count: int, most: int) -> dict[str, int]:
    """Of a tile: ``GROUP`` heads and ``ROWS`` rows, ``most`` together unless the heads alone are more."""
    heads = triton.next_power_of_2(group)
    wanted = min(max(triton.next_power_of_2(count) * heads, tiles.NARROWEST), most)
    return {"GROUP": heads, "ROWS": max(1, wanted // heads)}


def _division(length: int, programs: int, keys: int) -> tuple[int, int]:
    """Parts of the keys, and keys of a part, so that ``programs`` for each part occupy a GPU."""
    wanted = max(1, min(PARTS, PROGRAMS // programs))
    span = triton.cdiv(triton.cdiv(length, wanted), keys) * keys
    return triton.cdiv(length, span), span
