"""Rows that a user has got hold of become dense, and dense features become as few as the model computed."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests import zoo
from tests.vit.matrix import close, equal
from tests.vit.models import PREFIX, build, images, outputs
from vlprune.engine.vit.report import VitReport


def naive(features, assignment, sizes, count):
    """Means and sizes of one image, row by row in float64."""
    rows, mass = torch.zeros(count, features.shape[1], dtype=torch.float64), [0.0] * count
    for row, place, size in zip(features.double(), assignment.tolist(), sizes.tolist(), strict=True):
        if place >= 0:
            rows[place] += size * row
            mass[place] += size
    return torch.stack([row / (size or 1.0) for row, size in zip(rows, mass, strict=True)]), mass


def test_merging_is_a_mean_by_size_and_unmerging_hands_out_copies():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 9, 4, generator=generator, requires_grad=True)
    assignment = torch.tensor([[0, 1, 1, 2, -1, 3, 1, 3, 0], [3, 2, 1, 0, 0, -1, -1, 2, 3]])
    sizes = torch.randint(1, 5, (2, 9), generator=generator).float()
    for weights, count in ((None, 4), (sizes, None), (sizes, 6)):
        rows, mass = vlprune.merge(features, assignment, weights, count)
        for image in range(2):
            ones = sizes[image] if weights is not None else torch.ones(9)
            expected, expected_mass = naive(features[image].detach(), assignment[image], ones, count or 4)
            torch.testing.assert_close(rows[image].double(), expected)
            assert mass[image].tolist() == expected_mass
        fill = torch.randn(2, 4, generator=generator)
        for given in (None, fill):
            dense = vlprune.unmerge(rows, assignment, given)
            for image in range(2):
                for place, row in zip(assignment[image].tolist(), dense[image], strict=True):
                    dropped = torch.zeros(4) if given is None else fill[image]
                    assert torch.equal(row, rows[image, place] if place >= 0 else dropped)
    (gradient,) = torch.autograd.grad(dense.sum(), features)
    assert gradient[assignment >= 0].abs().min() > 0
    assert not gradient[assignment < 0].any()
    half, mass = vlprune.merge(features.bfloat16(), assignment)
    assert (half.dtype, mass.dtype, vlprune.unmerge(half, assignment, fill).dtype) == (
        torch.bfloat16,
        torch.float32,
        half.dtype,
    )


@pytest.mark.parametrize("base", ["vit", "siglip", "registers"])
@torch.no_grad()
def test_rows_between_blocks_become_what_the_model_itself_hands_out(base):
    model, pixels, prefix, seen = build(base), images(), PREFIX[base], []
    for options in ({"method": "tome"}, {"method": "random-patches"}, {"method": "tome", "budget": 1.0}):
        vlprune.apply(model, **{"budget": 0.6, **options})
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        blocks = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
        hook = blocks[1].register_forward_hook(lambda block, args, out: seen.append(out if torch.is_tensor(out) else out[0]))
        expected = outputs(model, pixels)
        hook.remove()
        rows, (places, sizes) = seen.pop(), vlprune.assignment(model, 1)
        assert places.shape == states[2].shape[:2]
        assert rows.shape[:2] == sizes.shape
        free, weights = rows[:, prefix:], sizes[:, prefix:, None]
        fill = (free * weights).sum(1) / weights.sum(1)
        assert close([vlprune.unmerge(rows, places, fill)], [states[2]], 1e-6)
        merged, counted = vlprune.merge(states[2], places)
        assert close([merged], [rows], 1e-6)
        assert torch.equal(counted, sizes)
        assert all(map(torch.equal, vlprune.assignment(model, 1), vlprune.assignment(model, -3)))
        report = vlprune.report(model)
        assert isinstance(report, VitReport)
        assert vlprune.assignment(model)[0].tolist() == report.assignment
        assert equal(outputs(model, pixels), expected)


def test_there_is_none_of_what_has_not_run_and_of_other_models():
    model = build("vit")
    with pytest.raises(vlprune.NotAppliedError, match="no method"):
        vlprune.assignment(model)
    vlprune.apply(model, "tome", budget=0.5)
    with pytest.raises(vlprune.NotAppliedError, match="not seen an image"):
        vlprune.assignment(model)
    outputs(model, images())
    with pytest.raises(vlprune.OptionError, match="-4 to 3"):
        vlprune.assignment(model, 4)
    model = vlprune.apply(zoo.build("llava"), "random", budget=0.5)
    with torch.no_grad():
        model(**zoo.prompt("llava"))
    with pytest.raises(vlprune.UnsupportedMethodError, match=r"random.*report"):
        vlprune.assignment(model)
