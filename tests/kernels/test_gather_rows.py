"""``gather_rows``: the kernel, in Triton's interpreter or on a GPU, against plain indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import gather_rows, using


def indexed(tensor: Tensor, rows: Tensor) -> Tensor:
    """One row after the other."""
    whole = tensor.expand(rows.shape[0], *tensor.shape[1:])
    out = tensor.new_empty(*rows.shape, *tensor.shape[2:])
    for sample, places in enumerate(rows.tolist()):
        for number, place in enumerate(places):
            out[sample, number] = whole[sample, max(place, 0)]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_equals_indexing(backend, data):
    batch, length, chosen = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 7))
    rows = torch.randint(-1, length, (batch, chosen), device=DEVICE)
    tensors = []
    for _ in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.lists(st.integers(1, 5), max_size=2))
        samples, dtype = data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([*DTYPES, torch.int64, torch.bool]))
        tensors.append(torch.randint(-9, 9, (samples, length, *shape), device=DEVICE).to(dtype))
    with using(backend):
        found = gather_rows(tensors, rows)
    for tensor, out in zip(tensors, found, strict=True):
        assert out.is_contiguous()
        assert torch.equal(out, indexed(tensor, rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_and_strided_rows(backend):
    """Rows of several blocks, of a tensor that is a view of a larger one."""
    wide = torch.randn(2, 6, 3, 1700, device=DEVICE)
    views = [wide[:, :, 1], wide[:, :, :, :2100:2], wide.transpose(1, 2)]
    rows = torch.tensor([[-1, 0, 2], [0, 1, 1]], device=DEVICE)
    with using(backend):
        found = gather_rows(views, rows)
    for view, out in zip(views, found, strict=True):
        assert torch.equal(out, indexed(view, rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """Those of indexing, also where samples share a tensor and where a row is chosen twice."""
    tensors = [torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)]
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in tensors]
    rows = torch.tensor([[1, 1, 4], [-1, 0, 2]], device=DEVICE)
    with using(backend):
        assert torch.autograd.gradcheck(lambda *given: tuple(gather_rows(given, rows)), tensors)


def test_is_a_well_behaved_operator():
    """Fake tensors, autograd and schema agree with what it does: ``torch.compile`` can rely on them."""
    rows = torch.tensor([[1, 1, 4], [-1, 0, 2]], device=DEVICE)
    tensors = [torch.randn(2, 5, 3, device=DEVICE, requires_grad=True), torch.randn(1, 5, device=DEVICE)]
    torch.library.opcheck(torch.ops.vlprune.gather_rows.default, (tensors, rows))


def test_compiles_into_one_graph():
    tensors = [torch.randn(2, 5, 3, device=DEVICE)]
    rows = torch.tensor([[1, 4], [0, 2]], device=DEVICE)
    compiled = torch.compile(lambda tensor, rows: gather_rows([tensor * 2], rows)[0] + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors, rows), indexed(tensors[0] * 2, rows) + 1)


@needs_triton
def test_compiles_for_gpus(tmp_path):
    kinds = ("bf16", "fp32", "i64", "u8")
    types = {"rows": "*i64", "length": "i32", **{f"end_{k}": "i32" for k in range(3)}}
    types |= {f"{side}_{k}": f"*{kind}" for side in ("source", "target") for k, kind in enumerate(kinds)}
    types |= {f"{name}_{k}": "i32" for name in ("samples", "strides", "width") for k in range(4)}
    compiles(tmp_path, "gather_rows", "_gather_rows", types, BLOCK=2048)
