"""TransPrune against its definition written out, layer by layer."""

from __future__ import annotations

import math

import pytest

import vlprune
from tests import inside
from vlprune.image import LayerTokens
from vlprune.integrations.llava import single
from vlprune.methods.staged import TEXT
from vlprune.signals import Transition


def changes_by_hand(tokens: LayerTokens, layer: int) -> list[float]:
    """What attention and feed-forward network of one layer did to each visual token."""
    found = [0.0] * tokens.visual.shape[0]
    for module in ("attention", "mlp"):
        rows = tokens.rows(Transition(layer, module=module)).double().tolist()
        mass = sum(math.exp(1 - cosine) for _, cosine in rows)
        for i, row in enumerate(tokens.visual.tolist()):
            length, cosine = rows[row]
            found[i] += length * math.exp(1 - cosine) / mass
    return found


def attention_by_hand(tokens: LayerTokens) -> list[float]:
    rows = tokens.text.tolist()
    behind = [i for i, row in enumerate(rows) if row > tokens.visual.tolist()[-1]]
    attention = tokens[TEXT][0].double().tolist()
    return [sum(attention[r][i] for r in behind) / len(behind) for i in range(tokens.visual.shape[0])]


@pytest.mark.parametrize("content", inside.CONTENTS)
@pytest.mark.parametrize("layers", [(1, 3, 6), (2, 3)])
def test_transitions_and_attention_count_alike(layers, content):
    """Transitions add up from the layer before the first stage on, each as a share of the tokens that were there then."""
    for budget in (0.4, 0.8):
        method = vlprune.TransPrune(budget=budget, layers=layers)
        for seed in range(2):
            sums: dict[int, dict[int, float]] = {}
            for tokens, selection in inside.journeys(method, content, seed):
                mine = sums.setdefault(tokens.layout.total, {})
                stages = [layers[0] - 1, *method.plan(tokens.layout, tokens.shape).prefill]
                since = max(start for start in stages if start < tokens.layer)
                for layer in range(since, tokens.layer):
                    for place, change in zip(tokens.positions.tolist(), changes_by_hand(tokens, layer), strict=True):
                        mine[place] = mine.get(place, 0.0) + change
                change = [mine[place] for place in tokens.positions.tolist()]
                wanted = attention_by_hand(tokens)
                scores = [c / (sum(change) + 1e-8) + w / (sum(wanted) + 1e-8) for c, w in zip(change, wanted, strict=True)]
                inside.assert_best(selection.keep.tolist(), scores, tokens.count)


def test_the_published_schedule():
    """0.875, 0.625 and 0.125 before layers 7, 9 and 12: a mean of 236 tokens of 576."""
    plan = vlprune.TransPrune(keep=(0.875, 0.625, 0.125)).plan(single(24), inside.LLAVA)
    assert plan.prefill == {7: 504, 9: 360, 12: 72}
    assert round(sum(plan.at_layers(32)) / 32) == 236
    assert vlprune.TransPrune(budget=sum(plan.at_layers(32)) / 32 / 576).plan(single(24), inside.LLAVA) == plan


def test_only_layers_between_the_stages_are_measured():
    layers = [s.layer for s in vlprune.TransPrune().wants(inside.LLAVA) if isinstance(s, Transition)]
    assert sorted(set(layers)) == [6, 7, 8, 9, 10, 11]  # pyright: ignore
    assert len(layers) == 12
