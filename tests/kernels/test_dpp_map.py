"""``dpp_map``: the kernel, in Triton's interpreter or on a GPU, and the reference against determinants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import dpp_map, using


@pytest.fixture(params=BACKENDS + [pytest.param("split", marks=needs_triton)])
def backend(request, monkeypatch):
    """The reference, a program for each sample, and programs that share a sample."""
    if request.param == "split":
        share(monkeypatch)
    return request.param.replace("split", "triton")


def share(monkeypatch) -> None:
    from vlprune.kernels.dpp_map import triton

    monkeypatch.setattr(triton, "ALONE", 0)
    monkeypatch.setattr(triton, "PIECE", 16)


def exact(batch: int, blocks: int) -> Tensor:
    """``(B, 3 blocks, 3 blocks)`` in shuffled blocks, scaled by powers of 4, whose every factor is an integer or a dyadic.

    No operation rounds and ties abound, so that every order of summation chooses the same.
    """
    root = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    out = torch.zeros(batch, 3 * blocks, 3 * blocks)
    for sample in range(batch):
        whole = torch.block_diag(*[root @ root.T * 4.0 ** int(torch.randint(-1, 2, ())) for _ in range(blocks)])
        order = torch.randperm(3 * blocks)
        out[sample] = whole[order][:, order]
    return out.to(DEVICE)


def definite(batch: int, points: int) -> Tensor:
    """Well-conditioned, of relevances and cosines as CDPruner has them."""
    rows = torch.nn.functional.normalize(torch.randn(batch, points, points + 8), dim=-1)
    relevance = 0.2 + torch.rand(batch, points)
    return (relevance[:, :, None] * (rows @ rows.mT) * relevance[:, None]).to(DEVICE)


def gains(kernel: Tensor, chosen: list[int], left: list[int]) -> dict[int, float]:
    """By what each point that is left would multiply the determinant of those chosen; in float64."""
    kernel = kernel.double().cpu()
    base = float(torch.linalg.det(kernel[chosen][:, chosen])) if chosen else 1.0
    return {one: float(torch.linalg.det(kernel[chosen + [one]][:, chosen + [one]])) / base for one in left}


def assert_greedy(kernel: Tensor, chosen: Tensor, valid: Tensor, tolerance: float) -> None:
    """Every choice has the highest gain up to ``tolerance`` (relative), the lowest index where that is 0."""
    for sample, picks in enumerate(chosen.tolist()):
        left = [place for place, exists in enumerate(valid[sample].tolist()) if exists]
        for number, pick in enumerate(picks):
            if not left:
                assert pick == -1
                continue
            gain = gains(kernel[sample], picks[:number], left)
            highest = max(gain.values()) * (1 - tolerance)
            assert pick in left
            assert gain[pick] >= highest
            assert tolerance or pick == min(one for one in left if gain[one] >= highest)
            left.remove(pick)


def by_blocks(kernel: Tensor, count: int, valid: Tensor) -> list[list[int]]:
    """Residuals of all points from an exact solve in each round, on Fractions."""
    from fractions import Fraction

    out = []
    for sample in range(kernel.shape[0]):
        entries = [[Fraction(value) for value in line] for line in kernel[sample].tolist()]
        left = [place for place, exists in enumerate(valid[sample].tolist()) if exists]
        picks = []
        while left and len(picks) < count:
            pick = max(left, key=lambda one: (entries[one][one], -one))
            pivot = list(entries[pick])
            entries = [[a - line[pick] * b / pivot[pick] for a, b in zip(line, pivot, strict=True)] for line in entries]
            left.remove(pick)
            picks.append(pick)
        out.append((picks + [-1] * count)[:count])
    return out


@pytest.mark.parametrize("how", [*BACKENDS, pytest.param("split", marks=needs_triton)])
@settings(max_examples=15)
@given(data=st.data())
def test_equal_residuals_go_to_the_lowest_index(how, data):
    batch, blocks, count = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 20))
    kernel = exact(batch, blocks)
    valid = torch.rand(batch, 3 * blocks, device=DEVICE) < data.draw(st.sampled_from([0.4, 0.9]))
    whole = torch.ones_like(valid)
    with pytest.MonkeyPatch.context() as patch, using(how.replace("split", "triton")):
        if how == "split":
            share(patch)
        everyone, some = dpp_map(kernel, count), dpp_map(kernel, count, valid)
    assert everyone.dtype == torch.int64
    assert everyone.tolist() == by_blocks(kernel, count, whole)
    if data.draw(st.booleans()):  # without a point of a block the others' residuals need not be squares
        assert_greedy(kernel, some, valid, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_highest_determinants(backend, dtype):
    kernel = definite(2, 27).to(dtype)
    valid = torch.rand(2, 27, device=DEVICE) < 0.8
    with using(backend):
        chosen = dpp_map(kernel, 25, valid)
        assert torch.equal(dpp_map(kernel.mT, 25, valid), dpp_map(kernel.mT.contiguous(), 25, valid))
    assert_greedy(kernel, chosen, valid, 1e-3)


@needs_triton
def test_kernel_and_reference_choose_the_same(backend):
    """Where residuals differ by more than rounding; more rounds than a step of the kernel."""
    torch.manual_seed(0)
    kernel = definite(2, 90)
    with using("reference"):
        wanted = dpp_map(kernel, 75)
    with using(backend):
        found = dpp_map(kernel, 75)
    assert torch.equal(found, wanted)


def test_the_rest_follows_when_the_rank_is_used_up(backend):
    """Three different points, each several times: the copies have residual 0 and come by index."""
    kernel = torch.eye(3, device=DEVICE)[[0, 1, 0, 2, 2, 1, 0]] * torch.tensor([4.0, 2.0, 1.0], device=DEVICE)
    kernel = (kernel @ kernel.T)[None]
    with using(backend):
        assert dpp_map(kernel, 8).tolist() == [[0, 1, 3, 2, 4, 5, 6, -1]]
        assert dpp_map(torch.zeros(1, 3, 3, device=DEVICE), 3).tolist() == [[0, 1, 2]]


def test_points_below_the_floor_follow_by_residual(backend):
    kernel = torch.diag_embed(torch.tensor([[0.01, 4.0, 0.02, -1.0, 1.0]], device=DEVICE))
    with using(backend):
        assert dpp_map(kernel, 5, floor=0.1).tolist() == [[1, 4, 2, 0, 3]]


def test_what_is_not_a_number_comes_last(backend):
    """On the diagonal from the start, beside it once it has made a residual NaN. It spoils no other point."""
    kernel = torch.diag_embed(torch.tensor([[2.0, math.nan, 3.0, -math.inf, 4.0, 1.0]], device=DEVICE))
    kernel[0, 4, 2] = kernel[0, 2, 4] = math.nan
    with using(backend):
        assert dpp_map(kernel, 7).tolist() == [[4, 0, 5, 1, 2, 3, -1]]
        kernel[0, 5, 5] = math.inf
        assert dpp_map(kernel, 7).tolist() == [[5, 4, 0, 1, 2, 3, -1]]


def test_nothing_to_choose(backend):
    with using(backend):
        assert dpp_map(torch.eye(3, device=DEVICE)[None], 0).shape == (1, 0)
        assert dpp_map(torch.zeros(0, 3, 3, device=DEVICE), 2).shape == (0, 2)
        assert dpp_map(torch.zeros(1, 0, 0, device=DEVICE), 2).tolist() == [[-1, -1]]
        assert dpp_map(torch.ones(1, 1, 1, device=DEVICE), 2).tolist() == [[0, -1]]
        none = torch.zeros(1, 3, dtype=torch.bool, device=DEVICE)
        assert dpp_map(torch.eye(3, device=DEVICE)[None], 2, none).tolist() == [[-1, -1]]


def test_autocast_leaves_it_alone(backend):
    kernel = definite(1, 40)
    with using(backend):
        plain = dpp_map(kernel, 30)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(dpp_map(kernel, 30), plain)


def test_is_a_well_behaved_operator():
    kernel, valid = definite(2, 7).requires_grad_(), torch.rand(2, 7, device=DEVICE) < 0.8
    torch.library.opcheck(torch.ops.vlprune.dpp_map.default, (kernel, 3, valid, 1e-10))
    torch.library.opcheck(torch.ops.vlprune.dpp_map.default, (kernel.detach().double(), 3, None, 1e-10))


def test_compiles_into_one_graph():
    kernel = definite(2, 7)
    compiled = torch.compile(lambda x: dpp_map(x * 2, 3).sort().values, backend="eager", fullgraph=True)
    assert torch.equal(compiled(kernel), dpp_map(kernel * 2, 3).sort().values)


@needs_triton
@pytest.mark.parametrize(("block", "step", "parts"), [(4096, 4, 2), (64, 64, 64)])
def test_compiles_for_gpus(tmp_path, block, step, parts):
    types = {"kernel": "*fp32", "chosen": "*i64", "best_index": "*i32", "floor": "fp32"}
    types |= dict.fromkeys(("residual", "factors", "best"), "*fp32")
    types |= dict.fromkeys(("begin", "end", "count", "points", "kernel_sample", "kernel_row", "kernel_column"), "i32")
    least = torch.finfo(torch.float32).min
    compiles(tmp_path, "dpp_map", "_rounds", types, LEAST=least, PARTS=parts, STEP=step, BLOCK=block)
