"""VScan's choice, what it merges and its counts against their definitions, in float64 with plain lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlprune
from tests.between import CLIP, CONTENTS, LAYOUTS, SHAPES, SIGLIP, cosine, filled_up, heads_mean, image, ranked, shares
from tests.inside import LLAVA, before_layer, best
from vlprune.engine.merging import merged
from vlprune.integrations.llava import single
from vlprune.methods.vscan import LAST


def shown(method, layout, content="random", shape=CLIP):
    """What ``select`` is shown: signals of the vision encoder alone, and the count of its plan."""
    img = image(method, layout, content, shape=shape)
    signals = {signal: values for signal, values in img.signals.items() if signal != LAST}
    return replace(img, signals=signals, count=method.plan(layout, shape).entering)


def by_hand(method, img) -> tuple[list[int], dict[int, list[float]]]:
    scans = sorted((signal.layer, heads_mean(values)) for signal, values in img.signals.items())
    rows, columns = img.layout.grid
    across = -(-columns // method.window)
    kept, places_of = [], img.layout.placeholder.tolist()
    for local, whole, places, share in zip(scans[0][1], scans[-1][1], places_of, shares(img), strict=True):
        window = [p // columns // method.window * across + p % columns // method.window for p in range(rows * columns)]
        order, given = ranked(local, places), [0] * (max(window) + 1)
        free = [sum(window[p] == w for p in order) for w in range(len(given))]
        for _ in range(share // 2):
            given[min((w for w in range(len(given)) if given[w] < free[w]), key=lambda w: (given[w], w))] += 1
        chosen = [p for w, n in enumerate(given) for p in [q for q in order if window[q] == w][:n]]
        chosen += [p for p in ranked(whole, places) if p not in chosen][: share - len(chosen)]
        kept += [places[p] for p in chosen]
    features = img.features.double().tolist()
    kept.sort()
    joined = {k: [k] for k in kept}
    for place in sorted(p for tile in places_of for p in tile if p >= 0 and p not in joined):
        like = [round(cosine(features[place], features[k]), 6) for k in kept]
        joined[kept[like.index(max(like))]].append(place)
    width = range(len(features[0]))
    means = {k: [sum(features[i][c] for i in group) / len(group) for c in width] for k, group in joined.items()}
    return filled_up(kept, img), means


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_and_the_means_are_the_definitions(layout, content):
    for budget, window, local in ((1, 2, 0), (7, 3, 1), (0.3, 6, 5), (0.6, 4, 0), (0.97, 2, 1)):
        for shape in SHAPES.values():
            method = vlprune.VScan(budget=budget, window=window, local=local)
            img = shown(method, LAYOUTS[layout](), content, shape)
            selection = method.select(img)
            keep, means = by_hand(method, img)
            assert selection.keep.tolist() == keep, (budget, window, local)
            found = merged(img.features, selection)
            for place in keep:
                expected = torch.tensor(means.get(place, img.features[place].tolist()))
                torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-5)


def test_the_published_counts_of_llava_15():
    """64 tokens on average: 96 enter, 32 go on from layer 16. 48 of the 96 are local, three a window of 6 x 6."""
    plan = vlprune.VScan(budget=64).plan(single(24), LLAVA)
    assert (plan.entering, plan.prefill) == (96, {16: 32})
    method = vlprune.VScan(budget=64, layer=1)
    img = shown(method, single(24))
    img = replace(img, count=96)
    early = min(img.signals, key=lambda signal: signal.layer)
    img.signals[early][:] = 0
    img.signals[early][..., :6] = torch.arange(6.0)
    keep = method.select(img).keep.tolist()
    assert {3, 4, 5} <= set(keep)


@pytest.mark.parametrize("budget", [1, 3, 0.1, 0.37, 0.66, 0.9, 1.0])
@pytest.mark.parametrize("keep", [0.1, 1 / 3, 1.0])
def test_counts_meet_the_mean_over_layers(budget, keep):
    """As near as whole tokens allow: one more in front of the layer or behind it would be too many."""
    method, total = vlprune.VScan(budget=budget, keep=keep), 576
    plan = method.plan(single(24), LLAVA)
    counts = plan.at_layers(32)
    room = 32 * budget if isinstance(budget, int) else int(round(32 * budget * total, 6))
    assert room - (16 if keep < 1 else 32) < sum(counts) <= room
    assert counts[0] >= counts[-1] >= 1
    assert budget != 1.0 or plan.prefill == {}


def test_inside_the_llm_the_last_token_decides():
    for content in ("random", "ties", "zeros"):
        method = vlprune.VScan(budget=7)
        layout = single(6)
        layer, count = next(iter(method.plan(layout, CLIP).prefill.items()))
        entering = method.plan(layout, CLIP).entering
        tokens = before_layer(method, layout, layer, torch.arange(0, 36, 2)[:entering], content, shape=CLIP)
        assert method.prefill(tokens).keep.tolist() == best(tokens[LAST][0, 0].double().tolist(), count)


def test_the_blocks_that_are_asked():
    deep = replace(CLIP, vision_layers=24, feature_layer=22)
    assert vlprune.VScan().wants(deep) == (vlprune.ClsAttention(5), vlprune.ClsAttention(22), LAST)
    assert vlprune.VScan().wants(SIGLIP) == (vlprune.ReceivedAttention(3), LAST)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": 2.0}, {"local": -1}, {"layer": 0}, {"layer": True}, {"keep": 0.0}, {"keep": 1.5}]
)
def test_knobs_out_of_range(options):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.VScan(**options)


def test_a_layer_that_the_model_does_not_have():
    with pytest.raises(vlprune.OptionError, match="layers 0 to 3"):
        vlprune.VScan(layer=4).plan(single(6), CLIP)
