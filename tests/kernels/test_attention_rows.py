"""``attention_rows``: reference and kernel against a softmax taken row by row in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.attention_naive import attention_map, close
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import attention_rows, using
from vlprune.kernels.attention_rows import reference


def chosen(whole: Tensor, rows: Tensor) -> Tensor:
    """Rows of a map, zero for filler."""
    out = whole.new_zeros(*whole.shape[:2], rows.shape[1], whole.shape[3])
    for sample, places in enumerate(rows.tolist()):
        for number, place in enumerate(places):
            if place >= 0:
                out[sample, :, number] = whole[sample, :, place]
    return out


def inputs(batch=2, groups=2, group=2, queries=5, keys=9, width=8, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    query = torch.randn(batch, groups * group, queries, width, device=DEVICE).to(dtype) * 2
    return query, torch.randn(batch, groups, keys, width, device=DEVICE).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=15)
def test_equals_single_rows(backend, data):
    def draw(*options):
        return data.draw(st.sampled_from(options))

    batch, groups, group = draw(1, 2, 3), draw(1, 2), draw(1, 2, 3, 7)
    queries, keys, count = draw(1, 3, 6), draw(1, 5, 65, 140), draw(0, 1, 2, 5, 11)
    dtype = draw(*DTYPES)
    query, key = inputs(batch, groups, group, queries, keys, draw(1, 8, 24, 40, 72), dtype)
    rows = torch.randint(-1, queries, (batch, count), device=DEVICE)
    options = {"causal_shift": draw(None, 0, keys - queries, -2, 1), "softcap": draw(None, 3.0), "scaling": draw(None, 0.3)}
    options["valid"] = draw(None, torch.rand(batch, keys, device=DEVICE) < 0.7)
    wanted = chosen(attention_map(query, key, **options), rows)
    reduce = draw(False, True)
    with using(backend):
        found = attention_rows(query, key, rows, reduce_heads=reduce, **options)
    assert found.is_contiguous()
    close(found, wanted.mean(1) if reduce else wanted, dtype)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, reduce):
    """Bool and added ones, of one head for all or each, one sample for all or each, beside the other two."""
    query, key = inputs(keys=70)
    rows = torch.tensor([[4, 0, -1], [1, 1, 3]], device=DEVICE)
    for shape in ((2, 1, 5, 70), (1, 4, 5, 70)):
        seen = torch.rand(shape, device=DEVICE) < 0.5
        seen[:, :, 1] = False
        added = torch.randn(shape, device=DEVICE).masked_fill(~seen, -torch.inf)
        for mask in (seen, added, added.half(), torch.randn(shape, device=DEVICE).to(torch.bfloat16)):
            for options in ({}, {"causal_shift": 65, "valid": torch.rand(2, 70, device=DEVICE) < 0.8}):
                with using(backend):
                    found = attention_rows(query, key, rows, mask=mask, reduce_heads=reduce, **options)
                wanted = chosen(attention_map(query, key, mask=mask, **options), rows)
                close(found, wanted.mean(1) if reduce else wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_the_lowest_number_leaves_an_even_row(backend):
    """So models mask the rows of padding: what is lowest everywhere hides nothing from anything."""
    query, key = inputs(1, keys=6)
    mask = torch.full((1, 1, 5, 6), torch.finfo(torch.float32).min, device=DEVICE)
    with using(backend):
        found = attention_rows(query, key, torch.tensor([[2]], device=DEVICE), mask=mask)
    close(found, torch.full((1, 4, 1, 6), 1 / 6, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_heads_and_rows(backend):
    """Tiles of several blocks of rows, and a group that fills a tile."""
    for batch, groups, group, count in ((1, 1, 33, 3), (2, 2, 5, 21)):
        query, key = inputs(batch, groups, group, queries=4, keys=7)
        rows = torch.randint(-1, 4, (batch, count), device=DEVICE)
        wanted = chosen(attention_map(query, key, causal_shift=1), rows)
        with using(backend):
            close(attention_rows(query, key, rows, causal_shift=1), wanted)
            close(attention_rows(query, key, rows, causal_shift=1, reduce_heads=True), wanted.mean(1))


@pytest.mark.parametrize("held", [1, 4, 9])
def test_the_reference_reduces_heads_a_few_rows_at_a_time(monkeypatch, held):
    monkeypatch.setattr(reference, "BLOCK", held)
    query, key = inputs()
    rows = torch.tensor([[0, 4, -1, 1, 3], [2, 2, 1, -1, 0]], device=DEVICE)
    with using("reference"):
        found = attention_rows(query, key, rows, causal_shift=4, reduce_heads=True)
    close(found, chosen(attention_map(query, key, causal_shift=4), rows).mean(1))


@pytest.mark.parametrize("width", [136, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_heads(backend, width):
    """Their tiles are smaller, and every row and key is written all the same."""
    query, key = inputs(1, 1, 5, queries=3, keys=100, width=width)
    rows = torch.tensor([[2, -1, 0, 1, 1, 0, 2]], device=DEVICE)
    wanted = chosen(attention_map(query, key, causal_shift=97), rows)
    with using(backend):
        close(attention_rows(query, key, rows, causal_shift=97), wanted)
        close(attention_rows(query, key, rows, causal_shift=97, reduce_heads=True), wanted.mean(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    """Heads that lie beside one another, a cache that is longer than its contents, and a width that is not dense."""
    wide = torch.randn(2, 6, 4, 3, 8, device=DEVICE)
    query, key = wide[:, :, :, 0].transpose(1, 2), wide[:, :5, :2, 1].transpose(1, 2)
    rows = torch.tensor([[0, 5, -1, 2]], device=DEVICE)[:, ::2].expand(2, -1)
    valid = (torch.rand(2, 10, device=DEVICE) < 0.7)[:, ::2]
    mask = (torch.rand(2, 1, 6, 9, device=DEVICE) < 0.7)[..., :5]
    options = {"causal_shift": 0, "valid": valid, "mask": mask}
    with using(backend):
        close(attention_rows(query, key, rows, **options), chosen(attention_map(query, key, **options), rows))
        thin = query[..., ::2], key[..., ::2]
        close(attention_rows(*thin, rows), chosen(attention_map(*thin), rows))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend, reduce):
    """What is hidden does not matter; what is seen spoils its row and no other."""
    query, key = inputs(1, 1, 2, queries=4, keys=80)
    query[0, :, 0] = torch.nan
    key[0, :, 70] = torch.nan
    key[0, :, 71:] = torch.inf
    rows = torch.tensor([[-1, 0, 1, 2, 3]], device=DEVICE)
    valid = torch.arange(80, device=DEVICE)[None] != 3
    key[0, 0, 3] = torch.nan
    with using(backend):
        found = attention_rows(query, key, rows, causal_shift=68, valid=valid, reduce_heads=reduce)
    clean = query.nan_to_num(), key.nan_to_num(0, 0, 0)
    wanted = chosen(attention_map(*clean, causal_shift=68, valid=valid), rows)
    # Query 0 is NaN itself, query 1 sees up to key 69, queries 2 and 3 see key 70.
    wanted[:, :, [1, 3, 4]] = torch.nan
    close(found, wanted.mean(1) if reduce else wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_see(backend):
    query, key = inputs()
    nobody = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    rows = torch.tensor([[0, 4], [2, -1]], device=DEVICE)
    with using(backend):
        assert torch.equal(attention_rows(query, key, rows, valid=nobody), torch.zeros(2, 4, 2, 9, device=DEVICE))
        assert not attention_rows(query, key, rows, causal_shift=-5, reduce_heads=True).any()
        assert attention_rows(query, key, rows[:, :0]).shape == (2, 4, 0, 9)
        assert attention_rows(query, key[:, :, :0], rows, reduce_heads=True).shape == (2, 2, 0)
        assert not attention_rows(query[:, :, :0], key, rows.clamp(max=-1)).any()


@pytest.mark.parametrize("reduce", [False, True])
def test_is_a_well_behaved_operator(reduce):
    query, key = inputs()
    rows = torch.tensor([[0, 4, -1], [2, 2, 1]], device=DEVICE)
    valid, mask = torch.rand(2, 9, device=DEVICE) < 0.7, torch.randn(2, 1, 5, 9, device=DEVICE)
    operator = torch.ops.vlprune.attention_rows.default
    torch.library.opcheck(operator, (query, key, rows, 0.5, 4, valid, mask, 30.0, reduce))
    torch.library.opcheck(operator, (query, key, rows, 0.5, None, None, None, None, reduce))


def test_compiles_into_one_graph():
    query, key = inputs()
    rows = torch.tensor([[0, 4, -1], [2, 2, 1]], device=DEVICE)

    @torch.compile(backend="eager", fullgraph=True)
    def twice(query, key, rows):
        return attention_rows(query, key, rows, causal_shift=4) * 2

    close(twice(query, key, rows), 2 * chosen(attention_map(query, key, causal_shift=4), rows))


TYPES = dict.fromkeys(("groups", "group", "count", "length", "parts", "shift"), "i32")
TYPES |= {f"{name}_{k}": "i32" for name, n in (("query", 3), ("key", 3), ("valid", 2), ("mask", 4)) for k in range(n)}
TYPES |= {"rows": "*i64", "valid": "*u8", "tops": "*fp32", "totals": "*fp32", "factor": "fp32", "cap": "fp32"}


@needs_triton
@pytest.mark.parametrize(
    ("kind", "mask", "constants"),
    [
        ("bf16", "u8", {"WIDTH": 80, "SIZE": 64, "TAIL": 16, "ALIGN": 16, "GROUP": 8, "ROWS": 8, "KEYS": 64, "MASK": "bool"}),
        (
            "fp32",
            "bf16",
            {"WIDTH": 256, "SIZE": 256, "TAIL": 0, "ALIGN": 1, "GROUP": 1, "ROWS": 16, "KEYS": 32, "MASK": "float"},
        ),
    ],
)
def test_compiles_for_gpus(tmp_path, kind, mask, constants):
    types = TYPES | {"query": f"*{kind}", "key": f"*{kind}", "mask": f"*{mask}"}
    constants = constants | {"CAUSAL": True, "VALID": True, "SOFTCAP": True}
    compiles(tmp_path, "attention_rows", "_statistics", types | {"span": "i32"}, **constants)
    constants |= {"PARTS": 32, "REDUCE": constants["GROUP"] > 1}
    compiles(tmp_path, "attention_rows", "_attention_rows", types | {"out": "*fp32"}, **constants)
