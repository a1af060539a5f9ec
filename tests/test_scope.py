"""SCOPE's choice against its definition, in float64 with plain loops."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.between import CONTENTS, LAYOUTS, SHAPES, SIGLIP, cosine, filled_up, heads_mean, image, shares


def by_hand(img, alpha: float) -> list[int]:
    (rows,) = (heads_mean(values) for values in img.signals.values())
    features, keep = img.features.double().tolist(), []
    for attention, places, share in zip(rows, img.layout.placeholder.tolist(), shares(img), strict=True):
        inside = [p for p, place in enumerate(places) if place >= 0]
        alike = {(p, q): cosine(features[places[p]], features[places[q]]) for p in inside for q in inside}
        covered, chosen = dict.fromkeys(inside, 0.0), []
        for _ in range(share):
            gain = {
                j: round(sum(max(0.0, alike[i, j] - covered[i]) for i in inside) * attention[j] ** alpha, 6)
                for j in inside
                if j not in chosen
            }
            chosen.append(max(gain, key=lambda j, gain=gain: (gain[j], -j)))
            covered = {i: max(c, alike[i, chosen[-1]]) for i, c in covered.items()}
        keep += [places[p] for p in chosen]
    return filled_up(keep, img)


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_definitions(layout, content):
    for budget, alpha in ((1, 1.0), (7, 0.0), (0.3, 2.0), (0.3, 1.0)):
        method = vlprune.SCOPE(budget=budget, alpha=alpha)
        img = image(method, LAYOUTS[layout](), content)
        assert method.select(img).keep.tolist() == by_hand(img, alpha), (budget, alpha)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_patches_and_row_ends_fill_up_a_large_budget(shape):
    for make in LAYOUTS.values():
        method = vlprune.SCOPE(budget=0.95)
        img = image(method, make(), shape=SHAPES[shape])
        keep = method.select(img).keep.tolist()
        assert keep == sorted(set(keep))
        assert len(keep) == img.count


def test_what_is_covered_already_is_not_chosen_again():
    """Three groups of duplicates: the first three tokens are one of each, though attention is on one group."""
    method = vlprune.SCOPE(budget=3)
    img = image(method, LAYOUTS["one tile"](), "ties")
    img.features[:] = torch.eye(4)[torch.arange(36) % 3]
    (signal,) = img.signals
    img.signals[signal] = torch.full_like(img.signals[signal], 0.01)
    img.signals[signal][..., ::3] = 0.02
    assert method.select(img).keep.tolist() == [0, 1, 2]


def test_what_is_no_number_still_gives_a_full_choice():
    method = vlprune.SCOPE(budget=9)
    img = image(method, LAYOUTS["padded above and below"]())
    img.features[::3] = float("nan")
    for values in img.signals.values():
        values[:, :, ::2] = float("nan")
    assert len(method.select(img).keep.unique()) == 9


def test_encoders_without_cls_have_a_mean_query():
    assert vlprune.SCOPE().wants(SIGLIP) == (vlprune.MeanAttention(3),)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_knobs_out_of_range(alpha):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.SCOPE(alpha=alpha)
