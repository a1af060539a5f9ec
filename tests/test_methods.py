"""Each method's choice, against its definition written out plainly."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

import vlprune
from tests import between, zoo
from vlprune.image import ImageLayout, ImageTokens, centres
from vlprune.integrations.layouts import tiles_in_a_row
from vlprune.integrations.llava import anyres, single
from vlprune.method import _methods
from vlprune.methods.hired import EARLY, LATE

LAYOUTS = {
    "one tile": lambda: single(6),
    "2 x 2 crops": lambda: anyres(56, 56, 4, 28, ((56, 56),)),
    "1 x 3 crops": lambda: anyres(28, 84, 4, 28, ((28, 84),)),
    "padded above and below": lambda: anyres(30, 84, 4, 28, ((56, 84),)),
    "padded left and right": lambda: anyres(84, 20, 4, 28, ((84, 28), (56, 28))),
    "LLaVA-NeXT 672 x 672": lambda: anyres(672, 672, 24, 336, ((672, 672),)),
    "a larger picture, resized": lambda: anyres(84, 56, 4, 28, ((84, 56),), most=2),
    "frames of a video": lambda: tiles_in_a_row(3, (4, 6), separators=1),
}


def image(layout: ImageLayout, budget: int | float, seed: int = 0, width: int = 5) -> ImageTokens:
    """Random features, and random [CLS] attention rows of three heads that look like softmax."""
    generator = torch.Generator().manual_seed(seed)
    patches = layout.placeholder.shape[1]
    rows = lambda: torch.randn(layout.tiles, 3, patches + 1, generator=generator).mul(2).softmax(-1)[..., 1:]  # noqa: E731
    features = torch.randn(layout.total, width, generator=generator)
    count = vlprune.Random(budget=budget).count(layout.total)
    return ImageTokens(features, layout, count, {EARLY: rows(), LATE: rows()})


# ------------------------------------------------------------------ HiRED


def hired_by_hand(img: ImageTokens, alpha: float, allocation: str) -> list[int]:
    """methods of the paper and of the official code, tile by tile with plain loops, remainders given out exactly."""
    layout = img.layout
    place = layout.placeholder.tolist()
    late = img[LATE].double().sum(1).tolist()
    early = img[EARLY][0].double().sum(0).tolist()
    patches = len(early)
    count = min(img.count, sum(layout.available))
    ranked = []
    for row, scores in zip(place, late, strict=True):
        ranked.append(sorted((p for p in range(patches) if row[p] >= 0), key=lambda p, scores=scores: (-scores[p], p)))
    if layout.tiles == 1:
        quota = [count]
    elif not layout.thumbnail:
        quota = [count // layout.tiles + (tile < count % layout.tiles) for tile in range(layout.tiles)]
    else:
        crops = layout.tiles - 1
        full = max(min(int(count * alpha), layout.available[0]), count - sum(layout.available[1:]))
        weight = [0.0] * crops
        best = sorted(range(patches), key=lambda p: (-early[p], p))[: int(patches * (1 - alpha))]
        for p in range(patches):
            if allocation == "counts":
                weight[p * crops // patches] += p in best
            else:
                row, column = divmod(p, layout.grid[1])
                crop = row * layout.crops[0] // layout.grid[0] * layout.crops[1] + column * layout.crops[1] // layout.grid[1]
                weight[crop] += early[p]
        weight = weight if sum(weight) else [1.0] * crops
        shares = [w / sum(weight) * (count - full) for w in weight]
        given = [min(math.floor(s + 1e-6), a) for s, a in zip(shares, layout.available[1:], strict=True)]
        while sum(given) < count - full:
            open_ = [c for c in range(crops) if given[c] < layout.available[c + 1]]
            winner = max(open_, key=lambda c: (round(shares[c] - given[c], 5), -c))
            given[winner] += 1
        quota = [full, *given]
    keep = [place[t][p] for t in range(layout.tiles) for p in ranked[t][: quota[t]]]
    return sorted([*keep, *layout.separators.tolist()[: img.count - count]])


@pytest.mark.parametrize("allocation", ["counts", "sums"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.4, 0.8, 0.97])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hired_selects_what_its_definition_says(layout, budget, alpha, allocation):
    img = image(LAYOUTS[layout](), budget)
    method = vlprune.HiRED(budget=budget, alpha=alpha, allocation=allocation)
    assert method.select(img).keep.tolist() == hired_by_hand(img, alpha, allocation)


@pytest.mark.parametrize("content", between.CONTENTS)
@pytest.mark.parametrize("layout", between.LAYOUTS)
def test_hired_selects_what_its_definition_says_of_adversarial_images(layout, content):
    for budget, alpha, allocation in product([1, 7, 0.3, 0.95, 10_000], [0.0, 0.5, 1.0], ["counts", "sums"]):
        method = vlprune.HiRED(budget=budget, alpha=alpha, allocation=allocation)
        img = between.image(method, between.LAYOUTS[layout](), content)
        assert method.select(img).keep.tolist() == hired_by_hand(img, alpha, allocation), (budget, alpha, allocation)


@pytest.mark.parametrize(("budget", "thumbnail"), [(576, 288), (1152, 576), (2000, 576)])
def test_hired_gives_half_of_the_budget_to_the_thumbnail_but_no_more_than_it_has(budget, thumbnail):
    """The worked budgets of LLaVA-NeXT with five tiles of 576 patches and alpha 0.5."""
    img = image(LAYOUTS["LLaVA-NeXT 672 x 672"](), budget)
    keep = vlprune.HiRED(budget=budget).select(img).keep
    assert len(keep) == budget
    assert int((keep < 576).sum()) == thumbnail


def test_hired_of_llava_15_keeps_the_best_tokens_of_the_late_layer():
    """20 % of 576 patches are 115, 40 % are 230."""
    layout = single(24)
    for budget, count in ((0.2, 115), (0.4, 230)):
        img = image(layout, budget)
        keep = vlprune.HiRED(budget=budget).select(img).keep
        assert keep.tolist() == img[LATE].sum(1)[0].topk(count).indices.sort().values.tolist()


def test_hired_does_not_look_at_what_the_padding_shows():
    """A crop's patches in the padding are never chosen, however much attention they get."""
    layout = LAYOUTS["padded above and below"]()
    img = image(layout, 0.3)
    absent = layout.placeholder < 0
    assert absent.any()
    img[LATE].permute(0, 2, 1)[absent] = 5.0
    keep = vlprune.HiRED(budget=0.3).select(img).keep
    assert len(keep) == img.count
    assert keep.min() >= 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_still_give_a_full_selection(bad):
    img = image(LAYOUTS["2 x 2 crops"](), 0.4)
    img[LATE][:, :, ::3] = bad
    assert len(vlprune.HiRED(budget=0.4).select(img).keep) == img.count


def test_equal_scores_are_broken_by_position():
    scores = torch.tensor([1.0, 3.0, 3.0, float("nan"), 3.0, -float("inf")])
    assert vlprune.top(scores, 4).tolist() == [1, 2, 4, 0]


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 1.1}, {"alpha": float("nan")}, {"allocation": "bands"}])
def test_hired_refuses_knobs_out_of_range(options):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.HiRED(**options)


# ------------------------------------------------------------------ the contract


@pytest.mark.parametrize(("name", "options"), zoo.method_cases())
def test_a_method_is_written_down_and_read_back(name, options):
    """Name and every knob survive JSON."""
    method = vlprune.methods()[name](budget=0.3, **options)
    assert vlprune.from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_a_method_from_outside_joins_by_registering():
    """It is found by name, runs, and keeps what it says."""

    @vlprune.register("first-ones")
    @dataclass(kw_only=True)
    class FirstOnes(vlprune.ScoreMethod):
        def score(self, image):
            return -torch.arange(image.layout.total, dtype=torch.float32)

    try:
        model = zoo.build("llava")
        with vlprune.applied(model, "first-ones", budget=5), torch.no_grad():
            model(**zoo.prompt("llava"))
            assert vlprune.report(model).images[0].kept == [0, 1, 2, 3, 4]
    finally:
        _methods.pop("first-ones")


def test_a_method_that_misses_its_budget_is_told_so():
    class TooMany(vlprune.Method):
        def select(self, image):
            return vlprune.Selection(torch.arange(image.count + 1))

    model = zoo.build("llava")
    with vlprune.applied(model, TooMany(budget=5)), pytest.raises(vlprune.BudgetError, match="allows exactly 5 of 16"):
        model(**zoo.prompt("llava"))


@pytest.mark.parametrize("name", ["Upper", "", "9lives", "hired"])
def test_names_that_cannot_be_registered(name):
    with pytest.raises(vlprune.VLPruneError, match="letters|taken"):
        vlprune.register(name)(type("Other", (vlprune.Method,), {}))


# ------------------------------------------------------------------ baselines


@pytest.mark.parametrize("budget", [1, 5, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pool_is_the_mean_of_the_cells_that_uniform_takes_the_centres_of(layout, budget):
    from vlprune.engine.merging import merged
    from vlprune.methods.grids import divided

    img = image(LAYOUTS[layout](), budget)
    selection = vlprune.Pool(budget=budget).select(img)
    assert torch.equal(selection.keep, vlprune.Uniform(budget=budget).select(img).keep)
    pooled = merged(img.features, selection)
    places, cell = divided(img.layout, min(img.count, sum(img.layout.available)))
    for index, place in enumerate(places.tolist()):
        torch.testing.assert_close(pooled[place], img.features[cell == index].mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_spreads_over_thumbnail_and_crops_by_their_size(layout):
    img = image(LAYOUTS[layout](), 0.25)
    keep = vlprune.Uniform(budget=0.25).select(img).keep
    sizes = [region.numel() for region in img.layout.regions]
    for region, size in zip(img.layout.regions, sizes, strict=True):
        share = int(torch.isin(region, keep).sum())
        assert abs(share - img.count * size / sum(sizes)) < 1


def test_random_depends_on_its_seed_alone():
    img, again = image(LAYOUTS["2 x 2 crops"](), 0.5), image(LAYOUTS["2 x 2 crops"](), 0.5, seed=1)
    first = vlprune.Random(budget=0.5).select(img).keep
    assert torch.equal(first, vlprune.Random(budget=0.5).select(again).keep)
    assert not torch.equal(first, vlprune.Random(budget=0.5, seed=1).select(img).keep)


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next"])
def test_resize_gives_the_features_of_the_smaller_image(family):
    """What enters the LLM is what the encoder makes of the shrunken tiles, in raster order of each tile."""
    model = zoo.build(family)
    inputs = zoo.prompt(family)
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda m, a, out: seen.append(out))
    method = vlprune.Resize(budget=0.3)
    with vlprune.applied(model, method), torch.no_grad():
        features = model(**inputs).image_hidden_states
        kept = vlprune.report(model).images[0].kept
    handle.remove()
    layout = single(4) if family != "llava_next" else _layout_of(model, inputs)
    rows, columns = method.encoder_grid(layout)
    assert rows * columns < 16
    features = features.flatten(0, -2)
    tile_of = {int(p): (t, i) for t, row in enumerate(layout.placeholder) for i, p in enumerate(row) if p >= 0}
    middle = centres((4, 4), (rows, columns)).tolist()
    small = _small_features(model, inputs, (rows, columns))
    for place in kept:
        tile, patch = tile_of[place]
        torch.testing.assert_close(features[place], small[tile, middle.index(patch)], atol=1e-5, rtol=0)


def _layout_of(model, inputs) -> ImageLayout:
    from vlprune.integrations.llava import llava_next_layouts

    return llava_next_layouts(model, inputs)[0]


def _small_features(model, inputs, grid: tuple[int, int]) -> Tensor:
    pixels = inputs["pixel_values"].flatten(0, -4)
    small = torch.nn.functional.interpolate(pixels, (grid[0] * 7, grid[1] * 7), mode="bicubic", antialias=True)
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
        prefix = int(model.config.vision_feature_select_strategy == "default")
        return model.model.multi_modal_projector(hidden[:, prefix:])


def test_resize_of_images_with_different_grids_in_one_batch():
    """Where an equal count asks for different grids, each image is as if it were alone."""
    model = zoo.build("llava_next", dtype=torch.float64)
    inputs = zoo.prompt("llava_next", images=(1, 1), words=(5, 5), seed=2, dtype=torch.float64)
    layouts = [vlprune.Resize(budget=30).encoder_grid(layout) for layout in _layouts(model, inputs)]
    assert layouts[0] != layouts[1]
    with vlprune.applied(model, "resize", budget=30), torch.no_grad():
        together = zoo.image_features(model, inputs)
        together = getattr(together, "pooler_output", together)
        for i in range(2):
            alone = zoo.image_features(model, {name: value[i : i + 1] for name, value in inputs.items()})
            torch.testing.assert_close(together[i], getattr(alone, "pooler_output", alone)[0], atol=1e-12, rtol=0)


def _layouts(model, inputs):
    from vlprune.integrations.llava import llava_next_layouts

    return llava_next_layouts(model, inputs)


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2, -2, -1])
def test_signals_equal_what_an_eager_run_gives(attention, layer):
    """[CLS] rows, keys and hidden states to 1e-5 in float32."""
    seen = {}

    @vlprune.register("signal-reader")
    class Reader(vlprune.Method):
        needs = (vlprune.ClsAttention(layer), vlprune.Keys(layer), vlprune.Hidden(layer))

        def select(self, image):
            seen.update(image.signals)
            return vlprune.Selection(torch.arange(image.count))

    _methods.pop("signal-reader")
    model, eager = zoo.build("llava_next", attention), zoo.build("llava_next", "eager")
    inputs = zoo.prompt("llava_next")
    with vlprune.applied(model, Reader(budget=0.5)), torch.no_grad():
        model(**inputs)
    tiles = seen[vlprune.ClsAttention(layer)].shape[0]
    tower = eager.model.vision_tower
    keys = []
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    handle = blocks[layer].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    with torch.no_grad():
        out = tower(inputs["pixel_values"][0, :tiles], output_attentions=True, output_hidden_states=True)
    handle.remove()
    torch.testing.assert_close(seen[vlprune.ClsAttention(layer)], out.attentions[layer][:, :, 0, 1:], atol=1e-5, rtol=0)
    hidden = out.hidden_states[layer + 1 if layer >= 0 else layer]
    torch.testing.assert_close(seen[vlprune.Hidden(layer)], hidden[:, 1:], atol=1e-5, rtol=0)
    split = keys[0][:, 1:].unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(seen[vlprune.Keys(layer)], split, atol=1e-5, rtol=0)
