"""``bipartite_match``: the kernel, in Triton's interpreter or on a GPU, and the reference against the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import bipartite_match, using
from vlprune.kernels.bipartite_match import reference

ALL_DTYPES = st.sampled_from(DTYPES)


def compared(source: Tensor, target: Tensor, normalise: bool, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The whole matrix in float64, one source and one target after the other."""
    left, right = source.double(), target.double()
    if normalise:
        left = left / left.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        right = right / right.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    best = torch.full(source.shape[:2], -math.inf, dtype=torch.float64)
    index = torch.zeros(source.shape[:2], dtype=torch.int64)
    for sample, rows in enumerate((left @ right.mT).tolist()):
        for row, scores in enumerate(rows):
            for column, score in enumerate(scores):
                if (valid is None or valid[sample, column]) and score > best[sample, row]:
                    best[sample, row], index[sample, row] = score, column
    return best.to(source.device), index.to(source.device)


def draw_shape(data) -> tuple[int, int, int, int]:
    """Samples, sources, targets, width."""
    return tuple(data.draw(st.integers(low, high)) for low, high in ((1, 3), (0, 21), (0, 21), (1, 19)))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(data=st.data())
def test_equal_products_go_to_the_lowest_index(backend, data):
    """Small integers: products are exact in every dtype, and ties abound."""
    batch, sources, targets, width = draw_shape(data)
    dtype = data.draw(ALL_DTYPES)
    source = torch.randint(-1, 2, (batch, sources, width), device=DEVICE).to(dtype)
    target = torch.randint(-1, 2, (batch, targets, width), device=DEVICE).to(dtype)
    valid = torch.rand(batch, targets, device=DEVICE) < 0.7 if data.draw(st.booleans()) else None
    with using(backend):
        similarity, index = bipartite_match(source, target, normalise=False, valid=valid)
    wanted, places = compared(source, target, False, valid)
    assert similarity.dtype == torch.float32
    assert torch.equal(similarity.double(), wanted)
    assert torch.equal(index, places)


@needs_triton
@settings(max_examples=15)
@given(data=st.data())
def test_equal_cosines_go_to_the_same_target_on_both(data):
    """Products of integers are exact, what they are scaled by is shared: kernel and reference agree to the last bit."""
    batch, sources, targets, width = draw_shape(data)
    source = torch.randint(-1, 2, (batch, sources, width), device=DEVICE).to(torch.bfloat16)
    target = torch.randint(-1, 2, (batch, targets, width), device=DEVICE).to(torch.bfloat16)
    with using("reference"):
        wanted = bipartite_match(source, target)
    with using("triton"):
        found = bipartite_match(source, target)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(data=st.data())
def test_cosines(backend, data):
    batch, sources, targets, width = draw_shape(data)
    source = torch.randn(batch, sources, width, device=DEVICE).to(data.draw(ALL_DTYPES))
    target = torch.randn(batch, targets, width, device=DEVICE).to(source.dtype)
    with using(backend):
        similarity, index = bipartite_match(source, target)
    wanted, _ = compared(source, target, True)
    assert torch.allclose(similarity.double(), wanted, atol=1e-5)
    if targets:
        partners = target.double().gather(1, index[..., None].expand(-1, -1, width))
        reached = torch.cosine_similarity(source.double(), partners, dim=-1)
        assert torch.allclose(reached, wanted, atol=1e-5)  # whichever of near-equals was chosen


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks_of_everything(backend, monkeypatch):
    """More sources, targets and dimensions than a block; views that are strided and not dense; one target wins by a bit."""
    monkeypatch.setattr(reference, "AT_ONCE", 4000)
    tokens = torch.randint(-2, 3, (2, 300, 3, 70), device=DEVICE).float()
    source, target = tokens[:, :140:2, 0], tokens.transpose(2, 3)[:, 1::2, :, 1]
    valid = (torch.arange(150, device=DEVICE) % 3 != 0).expand(2, -1)
    with using(backend):
        similarity, index = bipartite_match(source, target, normalise=False, valid=valid)
    products = (source @ target.mT).masked_fill(~valid[:, None], -math.inf)
    wanted, places = products.max(-1)
    assert torch.equal(similarity, wanted)
    assert torch.equal(index, places)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalise", [True, False])
def test_what_is_not_a_number_never_wins(backend, normalise):
    source = torch.tensor([[[1.0, 0.0], [math.nan, 1.0], [0.0, 0.0]]], device=DEVICE)
    target = torch.tensor([[[math.nan, 0.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]], device=DEVICE)
    with using(backend):
        similarity, index = bipartite_match(source, target, normalise=normalise)
        none, nowhere = bipartite_match(source, target, normalise, torch.zeros(1, 5, dtype=torch.bool, device=DEVICE))
    assert index.tolist() == [[2 if normalise else 4, 0, 1]]
    assert similarity[0].tolist() == pytest.approx([math.sqrt(0.5) if normalise else 2.0, -math.inf, 0.0])
    assert none.tolist() == [[-math.inf] * 3]
    assert nowhere.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities(backend):
    """As products they are numbers like others; a cosine with one is none."""
    source = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]], device=DEVICE)
    target = torch.tensor([[[1.0, 1.0], [math.inf, 0.0]]], device=DEVICE)
    with using(backend):
        plain, cosine = bipartite_match(source, target[:, :, :1].expand(-1, -1, 2), False), bipartite_match(source, target)
    assert plain[0].tolist() == [[math.inf, 0.0]]
    assert plain[1].tolist() == [[1, 0]]
    assert cosine[1].tolist() == [[0, 0]]
    assert cosine[0][0].tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_it_alone(backend):
    source, target = torch.randn(1, 5, 40, device=DEVICE), torch.randn(1, 9, 40, device=DEVICE)
    with using(backend):
        plain = bipartite_match(source, target)
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = bipartite_match(source, target)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients(backend, normalise):
    source = torch.randn(2, 5, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    target = torch.randn(2, 4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    valid = torch.tensor([[True, False, True, True], [False] * 4], device=DEVICE)

    def matched(source: Tensor, target: Tensor) -> Tensor:
        similarity, _ = bipartite_match(source, target, normalise, valid)
        return similarity[0]  # the other sample has no targets

    with using(backend):
        assert torch.autograd.gradcheck(matched, (source, target))
        similarity, _ = bipartite_match(source.float(), target.float(), normalise, valid)
        (of_source,) = torch.autograd.grad(similarity.sum(), source)
    assert of_source[0].any()
    assert not of_source[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_has_no_gradients(backend):
    """It has no direction. The limit of its gradients would be infinite, and filler is made of such rows."""
    source = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], device=DEVICE, requires_grad=True)
    target = torch.tensor([[[0.0, 0.0], [-1.0, 2.0]]], device=DEVICE, requires_grad=True)
    for valid in (None, torch.tensor([[True, False]], device=DEVICE)):
        with using(backend):
            similarity, _ = bipartite_match(source, target, valid=valid)
            of_source, of_target = torch.autograd.grad(similarity.sum(), (source, target))
        assert not of_source[0, 0].any()
        assert not of_target[0, 0].any()
        assert bool(of_source[0, 1].any()) == (valid is None)


def test_is_a_well_behaved_operator():
    """Fake tensors, autograd and schema agree with what it does: ``torch.compile`` can rely on them."""
    source, target = torch.randn(2, 5, 3, device=DEVICE, requires_grad=True), torch.randn(2, 4, 3, device=DEVICE)
    valid = torch.rand(2, 4, device=DEVICE) < 0.8
    torch.library.opcheck(torch.ops.vlprune.bipartite_match.default, (source, target, True, valid))
    torch.library.opcheck(torch.ops.vlprune.bipartite_match.default, (source.detach().half(), target.half(), False, None))


def test_compiles_into_one_graph():
    source, target = torch.randn(2, 5, 3, device=DEVICE), torch.randn(2, 4, 3, device=DEVICE)
    compiled = torch.compile(lambda a, b: bipartite_match(a * 2, b), backend="eager", fullgraph=True)
    for found, wanted in zip(compiled(source, target), bipartite_match(source * 2, target), strict=True):
        assert torch.equal(found, wanted)


@needs_triton
@pytest.mark.parametrize(("kind", "block_t", "block_d"), [("bf16", 128, 64), ("fp32", 64, 32)])
def test_compiles_for_gpus(tmp_path, kind, block_t, block_d):
    types = {"source": f"*{kind}", "target": f"*{kind}", "valid": "*u8", "best": "*fp32", "index": "*i64"}
    types |= {"source_scale": "*fp32", "target_scale": "*fp32"}
    types |= {f"{side}_{what}": "i32" for side in ("source", "target") for what in ("sample", "row", "dim")}
    types |= dict.fromkeys(("sources", "targets", "width", "length"), "i32")
    constants = {"NORMALISE": True, "VALID": True, "BLOCK_S": 64, "BLOCK_T": block_t, "BLOCK_D": block_d}
    compiles(tmp_path, "bipartite_match", "_bipartite_match", types, **constants)
