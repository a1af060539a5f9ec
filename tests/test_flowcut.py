"""FlowCut against its definition written out plainly: eager attention maps, loops over heads and tokens, plain floats."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import inside
from vlprune.errors import BudgetError, OptionError
from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens
from vlprune.integrations.llava import anyres, single
from vlprune.methods.flowcut import CLS, CLS_VALUE, LAST, MEAN, PATCH_VALUES, TEXT_VALUES, FlowCut
from vlprune.signals import ClsAttention, MeanAttention

SHAPE = ModelShape(vision_layers=8, text_layers=4, feature_layer=6, has_cls=True)
LLAVA = ModelShape(vision_layers=24, text_layers=32, feature_layer=22, has_cls=True)
LAYOUTS = {
    "one tile": lambda: single(6),
    "2 x 2 crops": lambda: anyres(56, 56, 4, 28, ((56, 56),)),
    "1 x 3 crops, padded": lambda: anyres(30, 84, 4, 28, ((56, 84),)),
    "padded left and right": lambda: anyres(84, 20, 4, 28, ((84, 28), (56, 28))),
}
LAYOUT_CASES = pytest.mark.parametrize("layout", [make() for make in LAYOUTS.values()], ids=LAYOUTS)
WIDTH = 5


def softmax(logits: list[float]) -> list[float]:
    high = max(logits)
    weights = [math.exp(x - high) for x in logits]
    return [w / sum(weights) for w in weights]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def normalised(weights: list[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


# ------------------------------------------------------------------ vision encoder


def blocks(layout: ImageLayout, shape: ModelShape, seed: int = 0, heads: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random queries, keys and values of all blocks, ``(tiles, heads, rows, WIDTH)``; row 0 is [CLS] where there is one."""
    generator = torch.Generator().manual_seed(seed)
    size = (3, layout.tiles, heads, layout.placeholder.shape[1] + shape.has_cls, WIDTH)
    # Ever sharper attention, as in a real encoder.
    return [tuple(torch.randn(size, generator=generator) * (0.5 + 0.3 * i)) for i in range(shape.feature_layer)]


def adversarial_blocks(layout: ImageLayout, shape: ModelShape, content: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys and values full of ties, zeros, constants, or with one token that outshines all; products of them are exact."""
    generator = torch.Generator().manual_seed(0)
    tiles, patches = layout.placeholder.shape
    size = (tiles, 3, patches + shape.has_cls, 4)

    def block() -> tuple[Tensor, Tensor, Tensor]:
        query = torch.randint(-2, 3, (*size[:-1], WIDTH), generator=generator) / 2
        keys, values = (torch.nn.functional.pad(inside.CONTENTS[content][1](generator, *size), (0, WIDTH - 4)) for _ in "kv")
        return query, keys, values

    return [block() for _ in range(shape.feature_layer)]


def run(method: FlowCut, layout: ImageLayout, shape: ModelShape, data: list) -> list[Tensor]:
    """The patches that are there after each block, ``(tiles, n)``, by the method, with signals from eager attention maps."""
    patches = torch.arange(layout.placeholder.shape[1]).expand(layout.tiles, -1)
    carry: dict[str, Tensor] = {}
    seen = []
    for layer in method.encode_layers(layout, shape):
        rows = patches + shape.has_cls
        if shape.has_cls:
            rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], 1)
        index = rows[:, None, :, None].expand(-1, data[layer][0].shape[1], -1, WIDTH)
        query, key, value = (t.gather(2, index) for t in data[layer])
        signals: dict[Any, Tensor] = {}
        if shape.has_cls:
            attention = (query @ key.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
            signals = {CLS: attention[:, :, 0, 1:], CLS_VALUE: value[:, :, 0], PATCH_VALUES: value[:, :, 1:]}
        else:
            attention = (query.mean(2, keepdim=True) @ key.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
            signals = {MEAN: attention[:, :, 0], PATCH_VALUES: value}
        assert all(s in method.wants(shape) for s in signals)
        hidden = torch.zeros(*patches.shape, 2)
        tokens = VisionTokens(layer, hidden, patches, layout, shape, signals, carry)
        selection = method.encode(tokens)
        if selection is not None:
            assert selection.merge is None
            assert selection.keep.is_meta or (selection.keep.diff(dim=1) > 0).all()
            patches = patches.gather(1, selection.keep)
            carry = {name: values.gather(1, selection.keep) for name, values in carry.items()}
        seen.append(patches)
    return seen


def by_hand(target: int, layout: ImageLayout, shape: ModelShape, data: list, schedule: str) -> list[list[list[int]]]:
    """The same for ``target`` patches a tile, tile by tile, head by head."""
    places = layout.placeholder.tolist()
    there = [list(range(len(row))) for row in places]
    smooth: list[dict[int, float]] = [{} for _ in there]
    seen = []
    for layer in range(shape.feature_layer):
        flows = []
        for tile, patches in enumerate(there):
            query, key, value = (t[tile].tolist() for t in data[layer])
            inflow, affinity = [], []
            for q, k, v in zip(query, key, value, strict=True):
                if shape.has_cls:
                    rows = [0] + [p + 1 for p in patches]
                    inflow.append(softmax([dot(q[0], k[r]) / math.sqrt(WIDTH) for r in rows])[1:])
                    affinity.append(softmax([dot(v[0], v[r]) for r in rows])[1:])
                else:
                    centre = mean([q[p] for p in patches])
                    inflow.append(softmax([dot(centre, k[p]) / math.sqrt(WIDTH) for p in patches]))
            flow = normalised(mean(inflow))
            both = [a + b for a, b in zip(flow, normalised(mean(affinity)), strict=True)] if shape.has_cls else flow
            for p, share in zip(patches, both, strict=True):
                size = sum(abs(x) for x in mean([v[p + shape.has_cls] for v in value]))
                old = smooth[tile].get(p)
                smooth[tile][p] = share * size if old is None else 0.5 * old + 0.5 * share * size
            flows.append(flow)
        left, n = shape.feature_layer - 1 - layer, len(there[0])
        if left % 2 == 0 and n > target:
            if left == 0:
                leaving = n - target
            elif schedule == "even":
                leaving = math.ceil((n - target) / len([x for x in range(left + 1) if x % 2 == 0]))
            else:
                amounts = []
                for flow in flows:
                    entropy = -sum(a * math.log(a) for a in flow)
                    amounts.append(round((n - target) / math.sqrt(left) * (1 - (entropy / math.log(n)) ** 2)))
                leaving = max(amounts)
            count = max(target, n - leaving)
            for tile, patches in enumerate(there):
                scores = [smooth[tile][p] if places[tile][p] >= 0 else -math.inf for p in patches]
                there[tile] = [patches[i] for i in best(scores, count)]
        seen.append([list(patches) for patches in there])
    return seen


def in_each_tile(target: int, layout: ImageLayout, shape: ModelShape) -> int:
    if layout.tiles == 1:
        return min(target if shape.has_cls else 2 * target, layout.placeholder.shape[1])
    return min(max(1, int(target * 2.5 / layout.tiles)), layout.placeholder.shape[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", ["entropy", "even"])
@pytest.mark.parametrize("cls", [True, False], ids=["CLS", "no CLS"])
@pytest.mark.parametrize("target", [1, 5, 12])
@LAYOUT_CASES
def test_the_encoder_loses_what_the_definition_says(layout, target, cls, schedule, seed):
    shape = replace(SHAPE, has_cls=cls)
    data = blocks(layout, shape, seed)
    method = FlowCut(target=target, schedule=schedule)
    count = in_each_tile(target, layout, shape)
    seen = run(method, layout, shape, data)
    if count == layout.placeholder.shape[1]:
        assert seen == []
        return
    assert [patches.tolist() for patches in seen] == by_hand(count, layout, shape, data, schedule)
    assert seen[-1].shape == (layout.tiles, count)


@pytest.mark.parametrize("content", [content for content in inside.CONTENTS if content != "random"])
@pytest.mark.parametrize("cls", [True, False], ids=["CLS", "no CLS"])
@LAYOUT_CASES
def test_the_encoder_loses_what_the_definition_says_of_adversarial_images(layout, cls, content):
    shape = replace(SHAPE, has_cls=cls)
    data = adversarial_blocks(layout, shape, content)
    for target, schedule in ((1, "even"), (5, "entropy"), (12, "even")):
        count = in_each_tile(target, layout, shape)
        seen = run(FlowCut(target=target, schedule=schedule), layout, shape, data)
        expected = by_hand(count, layout, shape, data, schedule) if count < layout.placeholder.shape[1] else []
        assert [patches.tolist() for patches in seen] == expected, (target, schedule)


@pytest.mark.parametrize("schedule", ["entropy", "even"])
@LAYOUT_CASES
def test_as_many_tokens_enter_as_planned(layout, schedule):
    """Patches in the padding go first, so the count is known before."""
    method = FlowCut(target=9, schedule=schedule)
    left = run(method, layout, SHAPE, blocks(layout, SHAPE))[-1]
    places = layout.placeholder.gather(1, left)
    assert method.plan(layout, SHAPE).entering == (places >= 0).sum()


def test_of_equal_patches_the_first_ones_stay():
    layout = single(4)
    data = [tuple(torch.ones(1, 2, 17, WIDTH) for _ in range(3)) for _ in range(6)]
    for schedule in ("entropy", "even"):
        for patches in run(FlowCut(target=5, schedule=schedule), layout, SHAPE, data):
            assert patches[0].tolist() == list(range(patches.shape[1]))


def test_even_attention_drops_nothing_before_the_end_and_sharp_attention_early():
    """An entropy of ln n leaves all; one of 0 drops (n - T) / sqrt(blocks left)."""
    layout = single(4)
    method = FlowCut(target=5)
    even = [tuple(torch.ones(1, 2, 17, WIDTH) for _ in range(3)) for _ in range(6)]
    assert [seen.shape[1] for seen in run(method, layout, SHAPE, even)] == [16, 16, 16, 16, 16, 5]
    sharp = [(q, k.clone(), v) for q, k, v in even]
    for _, key, _ in sharp:
        key[:, :, 1] = 1000.0
    counts = [seen.shape[1] for seen in run(method, layout, SHAPE, sharp)]
    assert counts == [16, 10, 10, 6, 6, 5]  # 16 - round(11 / 2), 10 - round(5 / sqrt(2)), 5


def test_attention_of_zero_is_no_nan():
    layout = single(4)
    attention = torch.zeros(1, 2, 16)
    attention[:, :, 3] = 1.0
    values = torch.ones(1, 2, 16, WIDTH)
    signals = {CLS: attention, CLS_VALUE: values[:, :, 0], PATCH_VALUES: values}
    patches = torch.arange(16)[None]
    tokens = VisionTokens(1, torch.zeros(1, 16, 2), patches, layout, SHAPE, signals)
    selection = FlowCut(target=5).encode(tokens)
    assert selection is not None
    assert 3 in selection.keep[0].tolist()
    assert not tokens.carry["score"].isnan().any()


def test_the_official_blocks():
    """LLaVA-1.5: pruned after blocks 1, 3, ..., 21, to T before the features' block 22."""
    layout = single(24)
    method = FlowCut(target=64, schedule="even")
    assert list(method.encode_layers(layout, LLAVA)) == list(range(22))
    patches, carry, counts = torch.arange(576)[None], {}, {}
    for layer in range(22):
        n = patches.shape[1]
        values = torch.rand(1, 2, n, 4)
        signals = {CLS: torch.rand(1, 2, n), CLS_VALUE: values[:, :, 0], PATCH_VALUES: values}
        selection = method.encode(VisionTokens(layer, torch.zeros(1, n, 1), patches, layout, LLAVA, signals, carry))
        if selection is not None:
            patches = patches.gather(1, selection.keep)
            carry = {"score": carry["score"].gather(1, selection.keep)}
            counts[layer] = patches.shape[1]
    assert list(counts) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21]
    assert counts[1] == 576 - 47
    assert counts[21] == 64


# ------------------------------------------------------------------ between encoder and LLM


@LAYOUT_CASES
def test_select_takes_what_the_encoder_left(layout):
    alive = layout.placeholder[layout.placeholder >= 0].sort().values[::3]
    image = ImageTokens(torch.zeros(layout.total, 2), layout, len(alive), {}, alive)
    assert FlowCut(target=3).select(image).keep.tolist() == alive.tolist()


@LAYOUT_CASES
def test_where_the_encoder_drops_nothing_row_ends_go_first(layout):
    total, patches = layout.total, sum(layout.available)
    for count in {patches, (patches + total) // 2, total - 1} & set(range(patches, total)):
        method = FlowCut(target=count)
        assert list(method.encode_layers(layout, SHAPE)) == []
        plan = method.plan(layout, SHAPE)
        assert plan.entering == count
        keep = method.select(ImageTokens(torch.zeros(total, 2), layout, count)).keep.tolist()
        assert keep == sorted(set(keep))
        assert len(keep) == count
        assert set(keep) >= set(layout.placeholder[layout.placeholder >= 0].tolist())


# ------------------------------------------------------------------ LLM


def layer_tokens(layout: ImageLayout, count: int, seed: int, heads: int, kv_heads: int) -> tuple[LayerTokens, tuple]:
    """A sequence of text, image and text before LLM layer 2, with grouped queries; signals from an eager attention map."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(layout.total, generator=generator)[: count * 2].sort().values
    visual = torch.arange(len(positions)) + 3
    rows = len(positions) + 3 + 4
    query = torch.randn(heads, WIDTH, generator=generator)
    key, value = torch.randn(2, kv_heads, rows, WIDTH, generator=generator) * 1.5
    every = key.repeat_interleave(heads // kv_heads, 0)
    attention = ((every @ query[..., None])[..., 0] * WIDTH**-0.5).softmax(-1)
    tokens = LayerTokens(
        layer=2,
        hidden=torch.zeros(rows, 2),
        visual=visual,
        positions=positions,
        last=rows - 1,
        count=count,
        layout=layout,
        shape=SHAPE,
        signals={LAST: attention[:, None, visual], TEXT_VALUES: value[:, visual]},
        row_signals={TEXT_VALUES: value},
    )
    return tokens, (query.tolist(), key.tolist(), value.tolist())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_the_llm_keeps_what_the_definition_says(heads, kv_heads, seed):
    tokens, (query, key, value) = layer_tokens(single(6), 7, seed, heads, kv_heads)
    visual, scale = tokens.visual.tolist(), math.sqrt(WIDTH)
    groups = [h // (heads // kv_heads) for h in range(heads)]
    inflow = mean([softmax([dot(query[h], key[g][j]) / scale for j in visual]) for h, g in enumerate(groups)])
    affinity = mean([softmax([dot(value[g][tokens.last], value[g][j]) / scale for j in visual]) for g in groups])
    size = [sum(abs(x) for x in mean([value[g][j] for g in groups])) for j in visual]
    both = zip(normalised(inflow), normalised(affinity), size, strict=True)
    assert FlowCut(target=7).prefill(tokens).keep.tolist() == best([(r + u) * d for r, u, d in both], 7)


def test_of_equal_tokens_in_the_llm_the_first_ones_stay():
    tokens, _ = layer_tokens(single(6), 7, 0, 4, 2)
    tokens.signals[LAST] = torch.full_like(tokens[LAST], 0.01)
    tokens.row_signals[TEXT_VALUES] = torch.ones_like(tokens.rows(TEXT_VALUES))
    assert FlowCut(target=7).prefill(tokens).keep.tolist() == list(range(7))


def test_an_image_that_gets_no_attention_is_ranked_by_its_values():
    """A row of zeros, after underflow, gives no NaN."""
    tokens, _ = layer_tokens(single(6), 7, 0, 4, 2)
    tokens.signals[LAST] = torch.zeros_like(tokens[LAST])
    assert len(FlowCut(target=7).prefill(tokens).keep) == 7


# ------------------------------------------------------------------ counts


def test_the_papers_counts():
    crops = anyres(672, 672, 24, 336, ((672, 672),))
    assert [FlowCut(target=t).plan(single(24), LLAVA) for t in (192, 128, 64)] == [
        FlowCut(budget=t).plan(single(24), LLAVA) for t in (192, 128, 64)
    ]
    plan = FlowCut(target=64).plan(single(24), LLAVA)
    assert (plan.entering, plan.prefill, plan.cached) == (64, {}, {})
    plan = FlowCut(target=320).plan(crops, LLAVA)
    assert (plan.entering, plan.prefill) == (5 * 160, {2: 320})
    plan = FlowCut(target=64).plan(single(24), replace(LLAVA, has_cls=False))
    assert (plan.entering, plan.prefill) == (128, {2: 64})
    assert FlowCut(target=64).count(576) == 64


@pytest.mark.parametrize("depth", [3, 4, 32])
@pytest.mark.parametrize("cls", [True, False], ids=["CLS", "no CLS"])
@LAYOUT_CASES
def test_the_mean_over_the_layers_meets_the_budget(layout, cls, depth):
    """Never above, and less than one token of one stage below."""
    shape = replace(SHAPE, has_cls=cls, text_layers=depth)
    draw = random.Random(0)
    for budget in [0.05, 0.2, 0.4, 0.9, 0.99, 5, layout.total - 1, *[draw.random() for _ in range(30)]]:
        method = FlowCut(budget=budget)
        count = method.count(layout.total)
        try:
            plan = method.plan(layout, shape)
        except BudgetError:
            # The least there is: a patch in each tile (two of one tile without [CLS]), then one token.
            least = sum(min(1, patches) for patches in layout.available) * (1 if cls or layout.tiles > 1 else 2)
            assert 2 * least + depth - 2 > count * depth
            continue
        total = sum(plan.at_layers(depth))
        assert total <= count * depth
        assert list(plan.prefill) in ([], [2])
        assert not plan.cached
        if plan.prefill:
            assert total > count * depth - (depth - 2)
        else:  # one token more would be one or two more in each tile
            assert total > (count - 2 * layout.tiles) * depth


@LAYOUT_CASES
def test_a_full_budget_plans_nothing(layout):
    for method in (FlowCut(budget=1.0), FlowCut(budget=10**6), FlowCut(target=10**6)):
        plan = method.plan(layout, SHAPE)
        assert (plan.entering, plan.prefill, plan.cached) == (layout.total, {}, {})
        assert list(method.encode_layers(layout, SHAPE)) == []


def test_a_budget_that_tiles_cannot_meet_is_an_error():
    layout = anyres(672, 672, 24, 336, ((672, 672),))
    with pytest.raises(BudgetError, match=r"budget=1 allows 1 of .* flowcut allows 2 to 2928.* raise the budget"):
        FlowCut(budget=1).plan(layout, LLAVA)


@pytest.mark.parametrize("target", [0, -3, 2.0, True, "64"])
def test_wrong_targets_are_refused(target):
    with pytest.raises(BudgetError, match="allowed is an int >= 1"):
        FlowCut(target=target)


def test_wrong_schedules_are_refused():
    with pytest.raises(OptionError, match="'entropy' and 'even'"):
        FlowCut(schedule="fast")  # pyright: ignore[reportArgumentType]


def test_it_asks_for_what_the_encoder_has():
    kinds = [type(s) for s in FlowCut().wants(SHAPE)]
    assert ClsAttention in kinds
    assert MeanAttention not in kinds
    kinds = [type(s) for s in FlowCut().wants(replace(SHAPE, has_cls=False))]
    assert ClsAttention not in kinds
    assert MeanAttention in kinds


def test_its_options_survive_json():
    method = FlowCut(target=64, schedule="even")
    options = json.loads(json.dumps(method.to_dict()))
    assert options.pop("method") == "flowcut"
    assert FlowCut(**options) == method


@LAYOUT_CASES
def test_an_even_schedule_never_waits_for_the_device(layout):
    """Tensors on the device meta have no values that one could wait for."""
    method = FlowCut(target=9, schedule="even")
    data = [tuple(t.to("meta") for t in block) for block in blocks(layout, SHAPE)]
    with torch.device("meta"):
        left = run(method, layout, SHAPE, data)[-1]
    assert left.shape == (layout.tiles, in_each_tile(9, layout, SHAPE))
    tokens, _ = layer_tokens(single(6), 7, 0, 4, 2)
    signals, rows = ({s: t.to("meta") for s, t in kind.items()} for kind in (tokens.signals, tokens.row_signals))
    tokens = replace(tokens, visual=tokens.visual.to("meta"), signals=signals, row_signals=rows)
    assert len(method.prefill(tokens).keep) == 7
