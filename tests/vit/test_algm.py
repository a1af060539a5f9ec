"""ALGM merges windows and pairs as its specification says."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import vlprune
from tests.vit import given
from tests.vit.models import PATCHES, build, images, outputs
from vlprune import ALGM, BudgetError, OptionError


def cosine(rows, i, j):
    return float(rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()))


def naive_windows(rows, prefix, grid, leaving, threshold):
    """Groups of one image's rows, in the new order: protected rows, windows that merged, what is left in raster order."""
    groups, alike = [], {}
    for top in range(0, grid[0] - 1, 2):
        for left in range(0, grid[1] - 1, 2):
            cell = [prefix + (top + y) * grid[1] + left + x for y in (0, 1) for x in (0, 1)]
            alike[tuple(cell)] = statistics.mean(cosine(rows, i, j) for i in cell for j in cell if i != j)
    for cell in sorted(alike, key=lambda cell: -alike[cell]):
        lost = (3 if alike[cell] >= threshold else 0) if threshold is not None else min(3, leaving)
        leaving -= lost
        if lost:
            groups.append(list(cell[: lost + 1]))
    merged = {row for group in groups for row in group}
    rest = [[row] for row in range(prefix, len(rows)) if row not in merged]
    return [*[[row] for row in range(prefix)], *sorted(groups), *rest]


def naive_pairs(rows, prefix, leaving, layer):
    """Likewise for pairs, those that stand out where a ``layer`` is given."""
    even, odd = ([i for i in range(prefix, len(rows)) if i % 2 == side] for side in (0, 1))
    best = {i: max(odd, key=lambda j, i=i: cosine(rows, i, j)) for i in even}
    value = {i: cosine(rows, i, best[i]) for i in even}
    gone = sorted(even, key=lambda i: -value[i])[:leaving]
    if layer is not None:
        limit = statistics.mean(value.values()) + statistics.stdev(value.values()) / layer
        gone = [i for i in even if value[i] > limit]
    left = [i for i in even if i not in gone]
    return [*[[i] for i in range(prefix)], *[[i] for i in left], *[[*(i for i in gone if best[i] == j), j] for j in odd]]


def places(groups, rows):
    return [next(place for place, group in enumerate(groups) if row in group) for row in range(rows)]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_windows_and_pairs_are_those_of_the_specification(prefix):
    for grid, leaving in (((4, 6), 7), ((5, 5), 12), ((2, 4), 1), ((6, 4), 9)):
        rows = prefix + grid[0] * grid[1]
        for threshold in (None, 0.1):
            method = ALGM(grid=grid, threshold=threshold)
            ones = torch.ones(2, rows)
            first = given.tokens(rows, prefix, leaving, seed=rows, block=0, blocks=12, sizes=ones)
            later = given.tokens(rows, prefix, leaving, seed=rows, block=4, blocks=12, sizes=ones)
            assigned, pairs = method.reduce(first), method.reduce(later)
            for image, hidden in enumerate(first.hidden.double()):
                groups = naive_windows(hidden, prefix, grid, leaving, threshold)
                assert assigned[image].tolist() == places(groups, rows)
                groups = naive_pairs(hidden, prefix, leaving, None if threshold is None else 5)
                assert pairs[image].tolist() == places(groups, rows)


def test_whatever_the_rows_the_choice_is_complete():
    for leaving in (1, 5):
        for block in (0, 4, 7):
            for tokens in given.adversarial(rows=17, leaving=leaving, block=block, blocks=12).values():
                given.complete(tokens, ALGM().reduce(tokens))
    for tokens in given.adversarial(rows=17, leaving=0, block=4, blocks=12).values():
        assert (ALGM(threshold=0.9).reduce(tokens) >= 0).all()


class Halves:
    """A hook that makes the left half of each of the first ``count`` images one colour, so that its patches are alike."""

    def __init__(self, count):
        self.count = count

    def __call__(self, module, args, out):
        grid = out[:, 1:].unflatten(1, (6, 6)).clone()
        grid[: self.count, :, :4] = grid[: self.count, :1, :1]
        return torch.cat([out[:, :1], grid.flatten(1, 2)], 1)


def test_with_a_threshold_images_keep_different_numbers_and_a_batch_does_not_matter():
    """The official code merges as many as the image that merges least."""
    model, pixels = build("dinov2"), images(3)
    hook = model.embeddings.register_forward_hook(Halves(1))
    vlprune.apply(model, "algm", threshold=0.9)
    batch, maps = outputs(model, pixels), vlprune.report(model).assignment
    kept = [len(set(image)) - 1 for image in maps]
    assert kept[0] <= PATCHES - 18, "six windows of one colour"
    assert min(kept[1:]) > kept[0]
    assert vlprune.report(model).counts[-1] == max(kept)
    hook.remove()
    for image in range(3):
        hook = model.embeddings.register_forward_hook(Halves(1 if image == 0 else 0))
        alone = outputs(model, pixels[image : image + 1])
        assert vlprune.report(model).assignment == maps[image : image + 1]
        torch.testing.assert_close(alone[0], batch[0][image : image + 1], atol=1e-4, rtol=1e-4)
        hook.remove()


def test_counts_grids_and_options():
    assert ALGM().where(12) == [0, 4]
    counts = ALGM(budget=0.5).counts(196, 12)
    assert sum(counts) == 196 * 6
    assert len(set(counts)) <= 4, "two stages, and what they leave over"
    assert ALGM(threshold=0.88).counts(196, 12) == [196] * 12
    with pytest.raises(OptionError, match="rows, columns"):
        ALGM().reduce(given.tokens(13, 1, 3, block=0, blocks=12))
    with pytest.raises(BudgetError, match="windows"):
        ALGM(grid=(3, 3)).reduce(given.tokens(9, 0, 4, block=0, blocks=12))
    with pytest.raises(BudgetError, match="pairs them"):
        ALGM(budget=0.2).counts(196, 12)
    for wrong in ({"threshold": 1.5}, {"threshold": math.nan}, {"at": [3]}, {"at": [3, 3]}):
        with pytest.raises(OptionError):
            ALGM(**wrong)
