"""``merge_rows``: the kernel, in Triton's interpreter or on a GPU, against one segment after the other in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import merge_rows, using

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def merged(values: Tensor, target: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """One segment after the other."""
    means, mass = values.new_zeros(len(values), count, values.shape[2]).double(), values.new_zeros(len(values), count).double()
    for sample in range(len(values)):
        for segment in range(count):
            members = (target[sample] == segment).nonzero()[:, 0].tolist()
            shares = [1.0 if weight is None else float(weight[sample, member]) for member in members]
            mass[sample, segment] = sum(shares)
            if sum(shares):
                rows = [values[sample, member].double() * share for member, share in zip(members, shares, strict=True)]
                means[sample, segment] = torch.stack(rows).sum(0) / sum(shares)
    return means, mass


def agree(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert [part.dtype for part in found] == [dtype, exact]
    for part, expected, tolerance in zip(found, right, (TOLERANCE[dtype], TOLERANCE[exact]), strict=True):
        assert part.is_contiguous()
        torch.testing.assert_close(part.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(data=st.data())
def test_equals_one_segment_after_the_other(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch, length, width = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40)), data.draw(st.integers(1, 9))
    count, dtype = data.draw(st.integers(0, 12)), data.draw(st.sampled_from([*DTYPES, torch.float64]))
    values = torch.randn(batch, length, width, device=DEVICE).to(dtype)
    target = torch.randint(-1, count, (batch, length), device=DEVICE)
    weight = torch.rand(batch, length, device=DEVICE) * 3 if data.draw(st.booleans()) else None
    with using(backend):
        found = merge_rows(values, target, weight, count)
    agree(found, merged(values, target, weight, count), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "count"), [(1100, 3), (513, 24)])
def test_wide_and_strided_rows(backend, width, count):
    """Rows of several slices, of values that are views of something larger, in large segments and in small ones."""
    whole = torch.randn(2, 70, 2, width, device=DEVICE).bfloat16()
    target, weight = torch.randint(-1, count, (70, 2), device=DEVICE).T, torch.rand(70, 2, device=DEVICE).T
    for values in (whole[:, :, 1], whole[:, :, 0, ::2], whole[:, :, 0, :3].transpose(1, 2).contiguous().transpose(1, 2)):
        with using(backend):
            found = merge_rows(values, target, weight, count)
        agree(found, merged(values, target, weight, count), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [[-1, -1, -1], [0, 0, 0], [2, 2, 2], [2, 1, 0], [0, -1, 2]])
def test_segments_without_and_with_all_rows(backend, target):
    values, target = torch.tensor([[[1.0], [2.0], [4.0]]], device=DEVICE), torch.tensor([target], device=DEVICE)
    with using(backend):
        found = merge_rows(values, target, None, 3)
    agree(found, merged(values, target, None, 3), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_what_is_not_finite_in_its_segment(backend):
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([[[1.0], [nan], [nan], [inf], [2.0], [inf], [5.0]]], device=DEVICE)
    target = torch.tensor([[0, -1, 1, 2, 2, 3, 4]], device=DEVICE)
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, nan]], device=DEVICE)
    with using(backend):
        means, mass = merge_rows(values, target, weight, 6)
    right = torch.tensor([1, nan, inf, 0, nan, 0], device=DEVICE), torch.tensor([1, 1, 2, 0, nan, 0], device=DEVICE)
    for found, expected in zip((means[0, :, 0], mass[0]), right, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulates_in_float32(backend):
    """In float16 the sum would overflow, and in bfloat16 it would stop to grow."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.full((1, 3000, 2), 100.0, dtype=dtype, device=DEVICE)
        with using(backend):
            means, mass = merge_rows(values, torch.zeros(1, 3000, dtype=torch.int64, device=DEVICE), None, 1)
        assert means.tolist() == [[[100.0, 100.0]]]
        assert mass.tolist() == [[3000.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_same_each_time(backend):
    if backend == "reference" and DEVICE != "cpu":
        pytest.skip("the reference adds atomically there")
    values, weight = torch.randn(1, 500, 33, device=DEVICE), torch.rand(1, 500, device=DEVICE)
    target = torch.randint(0, 3, (1, 500), device=DEVICE)
    with using(backend):
        once, again = (merge_rows(values, target, weight, 3) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    values = torch.randn(2, 6, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.rand(2, 6, dtype=torch.float64, device=DEVICE).add(0.5).requires_grad_()
    target = torch.tensor([[0, 0, 3, -1, 0, 3], [1, -1, -1, 2, 0, 1]], device=DEVICE)
    with using(backend):
        assert torch.autograd.gradcheck(lambda v, w: merge_rows(v, target, w, 4), (values, weight))
        assert torch.autograd.gradcheck(lambda v: merge_rows(v, target, None, 4), (values,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_types_of_what_they_belong_to(backend):
    """Rows that take part in no segment get none, were they and their weights NaN."""
    values = torch.tensor([[[1.0], [float("nan")], [2.0]]], device=DEVICE).bfloat16().requires_grad_()
    weight = torch.tensor([[1.0, float("nan"), 1.0]], device=DEVICE, requires_grad=True)
    with using(backend):
        means, mass = merge_rows(values, torch.tensor([[0, -1, 0]], device=DEVICE), weight, 2)
    (means.sum() + mass.sum()).backward()
    assert values.grad is not None
    assert weight.grad is not None
    assert values.grad.dtype == torch.bfloat16
    assert values.grad.flatten().tolist() == [0.5, 0.0, 0.5]
    assert weight.grad.tolist() == [[0.75, 0.0, 1.25]]


def test_is_a_well_behaved_operator():
    """Fake tensors, autograd and schema agree with what it does: ``torch.compile`` can rely on them."""
    values, weight = (torch.rand(*shape, device=DEVICE, requires_grad=True) for shape in ((2, 5, 3), (2, 5)))
    target = torch.randint(-1, 3, (2, 5), device=DEVICE)
    torch.library.opcheck(torch.ops.vlprune.merge_rows.default, (values, target, weight, 3))
    torch.library.opcheck(torch.ops.vlprune.merge_rows.default, (values, target, None, 3))


def test_compiles_into_one_graph():
    values, target = torch.randn(2, 5, 3, device=DEVICE), torch.randint(-1, 3, (2, 5), device=DEVICE)
    compiled = torch.compile(lambda v, t: merge_rows(v * 2, t, None, 3)[0] + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(values, target), merge_rows(values * 2, target, None, 3)[0] + 1)


@needs_triton
@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_for_gpus(tmp_path, weighted):
    types = {"values": "*bf16", "order": "*i64", "starts": "*i32", "means": "*bf16", "mass": "*fp32"}
    types |= dict.fromkeys(["length", "count", "width", "stride_sample", "stride_row"], "i32")
    options = {"WEIGHTED": weighted, "ROWS": 4, "WIDTH": 512}
    if weighted:
        types["weight"] = "*fp32"
    else:
        options["weight"] = None
    compiles(tmp_path, "merge_rows", "_merge_rows", types, **options)
