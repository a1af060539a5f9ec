"""Baselines that look at nothing: which rows leave follows from their number alone."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.vit.models import PATCHES, build, images, outputs
from tests.vit.test_vit import equal, traces
from vlprune.blocks import BlockTokens


@pytest.mark.parametrize("name", ["random-patches", "uniform-patches"])
def test_every_image_loses_the_same_rows_and_the_budget_is_met(name):
    model = build("registers classifier")
    before, found = outputs(model, images()), traces(model)
    for budget in (0.75, 0.3, 12):
        vlprune.apply(model, name, budget=budget)
        outputs(model, images(3))
        report = vlprune.report(model)
        assert sum(report.counts) == int((budget / PATCHES if isinstance(budget, int) else budget) * PATCHES * 4 + 1e-6)
        assert report.assignment[0] == report.assignment[1] == report.assignment[2]
        again = outputs(model, images())
        assert equal(outputs(model, images()), again)
    vlprune.remove(model)
    assert equal(outputs(model, images()), before)
    assert traces(model) == found


def test_even_distances_and_seeds():
    rows = torch.zeros(1, 13, 4)
    tokens = BlockTokens(rows, rows, torch.ones(1, 13), 1, 4, 0, 2)
    gone = (vlprune.UniformPatches().reduce(tokens)[0] < 0).nonzero()[:, 0].tolist()
    assert gone == [2, 5, 8, 11]
    for leaving in range(13):
        tokens = BlockTokens(rows, rows, torch.ones(1, 13), 1, leaving, 0, 2)
        for method in (vlprune.UniformPatches(), vlprune.RandomPatches()):
            assert sum(out < 0 for out in method.reduce(tokens)[0].tolist()) == leaving
    draws = [vlprune.RandomPatches(seed=seed).reduce(tokens).tolist() for seed in (0, 0)]
    assert draws[0] == draws[1]
    tokens = BlockTokens(rows, rows, torch.ones(1, 13), 1, 6, 0, 2)
    assert vlprune.RandomPatches(seed=0).reduce(tokens).tolist() != vlprune.RandomPatches(seed=1).reduce(tokens).tolist()
