"""``farthest_points``: the kernel, in Triton's interpreter or on a GPU, and the reference against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import farthest_points, using
from vlprune.kernels.farthest_points import reference

WIDTH = 16


def exact(batch: int, points: int) -> Tensor:
    """Rows whose norms are 1, 2 or 4 (or 0) and whose entries are integers: cosines are exact in every dtype, ties abound."""
    filled = torch.tensor([0, 1, 4, 16, 4])[torch.randint(0, 5, (batch, points))]
    order = torch.rand(batch, points, WIDTH).argsort(-1)
    return ((order < filled[..., None]) * (torch.randint(0, 2, order.shape) * 2 - 1)).float().to(DEVICE)


def distances(rows: Tensor) -> Tensor:
    """``(N, N)`` in float64."""
    unit = rows.double() / rows.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return 1 - unit @ unit.mT


def by_definition(features: Tensor, count: int, start: Tensor | None, valid: Tensor) -> list[list[int]]:
    """Sets and loops, no arrays of minima."""
    out = []
    for sample, rows in enumerate(features):
        distance = distances(rows).tolist()
        left = [place for place, exists in enumerate(valid[sample].tolist()) if exists]
        if start is not None:
            chosen = [int(start[sample])]
        else:
            apart = {one: min((distance[one][other] for other in left if other != one), default=0.0) for one in left}
            chosen = [max(left, key=lambda one: (apart[one], -one))] if left else []
        while len(chosen) < count and set(left) - set(chosen):
            apart = {one: min(distance[one][other] for other in chosen) for one in left if one not in chosen}
            chosen.append(max(apart, key=lambda one: (apart[one], -one)))
        out.append((chosen + [-1] * count)[:count])
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(data=st.data())
def test_is_the_definition_ties_included(backend, data):
    batch, points, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 21)), data.draw(st.integers(0, 12))
    features = exact(batch, points).to(data.draw(st.sampled_from(DTYPES)))
    start = torch.randint(0, points, (batch,), device=DEVICE) if data.draw(st.booleans()) else None
    valid = torch.rand(batch, points, device=DEVICE) < data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    rounded = data.draw(st.booleans())  # to values that are exact: no difference
    with using(backend):
        chosen = farthest_points(features, count, start, None if valid.all() else valid, rounded)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == by_definition(features, count, start, valid)


@needs_triton
@settings(max_examples=10)
@given(data=st.data())
def test_kernel_and_reference_choose_the_same(data):
    """Of any features: they share the cosines, and a maximum does not round."""
    batch, points, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 20))
    features = torch.randn(batch, points, 9, device=DEVICE).to(data.draw(st.sampled_from(DTYPES)))
    features[torch.rand(batch, points) < 0.1, 0] = data.draw(st.sampled_from([math.nan, math.inf, 0.0]))
    rounded = data.draw(st.booleans())
    with using("reference"):
        wanted = farthest_points(features, count, rounded=rounded)
    with using("triton"):
        found = farthest_points(features, count, rounded=rounded)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at_once", [900, 300, 3 * 900])
@pytest.mark.parametrize("started", [True, False])
def test_with_less_memory(backend, at_once, started, monkeypatch):
    """One sample after the other, and without a matrix: the same choice."""
    features, start = exact(3, 30), torch.tensor([4, 0, 29], device=DEVICE) if started else None
    valid = torch.rand(3, 30, device=DEVICE) < 0.9
    monkeypatch.setattr(reference, "AT_ONCE", at_once)
    with using(backend):
        chosen = farthest_points(features, 12, start, valid)
    assert chosen.tolist() == by_definition(features, 12, start, valid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [True, False])
def test_many_points_are_chosen_as_few_are(dtype, rounded, monkeypatch):
    """On a CPU cosines are made in strips, and rounds are done in arrays; with a row at a time they are done in tensors."""
    features = exact(2, 77).to(dtype)
    monkeypatch.setattr(reference, "TOGETHER", 10)
    with using("reference"):
        at_once = farthest_points(features, 30, rounded=rounded)
        monkeypatch.setattr(reference, "AT_ONCE", 100)
        a_row_at_a_time = farthest_points(features, 30, rounded=rounded)
    assert torch.equal(at_once, a_row_at_a_time)


def published(features: Tensor, count: int) -> list[int]:
    """DivPrune's rule in the dtype of the features: a matrix of rounded distances, its second smallest entries, its minima."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - (unit.float() @ unit.float().mT).to(features.dtype)
    chosen = [int(distance.float().sort(dim=0).values[1].argmax())]
    while len(chosen) < count:
        chosen.append(int(distance[chosen].float().min(dim=0).values.argmax()))
    return chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reproduces_divprune(backend, dtype):
    """Rounded to half precision many distances are equal, and which come first decides the selection."""
    features = torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    with using(backend):
        assert farthest_points(features, 24, rounded=True)[0].tolist() == published(features[0], 24)
        assert farthest_points(features.float(), 24)[0].tolist() == published(features[0].float(), 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_comes_last(backend):
    """By index, and it is no neighbour of the others: these are chosen as without it."""
    features = exact(1, 12).roll(1, dims=2)
    features[0, :, 0] = 1 + torch.arange(12, device=DEVICE)
    features[0, 3, 1], features[0, 8, 5] = math.nan, -math.inf
    others = [place for place in range(12) if place not in (3, 8)]
    with using(backend):
        chosen = farthest_points(features, 13)[0].tolist()
        without = farthest_points(features[:, others], 10)[0].tolist()
    assert chosen == [others[place] for place in without] + [3, 8, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_choose(backend):
    with using(backend):
        assert farthest_points(torch.randn(2, 5, 3, device=DEVICE), 0).shape == (2, 0)
        assert farthest_points(torch.randn(0, 5, 3, device=DEVICE), 2).shape == (0, 2)
        assert farthest_points(torch.randn(1, 0, 3, device=DEVICE), 2).tolist() == [[-1, -1]]
        assert farthest_points(torch.randn(1, 1, 3, device=DEVICE), 2).tolist() == [[0, -1]]
        none = torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
        assert farthest_points(torch.randn(1, 4, 3, device=DEVICE), 2, valid=none).tolist() == [[-1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_autocast_make_no_difference(backend):
    wide = torch.randn(2, 40, 3, 33, device=DEVICE)
    with using(backend):
        plain = farthest_points(wide[:, ::2, 1].contiguous(), 9)
        assert torch.equal(farthest_points(wide[:, ::2, 1], 9), plain)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(farthest_points(wide[:, ::2, 1], 9), plain)


def test_is_a_well_behaved_operator():
    features, start = torch.randn(2, 7, 3, device=DEVICE, requires_grad=True), torch.tensor([0, 3], device=DEVICE)
    valid = torch.rand(2, 7, device=DEVICE) < 0.8
    torch.library.opcheck(torch.ops.vlprune.farthest_points.default, (features, 3, start, valid, False))
    torch.library.opcheck(torch.ops.vlprune.farthest_points.default, (features.detach().half(), 3, None, None, True))


def test_compiles_into_one_graph():
    features = torch.randn(2, 7, 3, device=DEVICE)
    compiled = torch.compile(lambda x: farthest_points(x * 2, 3).sort().values, backend="eager", fullgraph=True)
    assert torch.equal(compiled(features), farthest_points(features * 2, 3).sort().values)


@needs_triton
def test_compiles_for_gpus(tmp_path):
    types = {"matrix": "*fp32", "nearest": "*fp32", "first": "*i64", "chosen": "*i64", "points": "i32", "count": "i32"}
    compiles(tmp_path, "farthest_points", "_rounds", types, BLOCK=4096)
