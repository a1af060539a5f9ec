"""VisPruner's choice against its definition, tile by tile in float64 with plain lists."""

from __future__ import annotations

import pytest

import vlprune
from tests.between import CONTENTS, LAYOUTS, SIGLIP, cosine, filled_up, heads_mean, image, ranked, shares
from vlprune.integrations.llava import single


def by_hand(img, important: float) -> list[int]:
    attention, hidden = img.signals.values()
    keep = []
    rows = zip(heads_mean(attention), hidden.double().tolist(), img.layout.placeholder.tolist(), shares(img), strict=True)
    for scores, features, places, count in rows:
        order = ranked(scores, places)
        first = int(count * important)
        chosen, others = order[:first], order[first:]
        while len(others) > count - first:
            even, odd = others[::2], others[1::2]
            like = [round(max((cosine(features[a], features[b]) for b in odd), default=-2.0), 6) for a in even]
            falling = sorted(range(len(even)), key=lambda i, like=like: (-like[i], i))
            leaving = min(8, len(others) - (count - first), len(even))
            others = [even[i] for i in falling[leaving:]] + odd
        keep += [places[patch] for patch in chosen + others]
    return filled_up(keep, img)


@pytest.mark.parametrize("important", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("budget", [1, 5, 0.3, 0.95, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_definitions(layout, budget, content, important):
    method = vlprune.VisPruner(budget=budget, important=important)
    img = image(method, LAYOUTS[layout](), content)
    assert method.select(img).keep.tolist() == by_hand(img, important)


def test_many_rounds():
    """144 patches, 18 of them kept, take 17 rounds of eight at most."""
    for seed in range(5):
        method = vlprune.VisPruner(budget=0.125)
        img = image(method, single(12), seed=seed)
        assert method.select(img).keep.tolist() == by_hand(img, 0.5)


def test_all_that_matters_is_one_share_and_all_that_is_left_is_the_other():
    img = image(vlprune.VisPruner(budget=9), single(6))
    assert vlprune.VisPruner(budget=9, important=1.0).select(img).keep.tolist() == by_hand(img, 1.0)
    faster = image(vlprune.FasterVLM(budget=9), single(6))
    assert by_hand(img, 1.0) == vlprune.FasterVLM(budget=9).select(faster).keep.tolist()


def test_encoders_without_cls_are_asked_what_patches_receive():
    assert vlprune.VisPruner().wants(SIGLIP) == (vlprune.ReceivedAttention(3), vlprune.Hidden(3))


@pytest.mark.parametrize("important", [-0.1, 1.1, float("nan")])
def test_knobs_out_of_range(important):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.VisPruner(important=important)
