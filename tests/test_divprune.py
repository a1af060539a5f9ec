"""DivPrune's choice against its definition, written out in float64 with plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import vlprune
from vlprune.image import ImageTokens
from vlprune.integrations.llava import anyres, single

LAYOUTS = {"one tile": lambda: single(6), "1 x 3 crops": lambda: anyres(28, 84, 4, 28, ((28, 84),))}


def divprune_by_hand(features: list[list[float]], count: int) -> list[int]:
    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0

    rows = range(len(features))
    distance = [[1 - cosine(features[i], features[j]) for j in rows] for i in rows]
    lonely = [min((distance[i][j] for j in rows if j != i), default=0.0) for i in rows]
    chosen = [max(rows, key=lambda i: (lonely[i], -i))]
    while len(chosen) < count:
        left = [i for i in rows if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(distance[s][i] for s in chosen), -i)))
    return sorted(chosen)


def choice(method: vlprune.DivPrune, features: torch.Tensor, layout, alive=None) -> list[int]:
    return method.select(ImageTokens(features, layout, method.count(layout.total), alive=alive)).keep.tolist()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("budget", [1, 2, 0.3, 1.0])
def test_the_choice_is_the_definitions(layout, budget):
    layout, method = layout(), vlprune.DivPrune(budget=budget)
    for seed in range(4):
        features = torch.randn(layout.total, 7, generator=torch.Generator().manual_seed(seed))
        assert choice(method, features, layout) == divprune_by_hand(features.double().tolist(), method.count(layout.total))


def one_hot(hot: list[int], width: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(hot), width).float()


@pytest.mark.parametrize(
    "features",
    [
        one_hot([0, 0, 1, 1, 2, 2, 3, 3, 3], 4),
        torch.zeros(9, 4),
        torch.ones(9, 4),
        one_hot([0] * 8 + [1], 4) * torch.arange(1, 10)[:, None],
    ],
    ids=["pairs of duplicates", "zeros", "constant", "one token that is unlike the others"],
)
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_ties_go_to_the_lower_index_and_no_token_is_chosen_twice(features, count):
    """Where two tokens are equal, and where every distance is."""
    layout = single(3)
    assert choice(vlprune.DivPrune(budget=count), features, layout) == divprune_by_hand(features.tolist(), count)


def test_rows_that_the_encoder_left_behind_are_not_chosen():
    layout = single(6)
    features = torch.randn(36, 5, generator=torch.Generator().manual_seed(0))
    alive = torch.arange(1, 36, 2)
    dropped = features.clone()
    dropped[::2] = 0
    expected = [int(alive[i]) for i in divprune_by_hand(features[alive].double().tolist(), 7)]
    assert choice(vlprune.DivPrune(budget=7), dropped, layout, alive) == expected


def test_quirks_round_like_half_precision():
    """Two tokens whose cosines differ by less than float16 can tell are equally far: the lower index wins."""
    near = torch.tensor([[1.0, 0.0, 0.0], [1e-4, 1.0, 0.0], [0.0, 1.0, 1e-4], [0.0, 1.0, 0.0]]).half()
    exact = choice(vlprune.DivPrune(budget=2), near, single(2))
    rounded = choice(vlprune.DivPrune(budget=2, official_quirks=True), near, single(2))
    assert exact == divprune_by_hand(near.double().tolist(), 2)
    assert rounded == [0, 1]
