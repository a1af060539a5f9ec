"""MustDrop against its definition written out plainly: pairs of patches, eager attention maps, loops over tokens."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import inside
from vlprune.errors import BudgetError, OptionError
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens
from vlprune.integrations.llava import anyres, single
from vlprune.method import Selection
from vlprune.methods.mustdrop import CLS, MEAN, TEXT, MustDrop

SHAPE = ModelShape(vision_layers=4, text_layers=8, feature_layer=2, has_cls=True)
LLAVA = ModelShape(vision_layers=24, text_layers=32, feature_layer=22, has_cls=True)
LAYOUTS = {
    "one tile": lambda: single(9),
    "a grid that 3 does not divide": lambda: single(8),
    "2 x 2 crops": lambda: anyres(84, 84, 6, 42, ((84, 84),)),
    "1 x 3 crops, padded": lambda: anyres(60, 126, 6, 42, ((84, 126),)),
    "windows in the padding": lambda: anyres(189, 63, 9, 63, ((126, 126),)),
    "much padding": lambda: anyres(126, 24, 6, 42, ((126, 42), (84, 42))),
}
LAYOUT_CASES = pytest.mark.parametrize("layout", [make() for make in LAYOUTS.values()], ids=LAYOUTS)
ADVERSARIAL = [content for content in inside.CONTENTS if content != "random"]
THRESHOLDS = {"global_threshold": 0.02, "individual_threshold": 0.03}


def best(scores: dict[Any, float], count: int) -> list:
    """Keys of the highest scores; of equal ones those that come first."""
    return [key for _, _, key in sorted((-score, place, key) for place, (key, score) in enumerate(scores.items()))][:count]


# ------------------------------------------------------------------ vision encoder


def hidden_states(layout: ImageLayout, seed: int, width: int = 4) -> Tensor:
    """Neighbours that are more or less alike: bands of columns have a direction each, with noise that grows downwards."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = layout.grid
    patch = torch.arange(rows * columns)
    base = torch.randn(layout.tiles, columns, width, generator=generator)[:, patch % columns // 3]
    noise = torch.randn(layout.tiles, rows * columns, width, generator=generator)
    return base + noise * (patch // columns / rows)[:, None] * 0.7


def windows_by_hand(layout: ImageLayout, side: int = 3) -> list[list[int]]:
    rows, columns = layout.grid
    return [
        [(top + i) * columns + left + j for i in range(side) for j in range(side)]
        for top in range(0, rows - side + 1, side)
        for left in range(0, columns - side + 1, side)
    ]


def likeness_by_hand(hidden: Tensor, window: list[int]) -> float:
    """Mean cosine similarity of the pairs of different patches."""

    def cosine(a: list[float], b: list[float]) -> float:
        lengths = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    pairs = [cosine(hidden[i].tolist(), hidden[j].tolist()) for i, j in permutations(window, 2)]
    return sum(pairs) / len(pairs)


def alike_by_hand(layout: ImageLayout, hidden: Tensor, side: int = 3) -> list[dict[int, float]]:
    """For each tile, the windows that may be merged and how much they ask for it."""
    found: list[dict[int, float]] = []
    for places, states in zip(layout.placeholder.tolist(), hidden, strict=True):
        scores = {}
        for index, window in enumerate(windows_by_hand(layout, side)):
            seen = [places[p] >= 0 for p in window]
            if all(seen):
                scores[index] = likeness_by_hand(states, window)
            elif not any(seen):
                scores[index] = math.inf
        found.append(scores)
    return found


def merged_by_hand(layout: ImageLayout, hidden: Tensor, chosen: list[list[int]], side: int = 3) -> list[dict[int, Tensor]]:
    """Patch -> state of every tile, with the chosen windows merged into their centres."""
    tiles = []
    for states, picked in zip(hidden, chosen, strict=True):
        rows = {patch: states[patch] for patch in range(len(states))}
        for index in picked:
            window = windows_by_hand(layout, side)[index]
            average = sum(states[p] for p in window) / len(window)
            for patch in window:
                del rows[patch]
            rows[window[side // 2 * side + side // 2]] = average
        tiles.append(dict(sorted(rows.items())))
    return tiles


def carried_out(hidden: Tensor, selection: Selection | None) -> list[dict[int, Tensor]]:
    """The same, from what ``encode`` returned."""
    if selection is None:
        return [dict(enumerate(states)) for states in hidden]
    assert selection.merge is not None
    assert selection.merge.weight is None
    tiles = []
    for states, keep, target in zip(hidden, selection.keep.tolist(), selection.merge.target.tolist(), strict=True):
        rows = {}
        for slot, patch in enumerate(keep):
            group = [p for p, t in enumerate(target) if t == slot]
            rows[patch] = torch.stack([states[p] for p in group]).mean(0) if group else states[patch]
        tiles.append(rows)
    return tiles


def vision(layout: ImageLayout, hidden: Tensor, shape: ModelShape = SHAPE) -> VisionTokens:
    patches = torch.arange(hidden.shape[1], device=hidden.device).expand(layout.tiles, -1)
    return VisionTokens(0, hidden, patches, layout, shape)


def same(found: list[dict[int, Tensor]], expected: list[dict[int, Tensor]]) -> None:
    assert [list(tile) for tile in found] == [list(tile) for tile in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(list(a.values()), list(b.values()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 0.95])
@LAYOUT_CASES
def test_thresholds_merge_the_windows_that_are_alike(layout, threshold, seed):
    """As many in each tile as in the tile that has the fewest."""
    method = MustDrop(**THRESHOLDS, merge_threshold=threshold)
    assert list(method.encode_layers(layout, SHAPE)) == [0]
    hidden = hidden_states(layout, seed)
    alike = alike_by_hand(layout, hidden)
    merges = min(sum(score >= threshold for score in scores.values()) for scores in alike)
    found = carried_out(hidden, method.encode(vision(layout, hidden)))
    same(found, merged_by_hand(layout, hidden, [best(scores, merges) for scores in alike]))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("budget", [0.18, 0.3, 0.6, 0.95])
@LAYOUT_CASES
def test_a_budget_merges_the_windows_that_are_most_alike(layout, budget, seed):
    method = MustDrop(budget=budget, merge_share=0.5)
    plan = method.plan(layout, SHAPE)
    hidden = hidden_states(layout, seed)
    alike = alike_by_hand(layout, hidden)
    selection = method.encode(vision(layout, hidden)) if method.encode_layers(layout, SHAPE) else None
    found = carried_out(hidden, selection)
    merges = (hidden.shape[1] - len(found[0])) // 8
    same(found, merged_by_hand(layout, hidden, [best(scores, merges) for scores in alike]))
    entering = sum(place[patch] >= 0 for place, tile in zip(layout.placeholder.tolist(), found, strict=True) for patch in tile)
    assert plan.entering == (entering if merges else max(entering, method.count(layout.total)))


@pytest.mark.parametrize("content", inside.CONTENTS)
@LAYOUT_CASES
def test_windows_of_adversarial_images(layout, content):
    """Of equal windows the first; with thresholds, and with a budget."""
    hidden = inside.CONTENTS[content][1](torch.Generator().manual_seed(0), *layout.placeholder.shape, 4)
    alike = alike_by_hand(layout, hidden)
    for options in ({"budget": 0.3}, {"budget": 0.6}, *({**THRESHOLDS, "merge_threshold": t} for t in (0.0, 0.3, 0.99))):
        method = MustDrop(**{"merge_share": 0.5, **options})
        selection = method.encode(vision(layout, hidden)) if method.encode_layers(layout, SHAPE) else None
        found = carried_out(hidden, selection)
        if "budget" in options:
            merges = (hidden.shape[1] - len(found[0])) // 8
        else:
            merges = min(sum(score >= options["merge_threshold"] for score in scores.values()) for scores in alike)
        same(found, merged_by_hand(layout, hidden, [best(scores, merges) for scores in alike]))


@pytest.mark.parametrize("side", [2, 3, 4])
def test_windows_of_other_sizes(side):
    layout = single(9)
    hidden = hidden_states(layout, 0)
    alike = alike_by_hand(layout, hidden, side)
    merges = len(alike[0]) // 2
    threshold = sum(sorted(alike[0].values())[-merges - 1 : len(alike[0]) - merges + 1]) / 2
    method = MustDrop(**THRESHOLDS, merge_threshold=threshold, window=side)
    found = carried_out(hidden, method.encode(vision(layout, hidden)))
    same(found, merged_by_hand(layout, hidden, [best(alike[0], merges)], side))


def test_of_equal_windows_the_first_ones_are_merged():
    layout = single(9)
    hidden = torch.ones(1, 81, 4)
    selection = MustDrop(budget=0.4).encode(vision(layout, hidden))
    assert selection is not None
    merged = [patch for patch, target in enumerate(selection.merge.target[0].tolist()) if target >= 0]  # pyright: ignore
    assert sorted(merged) == sorted(sum(windows_by_hand(layout)[: len(merged) // 9], []))
    assert len(merged) == 18  # a quarter of nine windows


@LAYOUT_CASES
def test_of_what_is_no_number_no_window_at_the_edge_of_the_picture_is_merged(layout):
    """So as many tokens enter as planned."""
    method = MustDrop(budget=0.3, merge_share=0.5)
    plan = method.plan(layout, SHAPE)
    hidden = torch.full((*layout.placeholder.shape, 4), torch.nan)
    found = carried_out(hidden, method.encode(vision(layout, hidden)) if method.encode_layers(layout, SHAPE) else None)
    places = layout.placeholder.tolist()
    assert sum(place[patch] >= 0 for place, tile in zip(places, found, strict=True) for patch in tile) == plan.entering


def test_a_grid_smaller_than_a_window_is_left_alone():
    layout = single(2)
    hidden = torch.ones(1, 4, 4)
    assert MustDrop(**THRESHOLDS).encode(vision(layout, hidden)) is None
    assert list(MustDrop(budget=0.5).encode_layers(layout, SHAPE)) == []


def test_the_official_windows():
    """24 x 24 patches have 64 windows; 16 of them are a quarter."""
    layout = single(24)
    assert MustDrop(budget=0.2).plan(layout, LLAVA).entering == 576 - 16 * 8
    selection = MustDrop(**THRESHOLDS).encode(vision(layout, torch.ones(1, 576, 4), LLAVA))
    assert selection is not None
    rows = torch.arange(576).view(24, 24)
    assert selection.keep[0].tolist() == rows[1::3, 1::3].flatten().tolist()


# ------------------------------------------------------------------ the key set


def after_encoder(
    layout: ImageLayout, seed: int, cls: bool = True, share: float = 0.7, content: str = "random"
) -> ImageTokens:
    """An image that has lost some of its patches, with its attention rows."""
    generator = torch.Generator().manual_seed(seed)
    tiles, patches = layout.placeholder.shape
    stays = torch.rand(tiles, patches, generator=generator) < share
    attention = inside.CONTENTS[content][0](generator, tiles, 3, patches) * stays[:, None]
    alive = layout.placeholder[stays & (layout.placeholder >= 0)].sort().values
    return ImageTokens(torch.zeros(layout.total, 2), layout, len(alive), {CLS if cls else MEAN: attention}, alive)


@pytest.mark.parametrize("content", inside.CONTENTS)
@pytest.mark.parametrize("rate", [0.08, 0.3, 1.0])
@pytest.mark.parametrize("cls", [True, False], ids=["CLS", "no CLS"])
@LAYOUT_CASES
def test_the_key_set_is_what_the_encoder_looks_at(layout, cls, rate, content):
    for seed in range(3 if content == "random" else 1):
        image = after_encoder(layout, seed, cls, content=content)
        assert image.alive is not None
        alive = set(image.alive.tolist())
        (attention,) = image.signals.values()
        expected: set[int] = set()
        for places, rows in zip(layout.placeholder.tolist(), attention.double().tolist(), strict=True):
            scores = {place: sum(row[p] for row in rows) for p, place in enumerate(places) if place in alive}
            expected |= set(best(scores, math.ceil(round(rate * len(scores), 6))))
        keep = MustDrop(keep_rate=rate, budget=0.5).select(image).keep
        assert keep.tolist() == sorted(alive)
        assert image.notes["key_set"].nonzero()[:, 0].tolist() == sorted(expected)


def test_the_official_key_set():
    """ceil(0.08 * 576) = 47 of LLaVA-1.5's patches, of equal ones the first."""
    layout = single(24)
    image = ImageTokens(torch.zeros(576, 2), layout, 576, {CLS: torch.full((1, 2, 576), 1 / 577)})
    assert MustDrop(budget=1.0).select(image).keep.tolist() == list(range(576))
    assert image.notes["key_set"].nonzero()[:, 0].tolist() == list(range(47))


@LAYOUT_CASES
def test_row_ends_go_unless_the_budget_exceeds_the_patches(layout):
    total, patches = layout.total, sum(layout.available)
    attention = torch.rand(*layout.placeholder.shape)[:, None]
    for count in {patches, (patches + total) // 2, total - 1} & set(range(patches, total)):
        method = MustDrop(budget=count)
        entering = method.plan(layout, SHAPE).entering
        assert entering == count
        image = ImageTokens(torch.zeros(total, 2), layout, entering, {CLS: attention})
        keep = method.select(image).keep.tolist()
        assert keep == sorted(set(keep))
        assert len(keep) == count
        assert set(keep) >= set(layout.placeholder[layout.placeholder >= 0].tolist())
    image = ImageTokens(torch.zeros(total, 2), layout, patches, {CLS: attention})
    assert len(MustDrop(**THRESHOLDS).select(image).keep) == patches


# ------------------------------------------------------------------ LLM


def attention_of_text(positions: list[int], seed: int, content: str, heads: int = 3) -> tuple[Tensor, dict[int, list[float]]]:
    """An eager causal attention map over 2 text tokens, the image and 4 text tokens behind it, averaged over heads.

    Returns the signal ``(1, text, N)``, and what each visual token receives from each text token behind it.
    """
    generator = torch.Generator().manual_seed(seed)
    if content != "random":
        signal = inside.CONTENTS[content][0](generator, 1, 6, len(positions))
        signal[:, :2] = 0
        return signal, {p: signal[0, 2:, i].double().tolist() for i, p in enumerate(positions)}
    length = 2 + len(positions) + 4
    query, key = torch.randn(2, heads, length, 4, generator=generator) * 1.3
    logits = query @ key.transpose(-1, -2) / 2
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    attention = logits.softmax(-1).mean(0)
    text = [0, 1, *range(length - 4, length)]
    image = range(2, length - 4)
    received = {p: [float(attention[t, j]) for t in text[2:]] for p, j in zip(positions, image, strict=True)}
    return attention[text][:, list(image)][None], received


def before_layer(image: ImageTokens, positions: list[int], layer: int, count: int, signal: Tensor) -> LayerTokens:
    n = len(positions)
    return LayerTokens(
        layer=layer,
        hidden=torch.zeros(n + 6, 2),
        visual=torch.arange(n) + 2,
        positions=torch.tensor(positions),
        last=n + 5,
        count=count,
        layout=image.layout,
        shape=SHAPE,
        signals={TEXT: signal},
        notes=image.notes,
    )


@pytest.mark.parametrize(("content", "seed"), [*(("random", seed) for seed in range(4)), *((c, 0) for c in ADVERSARIAL)])
@pytest.mark.parametrize("mode", ["thresholds", "budget"])
@LAYOUT_CASES
def test_the_llm_loses_what_the_definition_says(layout, mode, content, seed):
    """From the first of the layers to the caches."""
    options = THRESHOLDS if mode == "thresholds" else {"budget": 0.25, "merge_share": 0.0}
    method = MustDrop(**options)
    plan = method.plan(layout, SHAPE)
    image = after_encoder(layout, seed, share=1.0, content=content)
    method.select(image)
    key = set(image.notes["key_set"].nonzero()[:, 0].tolist())
    there = image.alive.tolist()
    seen = {}
    for layer in range(SHAPE.text_layers):
        if layer in plan.prefill:
            signal, received = attention_of_text(there, seed + layer, content)
            tokens = before_layer(image, there, layer, plan.prefill[layer], signal)
            sums = {p: sum(rows) for p, rows in received.items()}
            if mode == "thresholds":
                weak = {p for p in there if sums[p] < 0.02 * sum(sums.values()) and max(received[p]) < 0.03}
                expected = [p for p in there if p in key or p not in weak]
                assert len(expected) < len(there) or layer > min(plan.prefill) or content != "random"
            else:
                others = {p: total for p, total in sums.items() if p not in key}
                expected = sorted([*(p for p in there if p in key), *best(others, plan.prefill[layer] - len(key))])
            there = [there[i] for i in method.prefill(tokens).keep.tolist()]
            assert there == expected
        seen[layer] = list(there)
    assert key <= set(there)
    if mode == "budget":
        assert {layer: len(seen[layer]) for layer in plan.prefill} == plan.prefill
    for layer, count in plan.cached.items():
        entries = torch.zeros(2, len(seen[layer]), 4)
        cache = CacheTokens(layer, entries, entries, torch.tensor(seen[layer]), count, 0, layout, SHAPE, {}, image.notes)
        assert [seen[layer][i] for i in method.evict(cache).keep.tolist()] == there


def test_equal_tokens_of_the_llm_stay_in_order():
    layout = single(9)
    image = after_encoder(layout, 0, share=1.0)
    image.signals[CLS] = torch.zeros_like(image[CLS])
    image[CLS][:, :, [40, 41]] = 1.0
    method = MustDrop(budget=0.3, keep_rate=2 / 81)
    method.select(image)
    tokens = before_layer(image, list(range(81)), 2, 7, torch.full((1, 6, 81), 0.01))
    assert method.prefill(tokens).keep.tolist() == [0, 1, 2, 3, 4, 40, 41]


def test_each_threshold_alone_drops_nothing():
    """A token goes only if the text as a whole and each of its tokens look elsewhere."""
    layout = single(9)
    image = after_encoder(layout, 0, share=1.0)
    signal = torch.zeros(1, 6, 81)
    signal[0, :, :27] = 0.01  # 0.06 in sum, of 3.24
    signal[0, 5, 27:54] = 0.06  # as much in sum, from one token
    signal[0, :, 54:] = 0.0
    for thresholds, kept in [((0.1, 0.02), 54 - 27), ((0.01, 1.0), 54), ((1.0, 0.0), 81), ((0.1, 1.0), 0)]:
        method = MustDrop(global_threshold=thresholds[0], individual_threshold=thresholds[1], keep_rate=0.0)
        method.select(image)
        assert len(method.prefill(before_layer(image, list(range(81)), 2, 81, signal)).keep) == kept


# ------------------------------------------------------------------ counts


def test_the_official_layers():
    """After 2, 6, 10 and 14 of 32; the caches of 2 to 14 lose what does not survive."""
    plan = MustDrop(budget=128).plan(single(24), LLAVA)
    assert list(plan.prefill) == [3, 7, 11, 15]
    assert list(plan.cached) == list(range(2, 15))
    assert set(plan.cached.values()) == {plan.prefill[15]}
    plan = MustDrop(**THRESHOLDS).plan(single(24), LLAVA)
    assert (plan.entering, plan.prefill) == (576, dict.fromkeys([3, 7, 11, 15], 576))
    assert plan.cached == dict.fromkeys(range(2, 15), 576)


def test_layers_scale_with_the_model_or_are_given():
    def starts(depth: int, **options: Any) -> list[int]:
        return list(MustDrop(budget=0.4, **options).plan(single(24), replace(LLAVA, text_layers=depth)).prefill)

    assert starts(28) == [3, 6, 10, 13]
    assert starts(40) == [3, 9, 13, 19]  # 2.5 and 7.5, 12.5 and 17.5 round to even numbers
    assert starts(4) == [1, 2, 3]
    assert starts(2) == [1]
    assert starts(12, layers=(0, 10)) == [1, 11]
    assert MustDrop(layers=[0, 10]).layers == (0, 10)


@pytest.mark.parametrize("depth", [4, 8, 32])
@LAYOUT_CASES
def test_the_mean_over_the_layers_meets_the_budget(layout, depth):
    """Never above, and no stage could have one token more; counts fall and hold the key set."""
    shape = replace(SHAPE, text_layers=depth)
    draw = random.Random(0)
    for budget in [0.05, 0.2, 0.4, 0.9, 0.99, 5, layout.total - 1, *[draw.random() for _ in range(30)]]:
        method = MustDrop(budget=budget)
        count = method.count(layout.total)
        try:
            plan = method.plan(layout, shape)
        except BudgetError:
            assert count < 0.4 * layout.total
            continue
        there = plan.at_layers(depth)
        assert there == sorted(there, reverse=True)
        left = count * depth - sum(there)
        stages = [*plan.prefill, depth]
        assert left >= 0
        longest = max((b - a for a, b in zip(stages, stages[1:], strict=False)), default=0)
        assert left < longest or set(there) == {plan.entering}
        assert plan.cached == {
            layer: there[-1] for layer in range(depth) if plan.prefill and there[layer] > there[-1] and layer >= _first(depth)
        }


def _first(depth: int) -> int:
    return round(2 * depth / 32)


@LAYOUT_CASES
def test_a_full_budget_plans_nothing(layout):
    for budget in (1.0, 10**6):
        method = MustDrop(budget=budget)
        plan = method.plan(layout, SHAPE)
        assert (plan.entering, plan.prefill, plan.cached) == (layout.total, {}, {})
        assert list(method.encode_layers(layout, SHAPE)) == []


def test_windows_are_merged_as_the_budget_needs_it():
    layout = single(24)
    entering = lambda **options: MustDrop(**options).plan(layout, LLAVA).entering  # noqa: E731
    assert entering(budget=300) == 576 - 16 * 8
    assert entering(budget=300, merge_share=0.5) == 576 - 32 * 8
    assert entering(budget=300, merge_share=0.0) == 576
    assert entering(budget=300, merge_share=1.0) == 576 - 34 * 8 == 304  # no more: the tokens have room
    assert entering(budget=570) == 576
    # Three layers of 448 tokens and 29 of their key set of 36 are more than 32 of 64.
    assert entering(budget=64) == 576 - 25 * 8 == 376  # 3 * 376 + 29 * 31 <= 32 * 64
    with pytest.raises(BudgetError, match=r"budget=5 allows 5 of .* mustdrop allows 12 to 576.* raise the budget"):
        entering(budget=5)


# ------------------------------------------------------------------ options


def test_it_is_adaptive_if_thresholds_decide():
    assert not MustDrop().adaptive
    assert MustDrop(**THRESHOLDS).adaptive
    assert MustDrop(global_threshold=0.0, individual_threshold=0.0).adaptive


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_threshold": 0.001}, "give both"),
        ({"individual_threshold": 0.001}, "give both"),
        ({"keep_rate": 1.5}, "share from 0 to 1"),
        ({"merge_share": -0.1}, "share from 0 to 1"),
        ({"window": 1}, "int >= 2"),
        ({"layers": ()}, "ascending"),
        ({"layers": (6, 2)}, "ascending"),
        ({"layers": (2, 2)}, "ascending"),
        ({"layers": (-1, 2)}, "ascending"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        MustDrop(**options)


def test_layers_that_the_model_does_not_have_are_refused():
    with pytest.raises(OptionError, match="this model's LLM has layers 0 to 7, and allowed are 0 to 6"):
        MustDrop(layers=(2, 7)).plan(single(9), SHAPE)


def test_its_options_survive_json():
    method = MustDrop(layers=(2, 6), **THRESHOLDS)
    options = json.loads(json.dumps(method.to_dict()))
    assert options.pop("method") == "mustdrop"
    assert MustDrop(**options) == method


@LAYOUT_CASES
def test_with_a_budget_nothing_waits_for_the_device(layout):
    """Tensors on the device meta have no values that one could wait for."""
    method = MustDrop(budget=0.25)
    plan = method.plan(layout, SHAPE)
    selection = method.encode(vision(layout, hidden_states(layout, 0).to("meta")))
    assert (selection is not None) == bool(method.encode_layers(layout, SHAPE))
    image = after_encoder(layout, 0)
    image = replace(image, features=image.features.to("meta"), alive=image.alive.to("meta"))
    image.signals[CLS] = image[CLS].to("meta")
    assert len(method.select(image).keep) == image.count
    positions = torch.arange(image.count, device="meta")
    count = plan.prefill[min(plan.prefill)]
    tokens = before_layer(image, [0] * image.count, 2, count, torch.zeros(1, 6, image.count, device="meta"))
    assert len(method.prefill(replace(tokens, positions=positions)).keep) == count
    entries = torch.zeros(2, image.count, 4, device="meta")
    cache = CacheTokens(2, entries, entries, positions, 5, 0, layout, SHAPE, {}, image.notes)
    assert len(method.evict(cache).keep) == 5
