"""ToDRE's choice against its definition, in float64 with plain loops."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.between import CLIP, CONTENTS, LAYOUTS, SIGLIP, cosine, heads_mean, image, ranked


def by_hand(img) -> list[int]:
    (rows,) = (heads_mean(values) for values in img.signals.values())
    tiles = list(zip(rows, img.layout.placeholder.tolist(), strict=True))[: 1 if img.layout.thumbnail else None]
    firsts = [(scores[p], places[p]) for scores, places in tiles for p in ranked(scores, places)[:1]]
    chosen = [max(firsts, key=lambda first: first[0])[1]]
    features = img.features.double().tolist()
    while len(chosen) < img.count:
        left = [i for i in range(img.layout.total) if i not in chosen]
        chosen.append(min(left, key=lambda i: (round(sum(cosine(features[i], features[c]) for c in chosen), 6), i)))
    return sorted(chosen)


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("budget", [1, 2, 7, 0.3, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_definitions(layout, budget, content):
    method = vlprune.ToDRE(budget=budget)
    layout = LAYOUTS[layout]()
    img = image(method, layout, content)
    if budget == 10_000:
        assert method.select(img).keep.tolist() == list(range(layout.total))
    else:
        assert method.select(img).keep.tolist() == by_hand(img)


@pytest.mark.parametrize("content", CONTENTS)
def test_no_token_is_chosen_twice(content):
    method = vlprune.ToDRE(budget=0.9)
    img = image(method, LAYOUTS["2 x 2 crops"](), content)
    img.features[::3] = float("nan")
    assert len(method.select(img).keep.unique()) == img.count


def test_the_sum_decides_not_the_nearest():
    """After 0 and its opposite 20, all others have the sum 0: the lowest index goes first, though it is a duplicate."""
    method = vlprune.ToDRE(budget=3)
    img = image(method, LAYOUTS["one tile"](), "zeros")
    img.features[:] = torch.tensor([1.0, 0, 0, 0])
    img.features[20, 0] = -1
    img.features[30, :2] = torch.tensor([0.0, 1])
    assert method.select(img).keep.tolist() == by_hand(img) == [0, 1, 20]


def test_the_first_token_is_of_the_thumbnail_where_there_is_one():
    for name, tile in (("2 x 2 crops", 0), ("frames of a video", 2)):
        method = vlprune.ToDRE(budget=1)
        img = image(method, LAYOUTS[name]())
        for values in img.signals.values():
            values[2, :, 3] = 5.0
            values[0, :, 1] = 4.0
        assert method.select(img).keep.tolist() == [int(img.layout.placeholder[tile, 3 if tile else 1])]


def test_the_last_block_is_asked_for():
    assert vlprune.ToDRE().wants(CLIP) == (vlprune.ClsAttention(3),)
    assert vlprune.ToDRE().wants(SIGLIP) == (vlprune.MeanAttention(3),)
