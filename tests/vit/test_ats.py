"""ATS samples what its specification says, and a batch does not matter."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.vit import given
from tests.vit.models import PATCHES, build, images, outputs
from vlprune import ATS, BudgetError, OptionError
from vlprune.methods.ats import sampled


def naive(significance, points):
    """Rows of one image that are picked, point by point."""
    rows = sorted(range(len(significance)), key=lambda i: (significance[i], -i))
    total, levels = 0.0, []
    for row in rows:
        total += significance[row] / sum(significance)
        levels.append(total)
    if len(rows) > 1:
        levels = [(level - levels[0]) / (levels[-1] - levels[0]) for level in levels]
    start = min(level for level in levels if level > 0)
    picked = set()
    for point in range(points):
        wanted = start + (1 - start) * point / (points - 1) if points > 1 else 1.0
        picked.add(rows[min(range(len(rows)), key=lambda i, w=wanted: abs(levels[i] - w))])
    return picked


@pytest.mark.parametrize("prefix", [1, 3])
def test_the_rows_are_those_of_the_specification(prefix):
    for rows, points, seed in ((12, 6, 0), (30, 29, 1), (25, 1, 2), (20, 60, 3)):
        tokens = given.tokens(rows, prefix, 0, seed=seed, sizes=torch.ones(2, rows))
        assigned = ATS(samples=points).reduce(tokens)
        attention = given.attention_map(tokens)[:, :, 0].sum(1)
        lengths = tokens.read.values.double().transpose(1, 2).flatten(2).norm(dim=-1)
        for image in range(2):
            expected = naive((attention * lengths)[image, prefix:].tolist(), points)
            kept = [i for i, place in enumerate(assigned[image].tolist()) if place >= 0]
            assert kept == [*range(prefix), *sorted(i + prefix for i in expected)]
            assert [int(assigned[image, i]) for i in kept] == list(range(len(kept)))


def test_many_points_fall_on_one_row_that_outweighs_all_others():
    scores = torch.tensor([[1.0] * 20, [1.0] * 19 + [1e4]])
    there = torch.ones(2, 20, dtype=torch.bool)
    assert sampled(scores, there, 19).sum(1).tolist() == [19, 3]
    assert sampled(scores, there, 1).nonzero()[:, 1].tolist() == [0, 19], "one point picks the most significant row"


def test_padding_and_other_images_do_not_matter():
    scores = torch.rand(1, 14, generator=torch.Generator().manual_seed(0))
    alone = sampled(scores, torch.ones(1, 14, dtype=torch.bool), 9)
    padded = torch.cat([scores, torch.full((1, 6), 7.0)], 1)
    with_padding = sampled(padded, torch.arange(20)[None] < 14, 9)
    assert torch.equal(with_padding[:, :14], alone)
    assert not with_padding[:, 14:].any()


def test_whatever_the_rows_something_stays():
    for tokens in given.adversarial(rows=11, leaving=0).values():
        kept = (ATS(samples=5).reduce(tokens) >= 0).sum(1)
        assert ((kept >= 2) & (kept <= 6)).all()
    one = given.tokens(2, 1, 0)
    assert ATS(samples=5).reduce(one).tolist() == [[0, 1], [0, 1]]


def test_in_a_model_images_keep_different_numbers():
    model, pixels = build("dinov2"), images(4)
    pixels[1] = 0.0
    before = outputs(model, pixels)
    vlprune.apply(model, "ats", samples=20)
    batch, maps = outputs(model, pixels), vlprune.report(model).assignment
    kept = [len({row for row in image if row > 0}) for image in maps]
    assert len(set(kept)) > 1
    assert max(kept) == vlprune.report(model).counts[-1] <= 20
    for image in range(4):
        alone = outputs(model, pixels[image : image + 1])
        assert vlprune.report(model).assignment == maps[image : image + 1]
        torch.testing.assert_close(alone[0], batch[0][image : image + 1], atol=1e-4, rtol=1e-4)
    vlprune.apply(model, "ats", budget=1.0)
    assert all(map(torch.equal, outputs(model, pixels), before))


def test_counts_are_upper_bounds_and_options():
    assert ATS(budget=0.5).counts(196, 12) == [196] * 3 + [65] * 9
    assert ATS(samples=196).counts(196, 12) == [196] * 12
    assert ATS(samples=10, at=[2]).counts(PATCHES, 4) == [PATCHES] * 2 + [10, 10]
    assert [ATS(samples=196).acts(block, 12) for block in (2, 3, 11)] == [False, True, True]
    with pytest.raises(BudgetError, match="block 3"):
        ATS(budget=0.2).counts(196, 12)
    with pytest.raises(OptionError):
        ATS(samples=0)
