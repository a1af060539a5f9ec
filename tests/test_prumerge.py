"""PruMerge's choice and what it adds up against their definitions, tile by tile in float64 with plain lists."""

from __future__ import annotations

import math

import pytest
import torch

import vlprune
from tests import zoo
from tests.between import CLIP, CONTENTS, LAYOUTS, SHAPES, SIGLIP, cosine, filled_up, image, shares
from vlprune.engine.merging import merged
from vlprune.integrations.llava import single

TINY = torch.finfo(torch.float32).tiny


def one_head(heads: list[list[float]], cls: bool) -> tuple[list[float], list[float]]:
    """Logits of one wide head, and its softmax."""
    root = math.sqrt(len(heads))
    logits = [round(sum(math.log(max(row[p], TINY)) for row in heads) / root, 4) for p in range(len(heads[0]))]
    own = [sum(math.log(max(1 - sum(row), TINY)) for row in heads) / root] if cls else []
    high = max(logits + own)
    total = sum(math.exp(x - high) for x in logits + own)
    return logits, [math.exp(x - high) / total for x in logits]


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = ordered[int(place)]
    return low + (ordered[min(int(place) + 1, len(ordered) - 1)] - low) * (place - int(place))


def kept_patches(method, inside: list[int], logits: list[float], a: list[float], share: int) -> list[int]:
    order = sorted(inside, key=lambda p: (-logits[p], p))
    most = share - 1 if 1 < share < len(inside) else share
    if not method.outliers:
        sampled = round(most * method.spatial)
        best = order[: most - sampled]
        rest = [p for p in inside if p not in best]
        return best + [rest[i * len(rest) // sampled] for i in range(sampled)]
    low, high = (quantile([a[p] for p in inside], part) for part in (0.25, 0.75))
    above = max(sum(a[p] > high + 1.5 * (high - low) for p in inside), 1)
    best = order[: min(above, most)]
    if method.spatial:
        stride = max(int(int(len(inside) / above) / 3), 1)
        best = best + [p for p in inside[:-1][::stride] if p not in best][: most - len(best)]
    return best


def by_hand(method, img, cls: bool) -> dict[int, list[float]]:
    """Features of the kept tokens by prompt index."""
    attention, keys = (values.double().tolist() for values in img.signals.values())
    features = img.features.double().tolist()
    result = {}
    for heads, tile_keys, places, share in zip(attention, keys, img.layout.placeholder.tolist(), shares(img), strict=True):
        inside = [p for p, place in enumerate(places) if place >= 0]
        if share == 0:
            continue
        joined = [[x for head in tile_keys for x in head[p]] for p in range(len(places))]
        logits, a = one_head(heads, cls)
        kept = kept_patches(method, inside, logits, a, share)

        def total(patches, weights, places=places):
            rows = [[w * x for x in features[places[p]]] for p, w in zip(patches, weights, strict=True)]
            return [sum(column) for column in zip(*rows, strict=True)]

        for p in kept:
            others = [q for q in inside if q != p]
            near = sorted(others, key=lambda q: (-round(cosine(joined[p], joined[q]), 5), q))[: method.neighbours]
            result[places[p]] = total([p, *near], [1.0, *(a[q] for q in near)])
        rest = [p for p in inside if p not in kept]
        if rest and len(kept) < share:
            result[places[min(rest, key=lambda p: (-logits[p], p))]] = total(rest, [a[p] for p in rest])
    return result


OPTIONS = [
    {"neighbours": 4},
    {"neighbours": 0, "spatial": 0.4},
    {"spatial": 1.0},
    {"neighbours": 3, "outliers": True},
    {"neighbours": 2, "outliers": True, "spatial": 0.75},
]


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_and_the_sums_are_the_definitions(layout, shape, content):
    for options in OPTIONS:
        for budget in (1, 7, 0.3, 0.95, 10_000):
            method = vlprune.PruMerge(budget=budget, **options)
            img = image(method, LAYOUTS[layout](), content, shape=SHAPES[shape])
            selection = method.select(img)
            expected = by_hand(method, img, shape == "[CLS]")
            keep = sorted(expected) if method.outliers else filled_up(list(expected), img)
            assert selection.keep.tolist() == keep, (options, budget)
            found = merged(img.features, selection)
            wanted = [expected.get(place, img.features[place].tolist()) for place in keep]
            torch.testing.assert_close(found[keep], torch.tensor(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [True, False])
def test_the_attention_is_that_of_one_wide_head(cls):
    """Against queries and keys themselves, of which heads know a part each."""
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 8, generator=generator), torch.randn(4, 37, 8, generator=generator)
    keys = keys if cls else keys[:, 1:]
    heads = (torch.einsum("hc,hnc->hn", query, keys) / 8**0.5).softmax(-1)
    wide = (torch.einsum("hc,hnc->n", query, keys) / 32**0.5).softmax(-1)
    method = vlprune.PruMerge(budget=2, neighbours=0)
    img = image(method, single(6), shape=CLIP if cls else SIGLIP)
    attention = method.wants(CLIP if cls else SIGLIP)[0]
    img.signals[attention] = heads[None, :, 1:] if cls else heads[None]
    img.features[:, :] = torch.eye(36)[:, :4]
    selection = method.select(img)
    wide = wide[1:] if cls else wide
    best = int(wide.argmax())
    other = int(selection.keep[selection.keep != best][0])
    expected = wide.clone()
    expected[best] = 0
    found = selection.merge.weight[selection.keep.tolist().index(other)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_three_of_four_patches_of_prumerge_plus_are_sampled():
    method = vlprune.PruMergePlus(budget=145, neighbours=0)
    img = image(method, single(24), "zeros")
    img.signals[method.wants(CLIP)[0]][..., -36:] = 0.02
    assert method.select(img).keep.tolist() == sorted([1, *range(0, 540, 5), *range(540, 576)])


def test_what_is_no_number_still_gives_a_full_choice():
    method = vlprune.PruMerge(budget=9)
    img = image(method, LAYOUTS["padded above and below"]())
    for values in img.signals.values():
        values[:, :, ::2] = float("nan")
    assert len(method.select(img).keep.unique()) == 9


def test_gradients_reach_all_that_was_added():
    method = vlprune.PruMerge(budget=4)
    img = image(method, single(6))
    features = img.features.clone().requires_grad_()
    selection = method.select(img)
    merged(features, selection)[selection.keep].sum().backward()
    torch.testing.assert_close(features.grad[:, 0], selection.merge.weight.sum(0))


def test_how_many_stay_may_follow_from_the_attention():
    """Kept whole in front of the LLM by its own count, which no budget fixes."""
    model = zoo.build("llava")
    with vlprune.applied(model, "prumerge", budget=12, outliers=True):
        zoo.generate(model, zoo.prompt("llava"))
        report = vlprune.report(model)
    assert 1 <= len(report.images[0].kept) <= 12


@pytest.mark.parametrize("options", [{"neighbours": -1}, {"neighbours": 2.0}, {"spatial": 1.1}, {"spatial": float("nan")}])
def test_knobs_out_of_range(options):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.PruMerge(**options)


def test_a_mixture_of_several_tiles_is_that_of_each():
    """As ``encode`` may give it: a choice and weights for every tile; what is not kept stays as it was."""
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(3, 6, 4, generator=generator), torch.randn(3, 2, 6, generator=generator)
    keep = torch.tensor([[0, 3], [1, 2], [4, 5]])
    found = merged(features, vlprune.Selection(keep, vlprune.Mixture(weight)))
    for tile in range(3):
        for row in range(6):
            slot = keep[tile].tolist().index(row) if row in keep[tile] else None
            sums = (
                sum(weight[tile, slot, j] * features[tile, j] for j in range(6)) if slot is not None else features[tile, row]
            )
            torch.testing.assert_close(found[tile, row], sums)


def test_sums_of_half_precision_are_rounded_once():
    """Small parts are not lost one by one, and autocast of the model does not reach them."""
    features = torch.ones(300, 2, dtype=torch.bfloat16)
    chosen = vlprune.Selection(torch.tensor([0]), vlprune.Mixture(torch.full((1, 300), 1 / 1024)))
    with torch.autocast("cpu", torch.bfloat16):
        found = merged(features, chosen)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0], torch.full((2,), 300 / 1024, dtype=torch.bfloat16), atol=0, rtol=0)
