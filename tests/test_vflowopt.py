"""VFlowOpt's choice and what it recycles against their definitions, in float64 with plain lists."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests import inside
from tests.between import CLIP, CONTENTS, LAYOUTS, SHAPES, heads_mean, image
from vlprune.engine.merging import merged
from vlprune.methods.grids import divided


def by_hand(method, img) -> tuple[list[int], dict[int, list[float]]]:
    """What is kept, and the features of tokens that stand for a cell."""
    (rows,) = (heads_mean(values) for values in img.signals.values())
    layout, features = img.layout, img.features.double().tolist()
    importance = dict.fromkeys(layout.separators.tolist(), 1.0)
    for row, places in zip(rows, layout.placeholder.tolist(), strict=True):
        importance |= {place: a for a, place in zip(row, places, strict=True) if place >= 0}
    falling = sorted(importance, key=lambda i: (-importance[i], i))
    cells = min(int(layout.total / method.cell**2), img.count, layout.total - len(layout.separators))
    keep, rest = falling[: img.count - cells], falling[img.count - cells :]
    if cells == 0:
        return sorted(keep), {}
    cell_of = divided(layout, cells)[1].tolist()
    members = [[i for i in rest if cell_of[i] == cell] for cell in range(cells)]
    leads = [group[0] for group in members if group]
    more = [i for i in rest if i not in leads][: cells - len(leads)]
    keep = sorted([*keep, *leads, *more])
    means = {}
    for group in filter(None, members):
        joined = [i for i in group if i == group[0] or i not in keep]
        mass = sum(importance[i] for i in joined)
        if mass:
            columns = zip(*([importance[i] * x for x in features[i]] for i in joined), strict=True)
            means[group[0]] = [sum(column) / mass for column in columns]
    return keep, means


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_and_the_means_are_the_definitions(layout, content):
    for budget, cell in ((1, 1.5), (7, 3.0), (0.3, 1.0), (0.3, 2.5), (0.95, 2.0), (0.3, 99.0), (10_000, 2.0)):
        method = vlprune.VFlowOpt(budget=budget, cell=cell)
        img = image(method, LAYOUTS[layout](), content)
        selection = method.select(img)
        keep, means = by_hand(method, img)
        assert selection.keep.tolist() == keep, (budget, cell)
        found = merged(img.features, selection)
        for place in keep:
            expected = torch.tensor(means.get(place, img.features[place].tolist()))
            torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-5)


def test_nothing_but_row_ends_is_lost():
    """With a cell a token, the kept tokens and their cells take in every patch."""
    method = vlprune.VFlowOpt(budget=5, cell=2.0)
    img = image(method, LAYOUTS["one tile"]())
    selection = method.select(img)
    assert selection.merge is not None
    taken = set(selection.keep.tolist()) | set((selection.merge.target >= 0).nonzero()[:, 0].tolist())
    assert taken == set(range(36))


def test_what_is_no_number_still_gives_a_full_choice():
    method = vlprune.VFlowOpt(budget=9, cell=3.0)
    img = image(method, LAYOUTS["padded above and below"]())
    for values in img.signals.values():
        values[:, :, ::2] = float("nan")
    selection = method.select(img)
    assert len(selection.keep.unique()) == 9
    assert merged(img.features, selection)[selection.keep].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_last_block_is_asked_for_its_global_patches(shape):
    assert vlprune.VFlowOpt(threshold=3.0).wants(shape) == (vlprune.GlobalAttention(3, threshold=3.0),)


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"threshold": float("nan")}, {"cell": 0.5}, {"cell": float("inf")}])
def test_knobs_out_of_range(options):
    assert vlprune.VFlowOpt().wants(CLIP)
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.VFlowOpt(**options)


def test_the_llm_drops_by_the_same_map():
    """Before layers 9 and 18 of 28; budget and shares give the counts, importance the tokens."""
    shape = vlprune.ModelShape(vision_layers=27, text_layers=28, feature_layer=25, has_cls=False)
    layout = LAYOUTS["2 x 2 crops"]()
    method = vlprune.VFlowOpt(budget=0.5, cell=2.5, keep=(0.75, 0.5))
    plan = method.plan(layout, shape)
    entering = max(
        n for n in range(1, layout.total + 1) if 9 * n + 9 * int(n * 0.75) + 10 * int(n * 0.375) <= 0.5 * layout.total * 28
    )
    assert plan == vlprune.Plan(entering, {9: int(entering * 0.75), 18: int(entering * 0.375)})
    assert method.stages == ("select", "prefill")
    img = image(method, layout)
    img = type(img)(img.features, layout, plan.entering, img.signals)
    positions = method.select(img).keep
    (rows,) = (heads_mean(values) for values in img.signals.values())
    importance = dict.fromkeys(layout.separators.tolist(), 1.0)
    for row, places in zip(rows, layout.placeholder.tolist(), strict=True):
        importance |= {place: a for a, place in zip(row, places, strict=True) if place >= 0}
    for layer in plan.prefill:
        tokens = inside.before_layer(method, layout, layer, positions, shape=shape, notes=img.notes)
        keep = method.prefill(tokens).keep
        assert keep.tolist() == inside.best([importance[place] for place in positions.tolist()], plan.prefill[layer])
        positions = positions[keep]


def test_without_shares_nothing_leaves_inside_the_llm():
    assert vlprune.VFlowOpt().stages == ("select",)
    assert vlprune.VFlowOpt(budget=7).plan(LAYOUTS["one tile"](), CLIP) == vlprune.Plan(7)
    with pytest.raises(vlprune.OptionError, match="two shares"):
        vlprune.VFlowOpt(keep=(0.0, 1.0))
