"""Methods for videos: what they choose against their definitions, in float64 with plain lists, and that budgets are met."""

from __future__ import annotations

import math

import pytest
import torch

import vlprune
from tests import zoo
from tests.between import CLIP, CONTENTS, LAYOUTS, cosine, filled_up, image
from vlprune.integrations.layouts import tiles_in_a_row

MORE = {
    "two frames": lambda: tiles_in_a_row(2, (2, 3), video=True),
    "many frames of one patch": lambda: tiles_in_a_row(7, (1, 1), separators=1, video=True),
    "eight frames": lambda: tiles_in_a_row(8, (2, 2), video=True),
}
VIDEOS = {name: make for name, make in (LAYOUTS | MORE).items() if make().video}


def frames(img) -> list[list[int]]:
    return [[place for place in places if place >= 0] for places in img.layout.placeholder.tolist()]


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def length(row: list[float]) -> float:
    return math.sqrt(sum(x * x for x in row))


def unit(row: list[float]) -> list[float]:
    size = length(row)
    return [x / size if size else 0.0 for x in row]


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def handed_out(img, shares: list[float], scores: dict[int, float]) -> list[int]:
    """Seats of the budget go one by one to the frame whose quota is least used, of which the best token that is left goes."""
    free = [sorted(frame, key=lambda i: (-scores[i], i)) for frame in frames(img)]
    count = min(img.count, sum(map(len, free)))
    quotas = [round(count * share, 3) for share in shares]
    given = [int(bool(frame) and count >= sum(map(bool, free))) for frame in free]
    while sum(given) < count:
        open_ = [f for f in range(len(free)) if given[f] < len(free[f])]
        given[max(open_, key=lambda f: (round(quotas[f] - given[f], 4), -f))] += 1
    return filled_up([i for frame, n in zip(free, given, strict=True) for i in frame[:n]], img)


def evs_by_hand(img) -> list[int]:
    rows, own = img.features.double().tolist(), frames(img)
    change = {
        now: round(1e5 * (1 - cosine(rows[now], rows[before])))
        for first, second in zip(own, own[1:], strict=False)
        for before, now in zip(first, second, strict=True)
    }
    others = sorted(change, key=lambda i: (-change[i], i))
    return filled_up([*own[0], *others][: min(img.count, sum(map(len, own)))], img)


def vidcom2_by_hand(img) -> list[int]:
    rows, own = img.features.double().tolist(), frames(img)
    patches = sorted(i for frame in own for i in frame)
    columns = list(zip(*(rows[i] for i in patches), strict=True))
    vary = [sum((x - sum(c) / len(c)) ** 2 for x in c) / len(c) for c in columns]
    vary = [round(1e5 * v / max(*vary, 1e-30)) for v in vary]
    steady = sorted(sorted(range(len(columns)), key=lambda c: (vary[c], c))[: max(len(columns) // 2, 1)])
    short = {i: unit([rows[i][c] for c in steady]) for i in patches}

    def like(i: int, centre: list[float]) -> float:
        distance = sum((x - c) ** 2 for x, c in zip(short[i], centre, strict=True))
        return sum(math.exp(-distance / (2 * 2**power)) for power in range(-3, 2))

    video = mean([short[i] for i in patches])
    centres = [mean([short[i] for i in frame]) if frame else [] for frame in own]
    out = [-sum(like(i, video) for i in frame) / len(frame) if frame else -math.inf for frame in own]
    more = softmax([round(u, 5) / 0.01 if u > -math.inf else u for u in out])
    base = min(img.count, len(patches)) / len(patches)
    rate = [min(base * (1 + m - 1 / len(own)), 1) * len(frame) for m, frame in zip(more, own, strict=True)]
    scores = {i: -round(1e5 * (like(i, video) + like(i, c))) for f, c in zip(own, centres, strict=True) for i in f}
    return handed_out(img, [r / sum(rate) for r in rate], scores)


def v_cast_by_hand(img, temperature: float = 0.7) -> list[int]:
    rows, own = img.features.double().tolist(), frames(img)
    centre = [unit(mean([unit(rows[i]) for i in frame])) if frame else [0.0] * len(rows[0]) for frame in own]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(centre, centre[1:], strict=False)]
    steps = [step if length(step) > 1e-6 else [0.0] * len(step) for step in steps]
    bends = [round(1 - cosine(a, b), 5) for a, b in zip(steps, steps[1:], strict=False)]
    bends = [1.0, *bends, 1.0][: len(own)]
    weight = [w if frame else 0.0 for w, frame in zip(softmax([b / temperature for b in bends]), own, strict=True)]
    scores = {}
    for frame, c in zip(own, centre, strict=True):
        sizes = [length(rows[i]) for i in frame]
        span = max(sizes, default=0) - min(sizes, default=0)
        for i, size in zip(frame, sizes, strict=True):
            scores[i] = round(1e5 * (1 - cosine(rows[i], c) + ((size - min(sizes)) / span if span else 0.0)))
    return handed_out(img, [w / sum(weight) for w in weight], scores)


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("layout", LAYOUTS | MORE)
@pytest.mark.parametrize(("name", "by_hand"), [("evs", evs_by_hand), ("vidcom2", vidcom2_by_hand), ("v-cast", v_cast_by_hand)])
def test_the_choice_is_the_definitions(name, by_hand, layout, content):
    layout = (LAYOUTS | MORE)[layout]()
    if name == "evs" and not layout.video:
        assert vlprune.EVS(budget=3).plan(layout, CLIP).entering == layout.total
        return
    for budget in (1, 5, 7, 0.3, 0.5, 0.8, 10_000):
        for seed in range(3 if content == "random" else 1):
            method = vlprune.methods()[name](budget=budget)
            img = image(method, layout, content, seed)
            if name == "evs" and img.count < len(frames(img)[0]):
                continue
            assert method.select(img).keep.tolist() == by_hand(img), (budget, seed)


@pytest.mark.parametrize("name", ["evs", "vidcom2", "v-cast"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_still_meets_the_budget(name, bad):
    for make in VIDEOS.values():
        for budget in (1, 4, 0.3, 0.9):
            method = vlprune.methods()[name](budget=budget)
            img = image(method, make())
            img.features[::3] = bad
            assert len(method.select(img).keep.unique()) == img.count


def test_evs_keeps_the_first_frame_and_what_moves():
    method, layout = vlprune.EVS(budget=26), LAYOUTS["frames of a video"]()
    img = image(method, layout)
    img.features[:] = img.features[:24].repeat(4, 1)[: layout.total]
    img.features[[24 + 5, 48 + 5]], img.features[48 + 17] = -img.features[5], -img.features[17]
    assert method.select(img).keep.tolist() == [*range(24), 24 + 5, 48 + 17]
    few = image(vlprune.EVS(budget=6), layout)
    keep = vlprune.EVS(budget=6).select(few).keep
    assert len(keep.unique()) == 6
    assert keep.max() < 24


def test_v_cast_gives_more_to_the_frame_at_which_the_video_turns():
    method, layout = vlprune.VCAST(budget=16, temperature=0.1), tiles_in_a_row(7, (2, 4), video=True)
    img = image(method, layout)
    angle = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0]).repeat_interleave(8)
    img.features[:] = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)
    kept = (method.select(img).keep // 8).bincount(minlength=7).tolist()
    assert kept[3] == 8
    assert min(kept) >= 1


def test_a_frame_unlike_the_video_gets_more_of_vidcom2():
    method, layout = vlprune.VidCom2(budget=14), tiles_in_a_row(7, (2, 4), video=True)
    img = image(method, layout)
    img.features[:, :2] *= 9  # channels that vary more are left out
    img.features[:, 2:] = torch.tensor([1.0, 0.0])
    img.features[16:24, 2:] = torch.tensor([0.0, 1.0])
    kept = (method.select(img).keep // 8).bincount(minlength=7).tolist()
    assert kept[2] == max(kept) > 2


@pytest.mark.parametrize("family", [name for name, entry in zoo.FAMILIES.items() if entry.video])
def test_videos_are_told_from_images(family):
    """EVS leaves the images of a prompt whole and gives its videos the budget."""
    model = zoo.build(family)
    with vlprune.applied(model, "evs", budget=0.5):
        zoo.generate(model, zoo.prompt(family, images=(1,), words=(7,), videos=(1,)))
        report = vlprune.report(model)
    for one in report.images:
        frames = one.layout.tiles if one.video else 1
        assert len(one.kept) == (one.total // 2 if frames > 1 else one.total)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_knobs_out_of_range(temperature):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.VCAST(temperature=temperature)
