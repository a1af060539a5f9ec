"""``compact_cache``: the kernels, in Triton's interpreter or on a GPU, against one entry after the other."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import compact_cache, compact_cache_, using


def entries(stores: list[Tensor], rows: Tensor) -> list[Tensor]:
    """One entry after the other."""
    groups = rows if rows.ndim == 4 else rows[None]
    found = []
    for number, store in enumerate(stores):
        own = groups[number // (len(stores) // len(groups))]
        out = store.new_empty(*store.shape[:2], rows.shape[-1], store.shape[3])
        for sample in range(store.shape[0]):
            for head in range(store.shape[1]):
                for slot, row in enumerate(own[sample, head if own.shape[1] > 1 else 0].tolist()):
                    out[sample, head, slot] = store[sample, head, max(row, 0)]
        found.append(out)
    return found


def moved(stores: list[Tensor], rows: Tensor, fill: float | None) -> list[Tensor]:
    """What the stores hold afterwards; of slots that are undefined, what they held."""
    found = [store.clone() for store in stores]
    for out, front in zip(found, entries(stores, rows), strict=True):
        out[:, :, : rows.shape[-1]] = front
        if fill is not None:
            out[:, :, rows.shape[-1] :] = fill
    return found


def survivors(length: int, count: int, *shape: int) -> Tensor:
    """Rows as an eviction leaves them: right-aligned, ascending, some samples with filler, up to nothing but filler."""
    rows = torch.full((*shape, count), -1)
    for own in rows.view(math.prod(shape), count):
        alive = int(torch.randint(0, count + 1, ()))
        own[count - alive :] = torch.randperm(length)[:alive].sort().values
    return rows.to(DEVICE)


def store(batch: int, heads: int, length: int, width: int, dtype: torch.dtype, layout: str) -> Tensor:
    """``contiguous``, as an attention ``projected`` it, or a ``part`` of something larger."""
    if layout == "projected":
        return torch.randn(batch, length, heads, width, device=DEVICE).to(dtype).transpose(1, 2)
    more = 1 if layout == "part" else 0
    return torch.randn(batch, heads + more, length + more, width + more, device=DEVICE).to(dtype)[:, more:, more:, more:]


@st.composite
def caches(draw) -> tuple[list[Tensor], Tensor]:
    batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    groups = draw(st.sampled_from([None, 1, 2, 3]))
    dtype = draw(st.sampled_from([*DTYPES, torch.float64]))
    shape = (
        (batch, draw(st.sampled_from([1, heads]))) if groups is None else (groups, batch, draw(st.sampled_from([1, heads])))
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    stores = []
    for _ in range(draw(st.integers(1, 2)) * (groups or 1)):
        width, layout = draw(st.integers(1, 20)), draw(st.sampled_from(["contiguous", "projected", "part"]))
        stores.append(store(batch, heads, length, width, dtype, layout))
    return stores, survivors(length, draw(st.integers(0, length)), *shape)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(cache=caches())
def test_equals_one_entry_after_the_other(backend, cache):
    with using(backend):
        found = compact_cache(*cache)
    for out, right in zip(found, entries(*cache), strict=True):
        assert out.is_contiguous()
        assert out.dtype == right.dtype
        assert torch.equal(out, right)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(cache=caches(), fill=st.sampled_from([None, 0.0, -1.5]))
def test_in_place_equals_one_entry_after_the_other(backend, cache, fill):
    stores, rows = cache
    right = moved(stores, rows, fill)
    with using(backend):
        compact_cache_(stores, rows, fill)
    defined = slice(rows.shape[-1] if fill is None else None)
    for found, expected in zip(stores, right, strict=True):
        assert torch.equal(found[:, :, defined], expected[:, :, defined])


def in_blocks_of(slots: int, store: Tensor, rows: Tensor) -> None:
    """Moves 32 bytes of entries, ``slots`` of them at a time, and asserts that all arrived."""
    from vlprune.kernels.compact_cache import triton

    (right,) = moved([store], rows, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "BYTES_IN_PLACE", slots * triton.SLICE)
        with using("triton"):
            compact_cache_([store], rows)
    assert torch.equal(store, right)


@needs_triton
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_blocks_do_not_overwrite_what_is_still_to_be_read(slots):
    """Everything that can survive of six entries, behind every number of fillers, a sample each."""
    for count in range(1, 7):
        alive = [chosen for size in range(count + 1) for chosen in itertools.combinations(range(6), size)]
        rows = torch.tensor([[[-1] * (count - len(chosen)) + list(chosen)] for chosen in alive], device=DEVICE)
        in_blocks_of(slots, torch.randn(len(alive), 1, 6, 8, device=DEVICE), rows)


@needs_triton
@settings(max_examples=15)
@given(length=st.integers(20, 70), data=st.data())
def test_many_blocks_do_not_overwrite_what_is_still_to_be_read(length, data):
    """Entries that move left, entries that filler pushes right, and both in one sample."""
    torch.manual_seed(length)
    rows = survivors(length, data.draw(st.integers(10, length)), 2, 2)
    in_blocks_of(4, torch.randn(2, 2, length, 8, device=DEVICE), rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [[-1, 0, 1, 2], [-1, -1, 0, 7], [-1, -1, -1, -1], [-1, 0, 1, 7], [0, 1, 2, 3], [0, 1, 6, 7]])
def test_in_place_pushes_entries_right_for_filler(backend, rows):
    rows = torch.tensor(rows, device=DEVICE).view(1, 1, -1)
    whole = torch.arange(8.0, device=DEVICE).view(1, 1, 8, 1).expand(1, 2, 8, 4).clone()
    with using(backend):
        compact_cache_([whole], rows, fill=-1.0)
    assert whole[0, 1, :, 3].tolist() == [*rows.clamp(min=0).flatten().tolist(), -1, -1, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_what_surrounds_a_store(backend):
    whole = torch.randn(2, 3, 12, 24, device=DEVICE)
    before, part = whole.clone(), whole[:, 1:, 2:9, 3:20]
    rows = survivors(7, 5, 2, 1)
    before[:, 1:, 2:9, 3:20] = moved([part], rows, 0.0)[0]
    with using(backend):
        compact_cache_([part], rows)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("widths", [(576,), (80, 80), (64, 96, 64, 96), (300, 8, 3)])
def test_many_and_wide_stores(backend, widths):
    """Several slices of an entry, entries of a length that is a power of two and not, more stores than a layer has."""
    stores = [torch.randn(1, 2, 40, width, device=DEVICE).bfloat16() for width in widths]
    rows = survivors(40, 33, len(widths), 1, 2)
    right = entries(stores, rows)
    with using(backend):
        assert all(map(torch.equal, compact_cache(stores, rows), right))
        compact_cache_(stores, rows)
    for found, front in zip(stores, right, strict=True):
        assert torch.equal(found[:, :, :33], front)
        assert not found[:, :, 33:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_and_everything(backend):
    stores = [torch.randn(2, 2, 5, 4, device=DEVICE) for _ in range(2)]
    before = [store.clone() for store in stores]
    everything = torch.arange(5, device=DEVICE).expand(2, 1, -1)
    with using(backend):
        assert compact_cache([], everything) == []
        assert [out.shape for out in compact_cache(stores, everything[..., :0])] == [(2, 2, 0, 4)] * 2
        assert all(map(torch.equal, compact_cache(stores, everything), stores))
        compact_cache_(stores, everything)
        assert all(map(torch.equal, stores, before))
        compact_cache_(stores, everything[..., :0], fill=None)
        assert all(map(torch.equal, stores, before))
        compact_cache_(stores, everything[..., :0])
        assert not any(store.any() for store in stores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_what_is_not_finite(backend):
    """NaN of any payload, infinities and the sign of zero."""
    bits = torch.tensor([0x7FC1, 0x7F80, 0xFF80, 0x8000, 0xFFFF], device=DEVICE, dtype=torch.int32).to(torch.int16)
    whole = bits.view(torch.bfloat16).view(1, 1, 5, 1).repeat(1, 1, 1, 16)
    rows = torch.tensor([[[1, 3, 4]]], device=DEVICE)
    with using(backend):
        (out,) = compact_cache([whole], rows)
        compact_cache_([whole], rows)
    for found in (out, whole[:, :, :3]):
        assert torch.equal(found[0, 0, :, 5].contiguous().view(torch.int16), bits[rows[0, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """Those of indexing, also of entry 0, which filler holds, and where heads and stores differ."""
    stores = [torch.randn(2, 2, 5, width, dtype=torch.float64, device=DEVICE, requires_grad=True) for width in (3, 2)]
    rows = survivors(5, 4, 2, 2, 2)
    with using(backend):
        assert torch.autograd.gradcheck(lambda *given: tuple(compact_cache(given, rows)), stores)
        assert torch.autograd.gradcheck(lambda *given: tuple(compact_cache(given, rows[0, :, :1])), stores)
        compact_cache(stores, rows)[1].sum().backward()
    counts = [torch.bincount(own.clamp(min=0), minlength=5) for own in rows[1].flatten(0, 1)]
    assert stores[0].grad is None or not stores[0].grad.any()
    assert stores[1].grad is not None
    assert torch.equal(stores[1].grad, torch.stack(counts).view(2, 2, 5, 1).expand(-1, -1, -1, 2).double())


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 1, 3), (0, 2, 1, 3), (1, 1, 3), (2, 4, 3), (2, 1, 2, 0, 3)])
def test_refuses_rows_that_cannot_be_shared_out(shape):
    stores = [torch.randn(2, 2, 5, 4, device=DEVICE)] * 2
    for operation in (compact_cache, compact_cache_):
        with pytest.raises(ValueError, match="2 stores"):
            operation(stores, torch.zeros(shape, dtype=torch.int64, device=DEVICE))


def test_are_well_behaved_operators():
    """Fake tensors, autograd and schema agree with what they do: ``torch.compile`` can rely on them."""
    rows = survivors(5, 4, 2, 1)
    stores = [torch.randn(2, 2, 5, width, device=DEVICE, requires_grad=True) for width in (3, 2)]
    torch.library.opcheck(torch.ops.vlprune.compact_cache.default, (stores, rows))
    stores = [store.detach() for store in stores]
    torch.library.opcheck(torch.ops.vlprune.compact_cache_.default, (stores, rows, 0.0))


def test_compile_into_one_graph():
    def both(keys: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        first, _ = compact_cache([keys * 2, values], rows)
        compact_cache_([keys, values], rows)
        return first + 1, keys + values

    keys, values = (torch.randn(2, 2, 5, 4, device=DEVICE) for _ in range(2))
    rows = survivors(5, 3, 2, 2)
    (first,), right = entries([keys * 2], rows), moved([keys, values], rows, 0.0)
    found = torch.compile(both, backend="eager", fullgraph=True)(keys, values, rows)
    assert torch.equal(found[0], first + 1)
    assert torch.equal(found[1], right[0] + right[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_graph_replays_it():
    """Three stores, which outside of a graph would be described by a table."""
    stores = [torch.randn(2, 2, 50, 16, device=DEVICE) for _ in range(3)]
    rows = survivors(50, 20, 3, 2, 2)
    graph = torch.cuda.CUDAGraph()
    with using("triton"):
        compact_cache(stores, rows)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = compact_cache(stores, rows)
    for store in stores:
        store.normal_()
    graph.replay()
    assert all(map(torch.equal, found, entries(stores, rows)))


NUMBERS = ("source", "target", "samples", "heads", "rows", "width")
TYPES = {"rows": "*i64", "like": "*bf16"} | {f"{name}_{k}": "i64" for name in NUMBERS for k in range(2)}
TYPES |= dict.fromkeys(["first", "per", "kv_heads", "length", "rows_groups", "rows_samples", "rows_heads"], "i32")


def memory_accesses(tmp_path: Path) -> list[list[str]]:
    """What reads and writes global memory, and the barriers between, as it stands in the code for each GPU."""
    codes = [path.read_text() for path in tmp_path.rglob("*.ptx")]
    assert codes
    return [re.findall(r"\b(?:ld\.global|st\.global)[\w.]*|\bbar\.sync", code) for code in codes]


@needs_triton
def test_compiles_for_gpus(tmp_path):
    """16 bytes at a time."""
    types = TYPES | {"table": "*i64"}
    options = {"TABLE": True, "ALIGN": 16, "VECTOR": 8, "PIECES": 1, "ROWS": 64, "WIDTH": 128}
    compiles(tmp_path, "compact_cache", "_compact_cache", types, **options)
    for code in memory_accesses(tmp_path):
        assert {access for access in code if access.startswith("st")} == {"st.global.v4.b32"}


@needs_triton
def test_compiles_for_gpus_in_place(tmp_path):
    """16 bytes at a time, and threads wait for each other between reading a block and writing it."""
    types = TYPES | {"size": "i32", "fill": "fp32"}
    options = {"table": None, "TABLE": False, "ALIGN": 16, "VECTOR": 8, "FILL": True, "ROWS": 1024, "WIDTH": 16}
    compiles(tmp_path, "compact_cache", "_compact_cache_in_place", types, **options)
    for code in memory_accesses(tmp_path):
        assert {access for access in code if access.startswith("st")} == {"st.global.v4.b32"}
        following = [after for access, after in itertools.pairwise(code) if access == "ld.global.v4.b32" != after]
        assert following == ["bar.sync"] * 2, "one for each direction of moving"
