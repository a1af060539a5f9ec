"""VisionZip's choice and what it merges against their definitions, tile by tile in float64 with plain lists."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.between import CONTENTS, LAYOUTS, SIGLIP, cosine, filled_up, heads_mean, image, ranked, shares
from vlprune.engine.merging import merged
from vlprune.integrations.llava import single


def by_hand(img, part: float) -> tuple[list[int], dict[int, list[float]]]:
    """What is kept, and the features of tokens that others have joined."""
    attention, keys = img.signals.values()
    features = img.features.double().tolist()
    keep, changed = [], {}
    rows = zip(heads_mean(attention), heads_mean(keys), img.layout.placeholder.tolist(), shares(img), strict=True)
    for scores, tile_keys, places, count in rows:
        contextual = round(count * part)
        dominant = ranked(scores, places)[: count - contextual]
        others = [patch for patch, place in enumerate(places) if place >= 0 and patch not in dominant]
        step = max(1, len(others) // contextual) if contextual else 1
        centres = others[::step][:contextual]
        joined: dict[int, list[int]] = {patch: [] for patch in centres}
        for patch in others:
            if patch not in centres and centres:
                like = [round(cosine(tile_keys[patch], tile_keys[centre]), 6) for centre in centres]
                joined[centres[like.index(max(like))]].append(patch)
        keep += [places[patch] for patch in dominant + centres]
        for centre, patches in joined.items():
            if patches:
                own = features[places[centre]]
                means = [sum(features[places[p]][i] for p in patches) / len(patches) for i in range(len(own))]
                changed[places[centre]] = [(a + b) / 2 for a, b in zip(own, means, strict=True)]
    return filled_up(keep, img), changed


@pytest.mark.parametrize("part", [0.0, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("budget", [1, 7, 0.3, 0.95, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_and_the_merged_features_are_the_definitions(layout, budget, content, part):
    method = vlprune.VisionZip(budget=budget, contextual=part)
    img = image(method, LAYOUTS[layout](), content)
    selection = method.select(img)
    keep, changed = by_hand(img, part)
    assert selection.keep.tolist() == keep
    found = merged(img.features, selection)
    for place in keep:
        expected = torch.tensor(changed.get(place, img.features[place].tolist()))
        torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("budget", "contextual"), [(64, 10), (128, 20), (192, 30), (32, 5)])
def test_the_published_budgets_of_llava_15(budget, contextual):
    method = vlprune.VisionZip(budget=budget)
    selection = method.select(image(method, single(24)))
    assert len(selection.keep) == budget
    assert selection.merge is not None
    assert len(selection.merge.target.unique()) - 1 == contextual
    assert int((selection.merge.target < 0).sum()) == budget - contextual


def test_encoders_without_cls_are_asked_what_patches_receive():
    assert vlprune.VisionZip().wants(SIGLIP) == (vlprune.ReceivedAttention(3), vlprune.Keys(3))


@pytest.mark.parametrize("contextual", [-0.1, 1.1, float("nan")])
def test_knobs_out_of_range(contextual):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.VisionZip(contextual=contextual)
