"""HoloV's choice against its definition, run by run in float64 with plain lists."""

from __future__ import annotations

import pytest

import vlprune
from tests.between import CONTENTS, LAYOUTS, SIGLIP, cosine, filled_up, heads_mean, image
from vlprune.integrations.llava import single

CLS = vlprune.ClsAttention(2)


def score(attention: list[float], features: list[list[float]], variety: float) -> float:
    n = len(attention)
    if n == 1:
        return attention[0]
    variances = []
    for i in range(n):
        row = [0.0 if i == j else cosine(features[i], features[j]) for j in range(n)]
        mu = sum(row) / (n - 1)
        variances.append(sum((s - mu) ** 2 for s in row) / (n - 1))
    scaled = [1000 * a for a in attention]
    mean, varies = sum(scaled) / n, sum(variances) / n
    return sum(a + variety * v * mean / (varies + 1e-6) for a, v in zip(scaled, variances, strict=True)) / n


def by_hand(img, chunks: int, variety: float) -> list[int]:
    (rows,) = (heads_mean(values) for values in img.signals.values())
    of = {}
    for row, places in zip(rows, img.layout.placeholder.tolist(), strict=True):
        of |= {place: a for a, place in zip(row, places, strict=True) if place >= 0}
    patches, features = sorted(of), img.features.double().tolist()
    count, chunks = min(img.count, len(patches)), min(chunks, len(patches))
    size, longer = divmod(len(patches), chunks)
    edges = [run * size + min(run, longer) for run in range(chunks + 1)]
    runs = [patches[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    scores = [score([of[p] for p in run], [features[p] for p in run], variety) for run in runs]
    shares = [round(s / (sum(scores) + 1e-6), 5) for s in scores]
    given = [int(share * count + 1e-3) for share in shares]
    falling = sorted(range(chunks), key=lambda run: (-shares[run], run))
    for run in falling[: count - sum(given)]:
        given[run] += 1
    kept = [min(g, len(run)) for g, run in zip(given, runs, strict=True)]
    while sum(kept) < count:  # what a run cannot take goes round the others
        for run in falling:
            if kept[run] < len(runs[run]) and sum(kept) < count:
                kept[run] += 1
    best = [sorted(run, key=lambda p: (-of[p], p))[:g] for run, g in zip(runs, kept, strict=True)]
    return filled_up([p for run in best for p in run], img)


@pytest.mark.parametrize(("chunks", "variety"), [(16, 0.09), (5, 2.0), (1, 0.0), (1000, 0.09)])
@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("budget", [1, 7, 0.3, 0.95, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_definitions(layout, budget, content, chunks, variety):
    method = vlprune.HoloV(budget=budget, chunks=chunks, variety=variety)
    img = image(method, LAYOUTS[layout](), content)
    assert method.select(img).keep.tolist() == by_hand(img, chunks, variety)


@pytest.mark.parametrize("seed", range(5))
def test_llava_15_at_its_published_budget(seed):
    method = vlprune.HoloV(budget=64)
    img = image(method, single(24), seed=seed)
    assert method.select(img).keep.tolist() == by_hand(img, 16, 0.09)


def test_a_run_that_gets_more_than_it_has_leaves_the_rest_to_the_others():
    method = vlprune.HoloV(budget=12, chunks=6)
    img = image(method, single(6), "zeros")
    img.signals[CLS][..., :6] = 0.125
    keep = method.select(img).keep
    assert keep[:6].tolist() == list(range(6))
    assert (keep // 6).bincount(minlength=6).tolist() == [6, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_still_gives_a_full_choice(bad):
    method = vlprune.HoloV(budget=9)
    img = image(method, LAYOUTS["padded above and below"]())
    img.signals[CLS][:, :, ::2] = bad
    assert len(method.select(img).keep.unique()) == 9


def test_encoders_without_cls_are_asked_what_patches_receive():
    assert vlprune.HoloV().wants(SIGLIP) == (vlprune.ReceivedAttention(3),)


@pytest.mark.parametrize("options", [{"chunks": 0}, {"chunks": 2.0}, {"variety": -1.0}, {"variety": float("nan")}])
def test_knobs_out_of_range(options):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.HoloV(**options)
