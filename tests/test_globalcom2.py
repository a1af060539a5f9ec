"""GlobalCom²'s choice against its definition, crop by crop in float64 with plain lists."""

from __future__ import annotations

import math

import pytest

import vlprune
from tests.between import CLIP, CONTENTS, LAYOUTS, SIGLIP, filled_up, image, ranked, shares


def stretched(values: list[float], grid: tuple[int, int], size: tuple[int, int]) -> list[list[float]]:
    """Bilinear, pixel centres at halves, edges repeated."""

    def at(row: int, column: int) -> float:
        return values[min(max(row, 0), grid[0] - 1) * grid[1] + min(max(column, 0), grid[1] - 1)]

    def one(i: int, j: int) -> float:
        y, x = max((i + 0.5) * grid[0] / size[0] - 0.5, 0), max((j + 0.5) * grid[1] / size[1] - 0.5, 0)
        top, left = math.floor(y), math.floor(x)
        rows = [at(top + d, left) * (1 - x + left) + at(top + d, left + 1) * (x - left) for d in (0, 1)]
        return rows[0] * (1 - y + top) + rows[1] * (y - top)

    return [[one(i, j) for j in range(size[1])] for i in range(size[0])]


def unit(values: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm if norm else 0.0 for v in values]


def by_hand(img, temperature: float) -> list[int]:
    layout = img.layout
    (attention,) = img.signals.values()
    local = attention.double().clamp(min=1e-30).log().mean(1).tolist()
    placeholder, available = layout.placeholder.tolist(), layout.available
    if layout.tiles == 1 or not layout.thumbnail:
        parts = shares(img)
        keep = [places[p] for s, places, n in zip(local, placeholder, parts, strict=True) for p in ranked(s, places)[:n]]
        return filled_up(keep, img)
    count = min(img.count, sum(available))
    (rows, columns), (down, right) = layout.grid, layout.crops
    sums = [0.0] * (down * right)
    for p, score in enumerate(local[0]):
        row, column = min(p // columns // (rows // down), down - 1), min(p % columns // (columns // right), right - 1)
        sums[row * right + column] += score / temperature
    exponents = [math.exp(s - max(sums)) for s in sums]
    share = [e / sum(exponents) for e in exponents]
    ratio = [min(1.0, count / sum(available) * (1 + s - sum(share) / len(share))) for s in share]
    whole = max(count * available[0] // sum(available), count - sum(available[1:]))
    wanted = [r * n for r, n in zip(ratio, available[1:], strict=True)]
    quotas = [round(w / sum(wanted) * (count - whole), 3) for w in wanted]
    given = [min(math.floor(q + 1e-6), n) for q, n in zip(quotas, available[1:], strict=True)]
    while sum(given) < count - whole:
        free = [i for i, n in enumerate(available[1:]) if given[i] < n]
        given[max(free, key=lambda i: (round(quotas[i] - given[i], 3), -i))] += 1
    picture = layout.regions[1].tolist()
    guide = {}
    for places, values in zip(picture, stretched(local[0], layout.grid, layout.regions[1].shape), strict=True):
        guide |= dict(zip(places, values, strict=True))
    keep = [placeholder[0][p] for p in ranked(local[0], placeholder[0])[:whole]]
    for scores, places, n in zip(local[1:], placeholder[1:], given, strict=True):
        seen = [p for p, place in enumerate(places) if place >= 0]
        both = zip(unit([scores[p] for p in seen]), unit([guide[places[p]] for p in seen]), strict=True)
        total = {p: round(a + b, 6) for p, (a, b) in zip(seen, both, strict=True)}
        keep += [places[p] for p in sorted(seen, key=lambda p, total=total: (-total[p], p))[:n]]
    return filled_up(keep, img)


@pytest.mark.parametrize("temperature", [10.0, 1000.0])
@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("budget", [1, 7, 0.1, 0.3, 0.6, 0.95, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_definitions(layout, budget, content, temperature):
    method = vlprune.GlobalCom2(budget=budget, temperature=temperature)
    for seed in range(3):
        img = image(method, LAYOUTS[layout](), content, seed)
        if content == "ties":  # of logarithms: sums of the same ones in another order differ
            for values in img.signals.values():
                values[:, 1:] = values[:, :1]
        assert method.select(img).keep.tolist() == by_hand(img, temperature)


def test_the_crop_that_the_thumbnail_looks_at_keeps_more():
    method = vlprune.GlobalCom2(budget=0.3, temperature=100.0)
    layout = LAYOUTS["2 x 2 crops"]()
    img = image(method, layout, "constant")
    for values in img.signals.values():
        values[0].view(-1, 4, 4)[:, 2:, 2:] *= 16
    keep = method.select(img).keep.tolist()
    kept = [len(set(keep) & set(places)) for places in layout.placeholder.tolist()]
    assert kept[4] > max(kept[1:4])


def test_patches_in_the_padding_are_never_kept():
    method = vlprune.GlobalCom2(budget=0.9)
    img = image(method, LAYOUTS["padded above and below"]())
    for values in img.signals.values():
        values.permute(0, 2, 1)[img.layout.placeholder < 0] = 5.0
        values[1, :, 3] = float("nan")
    keep = method.select(img).keep
    assert len(keep.unique()) == img.count
    assert keep.min() >= 0


def test_the_last_block_is_asked_for():
    assert vlprune.GlobalCom2().wants(CLIP) == (vlprune.ClsAttention(3),)
    assert vlprune.GlobalCom2().wants(SIGLIP) == (vlprune.MeanAttention(3),)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_knobs_out_of_range(temperature):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.GlobalCom2(temperature=temperature)
