"""``compact_cache`` as one launch over all stores; in place a program moves all entries of a slice of one head.

Kernels get stores as addresses: up to two (keys and values of a layer) as numbers, more in a table on the device.
"""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS

BYTES = 16384
"""What a program copies, at most."""
BYTES_IN_PLACE = 32768
"""What a program moves at a time. It waits for memory once each time, so this is more."""
SLICE = 32
"""Bytes of an entry that a program moves in place, at least: what GPUs read and write at once."""
PROGRAMS = 512
"""As many programs occupy a large GPU. In place, entries are cut into slices until there are so many."""
VECTOR = 16
"""Bytes that a thread reads or writes at once, if all addresses are multiples of it."""
NUMBERS = ("source", "target", "samples", "heads", "rows", "width")
"""What describes a store: two addresses, three strides and the width of an entry. The last four are counted in the elements
that a thread reads at once, so that the compiler knows what they are multiples of."""


def supports(stores: Sequence[Tensor], rows: Tensor) -> bool:
    kinds = {(store.dtype, store.device) for store in stores}
    return len(kinds) == 1 and stores[0].dtype in FLOATS and rows.device == stores[0].device


def supports_in_place(stores: Sequence[Tensor], rows: Tensor) -> bool:
    alike = {store.shape[2] for store in stores}
    return (
        len(alike) == 1 and rows.shape[-1] <= alike.pop() and supports(stores, rows) and all(_dense(store) for store in stores)
    )


def _dense(store: Tensor) -> bool:
    return store.stride(3) == 1 or store.shape[3] == 1


# ------------------------------------------------------------------ kernels

_RUNTIME = [f"{name}_{number}" for number in range(2) for name in NUMBERS]
_RUNTIME += ["first", "per", "kv_heads", "length", "rows_groups", "rows_samples", "rows_heads"]


@triton.jit
def _number(table, number, column: tl.constexpr, of_first, of_second, TABLE: tl.constexpr):
    return tl.load(table + number * 6 + column) if TABLE else tl.where(number == 0, of_first, of_second).to(tl.int64)


@triton.jit
def _place(rows, pair, number, first, per, kv_heads, rows_groups, rows_samples, rows_heads):
    """Sample and head of a program, and the rows that these follow in store ``number`` of the launch."""
    sample, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    group = ((first + number) // per).to(tl.int64)
    return sample, head, rows + group * rows_groups + sample * rows_samples + head * rows_heads


@triton.jit(do_not_specialize=_RUNTIME)
def _compact_cache(
    rows,
    like,
    table,
    source_0,
    target_0,
    samples_0,
    heads_0,
    rows_0,
    width_0,
    source_1,
    target_1,
    samples_1,
    heads_1,
    rows_1,
    width_1,
    first,
    per,
    kv_heads,
    length,
    rows_groups,
    rows_samples,
    rows_heads,
    TABLE: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program copies ``WIDTH`` elements of ``ROWS`` entries. ``length`` counts the survivors."""
    pair, block, number = tl.program_id(0), tl.program_id(1) // PIECES, tl.program_id(2)
    sample, head, rows = _place(rows, pair, number, first, per, kv_heads, rows_groups, rows_samples, rows_heads)
    samples = _number(table, number, 2, samples_0, samples_1, TABLE) * VECTOR
    heads = _number(table, number, 3, heads_0, heads_1, TABLE) * VECTOR
    stride = _number(table, number, 4, rows_0, rows_1, TABLE) * VECTOR
    width = _number(table, number, 5, width_0, width_1, TABLE) * VECTOR
    source = tl.multiple_of(_number(table, number, 0, source_0, source_1, TABLE).to(like.dtype), ALIGN)
    target = tl.multiple_of(_number(table, number, 1, target_0, target_1, TABLE).to(like.dtype), ALIGN)
    source += sample * samples + head * heads
    target += pair.to(tl.int64) * length * width
    slots = block * ROWS + tl.arange(0, ROWS)
    within = (tl.program_id(1) % PIECES) * WIDTH + tl.arange(0, WIDTH)
    inside = (slots < length)[:, None] & (within < width)[None, :]
    chosen = tl.maximum(tl.load(rows + slots, mask=slots < length, other=0), 0)
    values = tl.load(source + chosen[:, None] * stride + within[None, :], mask=inside)
    tl.store(target + slots.to(tl.int64)[:, None] * width + within[None, :], values, mask=inside)


# Why nothing is read after it was overwritten. A program owns its slice of its head of its store, so only its own order
# counts. Let s[j] be the source of slot j: 0 for filler, its row otherwise. Without filler, rows[j] >= j, since rows ascend
# strictly. With f fillers only rows[j] >= j - f holds: entries may move to the right. But rows[j] - j never falls from one
# row to the next, so there is a `turn`: rows[j] < j for all slots before it, fillers among them, and rows[j] >= j from it on.
#   - Slots before the turn read slots <= themselves, slots from the turn on read slots >= themselves: the two parts share no
#     slot, whichever comes first.
#   - From the turn on slots are written in ascending order. What is yet to be read lies at or behind the next block, what
#     was written before it.
#   - Before the turn they are written in descending order. s does not fall with j, so what is yet to be read lies before the
#     block just written. Fillers are written last, when no row is left to be read; what they read, slot 0, is written by
#     nobody but a filler, with what it holds.
# So only entries of one block can be in each other's way: between reading it and writing it, threads wait until all of them
# have read. No program reads what it wrote.


@triton.jit
def _move(store, rows, slots, inside, within, stride, width):
    """Moves what belongs into ``slots``, but for what is there already."""
    sources = tl.maximum(tl.load(rows + slots, mask=inside, other=0), 0)
    moves = (inside & (sources != slots))[:, None] & (within < width)[None, :]
    values = tl.load(store + sources[:, None] * stride + within[None, :], mask=moves)
    tl.debug_barrier()
    tl.store(store + slots.to(tl.int64)[:, None] * stride + within[None, :], values, mask=moves)


@triton.jit
def _turn(rows, length, ROWS: tl.constexpr):
    """The number of slots whose row lies before them."""
    before = tl.zeros((ROWS,), tl.int32)
    for start in range(0, tl.where(tl.load(rows) < 0, length, 0), ROWS):
        slots = start + tl.arange(0, ROWS)
        chosen = tl.load(rows + slots, mask=slots < length, other=0)
        before += ((chosen < slots) & (slots < length)).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit(do_not_specialize=[*_RUNTIME, "fill", "size"])
def _compact_cache_in_place(
    rows,
    like,
    table,
    source_0,
    target_0,
    samples_0,
    heads_0,
    rows_0,
    width_0,
    source_1,
    target_1,
    samples_1,
    heads_1,
    rows_1,
    width_1,
    first,
    per,
    kv_heads,
    length,
    rows_groups,
    rows_samples,
    rows_heads,
    size,
    fill,
    TABLE: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    FILL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program moves ``WIDTH`` elements of all entries of a head. ``length`` counts the survivors, ``size`` the slots."""
    pair, piece, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sample, head, rows = _place(rows, pair, number, first, per, kv_heads, rows_groups, rows_samples, rows_heads)
    samples = _number(table, number, 2, samples_0, samples_1, TABLE) * VECTOR
    heads = _number(table, number, 3, heads_0, heads_1, TABLE) * VECTOR
    stride = _number(table, number, 4, rows_0, rows_1, TABLE) * VECTOR
    width = _number(table, number, 5, width_0, width_1, TABLE) * VECTOR
    store = tl.multiple_of(_number(table, number, 1, target_0, target_1, TABLE).to(like.dtype), ALIGN)
    store += sample * samples + head * heads
    within = piece * WIDTH + tl.arange(0, WIDTH)
    if length > 0:
        turn = _turn(rows, length, ROWS)
        for end in range(turn, 0, -ROWS):
            slots = end - ROWS + tl.arange(0, ROWS)
            _move(store, rows, slots, slots >= 0, within, stride, width)
        for done in range(0, length - turn, ROWS):  # from `turn` on, the compiler would write elements one by one
            slots = turn + done + tl.arange(0, ROWS)
            _move(store, rows, slots, slots < length, within, stride, width)
    if FILL:
        # What lay here has been read: all threads have waited for the last block.
        filler = (tl.full((ROWS, WIDTH), 0, tl.float32) + fill).to(like.dtype.element_ty)
        for start in range(length, size, ROWS):
            slots = start + tl.arange(0, ROWS)
            inside = (slots < size)[:, None] & (within < width)[None, :]
            tl.store(store + slots.to(tl.int64)[:, None] * stride + within[None, :], filler, mask=inside)


# ------------------------------------------------------------------ launches


def compact_cache(stores: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """See :func:`vlprune.kernels.compact_cache`."""
    batch, heads = stores[0].shape[:2]
    count, widest = rows.shape[-1], max(store.shape[3] for store in stores)
    out = [store.new_empty(batch, heads, count, store.shape[3]) for store in stores]
    if batch * heads * count * widest == 0:
        return out
    sources = [store if _dense(store) else store.contiguous() for store in stores]
    width = min(triton.next_power_of_2(widest), 256)
    block, pieces = BYTES // (width * stores[0].element_size()), triton.cdiv(widest, width)
    grid = (batch * heads, triton.cdiv(count, block) * pieces)
    for described, first in _launches(sources, out):
        arguments = _arguments(sources, out, rows, described, first)
        with torch.cuda.device_of(rows):
            _compact_cache[(*grid, len(described))](**arguments, PIECES=pieces, ROWS=block, WIDTH=width, num_warps=4)
    return out


def compact_cache_(stores: Sequence[Tensor], rows: Tensor, fill: float | None) -> None:
    """See :func:`vlprune.kernels.compact_cache_`."""
    batch, heads, size = stores[0].shape[:3]
    widest, bytes_each = max(store.shape[3] for store in stores), stores[0].element_size()
    if batch * heads * size * widest == 0:
        return
    width = triton.next_power_of_2(widest)
    while width * bytes_each > SLICE and len(stores) * batch * heads * triton.cdiv(widest, width) < PROGRAMS:
        width //= 2
    block = max(BYTES_IN_PLACE // (width * bytes_each), 1)
    for described, first in _launches(stores, stores):
        arguments = _arguments(stores, stores, rows, described, first)
        grid = (batch * heads, triton.cdiv(widest, width), len(described))
        tuning = {"ROWS": block, "WIDTH": width, "num_warps": 8, "num_stages": 1}
        with torch.cuda.device_of(rows):
            _compact_cache_in_place[grid](**arguments, size=size, fill=fill or 0.0, FILL=fill is not None, **tuning)


Described = tuple[int, ...]


def _launches(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterator[tuple[list[Described], int]]:
    """Descriptions of the stores of a launch, and the number of the first of them."""
    vector = _vector(sources, targets)
    described = [
        (source.data_ptr(), target.data_ptr(), *(number // vector for number in (*source.stride()[:3], source.shape[3])))
        for source, target in zip(sources, targets, strict=True)
    ]
    # A graph would remember where on the host a table came from, not the table.
    capturing = sources[0].is_cuda and torch.cuda.is_current_stream_capturing()
    most = 2 if capturing else len(described)
    for first in range(0, len(described), most):
        yield described[first : first + most], first


def _arguments(
    sources: Sequence[Tensor], targets: Sequence[Tensor], rows: Tensor, described: list[Described], first: int
) -> dict[str, Any]:
    """What both kernels are given."""
    rows = rows.contiguous() if rows.ndim == 4 else rows.contiguous()[None]
    table = None if len(described) <= 2 else _on_device(described, rows.device)
    pair = [(0,) * len(NUMBERS)] * 2 if table is not None else [described[0], described[-1]]
    numbers = {f"{name}_{k}": number for k in range(2) for name, number in zip(NUMBERS, pair[k], strict=True)}
    vector = _vector(sources, targets)
    return numbers | {
        "rows": rows,
        "like": sources[0],
        "table": table,
        "first": first,
        "per": len(sources) // rows.shape[0],
        "kv_heads": sources[0].shape[1],
        "length": rows.shape[3],
        "rows_groups": rows.stride(0),
        "rows_samples": rows.stride(1),
        "rows_heads": rows.stride(2) if rows.shape[2] > 1 else 0,
        "TABLE": table is not None,
        "ALIGN": vector * sources[0].element_size(),
        "VECTOR": vector,
    }


def _on_device(described: list[Described], device: torch.device) -> Tensor:
    """The table; nothing waits for it to arrive."""
    table = torch.tensor(described, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _vector(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> int:
    """Elements that a thread reads or writes at once."""
    return VECTOR // sources[0].element_size() if all(_aligned(tensor) for tensor in (*sources, *targets)) else 1


def _aligned(tensor: Tensor) -> bool:
    """Whether every row of the tensor starts at a multiple of ``VECTOR`` bytes, and is a multiple of that long."""
    numbers = (*tensor.stride()[:3], tensor.shape[3])
    return tensor.data_ptr() % VECTOR == 0 and all(number * tensor.element_size() % VECTOR == 0 for number in numbers)
