"""Zero-TPrune drops what its specification says."""

from __future__ import annotations

import math

import pytest
import torch

from tests.vit import given
from vlprune import OptionError, ZeroTPrune


def naive_importance(tokens, image, alive, steps, limits, cls_first):
    """The importance of one image's rows ``alive``, head by head, with the whole map in float64."""
    part, heads = tokens.read, []
    for queries, keys in zip(part.queries[image].double(), part.keys[image].double(), strict=True):
        logits = queries[alive] @ keys[alive].T * part.scaling
        attention = logits.softmax(-1)
        weights = torch.ones(len(alive), dtype=torch.float64)
        if cls_first:
            weights[0] = math.sqrt(len(alive))
        for _ in range(steps):
            weights = sum(weights[i] * attention[i] for i in range(len(alive)))
        heads.append(weights / weights.mean())
    chosen = [h for h in heads if limits[0] <= float(((h - 1) ** 2).mean()) <= limits[1]] or heads
    scores = (sum(h**2 for h in chosen) / len(chosen)).sqrt().tolist()
    return dict(zip(alive, scores, strict=True))


def naive(tokens, image, similar, steps, limits, cls_first):
    """Rows of one image that stay."""
    rows, prefix = list(range(tokens.hidden.shape[1])), tokens.prefix
    first = naive_importance(tokens, image, rows, steps, limits, cls_first)
    ranked = sorted(rows[prefix:], key=lambda i: -first[i])
    half = len(ranked) - len(ranked) // 2
    keys = tokens.read.keys[image].double().transpose(0, 1).flatten(1)
    unit = keys / keys.norm(dim=1, keepdim=True)
    best = {i: max(float(unit[i] @ unit[j]) for j in ranked[:half]) for i in ranked[half:]}
    alike = sorted(best, key=lambda i: -best[i])[: int(similar * tokens.leaving)]
    left = [i for i in rows if i not in alike]
    second = naive_importance(tokens, image, left, steps, limits, cls_first)
    gone = sorted(left[prefix:], key=lambda i: -second[i])[len(left) - prefix - (tokens.leaving - len(alike)) :]
    return [i for i in left if i not in gone]


@pytest.mark.parametrize("limits", [(0.01, 0.7), (0.2, 0.3), (0.0, 99.0)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_rows_are_those_of_the_specification(limits, prefix):
    for rows, leaving, block, similar in ((14, 5, 6, 0.5), (23, 12, 0, 0.25), (11, 3, 11, 0.0)):
        tokens = given.tokens(rows, prefix, leaving, seed=rows, block=block, weights=None, sizes=torch.ones(2, rows))
        method = ZeroTPrune(similar=similar, variance=limits, iterations=(7, 3, 1))
        assigned = method.reduce(tokens)
        given.complete(tokens, assigned)
        for image in range(2):
            steps = {6: 3, 0: 7, 11: 1}[block]
            stay = naive(tokens, image, similar, steps, limits, cls_first=prefix > 0)
            assert [i for i in range(rows) if assigned[image, i] >= 0] == stay


def test_what_important_rows_look_at_is_important():
    """Row 5 is looked at by all, and looks at row 3 alone: after two steps row 3 is important though nobody else sees it."""
    queries, keys = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)
    keys[0, 0, 5], keys[0, 0, 3] = torch.tensor([9.0, 0, 0, 0]), torch.tensor([0, 9.0, 0, 0])
    queries[..., 0], queries[0, 0, 5] = 9.0, torch.tensor([0, 9.0, 0, 0])
    tokens = given.tokens(8, 0, 6, batch=1, heads=1, queries=queries, keys=keys, weights=None, block=6)
    two = ZeroTPrune(similar=0.0, iterations=(2, 2, 2)).reduce(tokens)
    assert [i for i in range(8) if two[0, i] >= 0] == [3, 5]


def test_of_the_unimportant_the_duplicates_go_first():
    """Every row gets as much attention as any other. So earlier rows rank first; the twin of one of them goes."""
    keys = torch.randn(1, 1, 12, 4, generator=torch.Generator().manual_seed(0))
    keys[..., 9, :] = keys[..., 3, :]
    tokens = given.tokens(12, 1, 1, batch=1, heads=1, keys=keys, queries=torch.zeros(1, 1, 12, 4), weights=None)
    assigned = ZeroTPrune(similar=1.0).reduce(tokens)[0]
    assert [i for i in range(12) if assigned[i] < 0] == [9]
    assigned = ZeroTPrune(similar=0.0).reduce(tokens)[0]
    assert [i for i in range(12) if assigned[i] < 0] == [11]


def test_whatever_the_rows_the_choice_is_complete_and_options():
    for leaving in (1, 9):
        for tokens in given.adversarial(rows=11, leaving=leaving).values():
            for similar in (0.0, 0.5, 1.0):
                given.complete(tokens, ZeroTPrune(similar=similar).reduce(tokens))
    assert [ZeroTPrune().steps(block, 12) for block in (0, 2, 3, 8, 9, 11)] == [30, 30, 5, 5, 1, 1]
    assert sum(ZeroTPrune(budget=0.5).counts(196, 12)) == 196 * 6
    for wrong in ({"similar": 2}, {"iterations": (1, 0, 1)}, {"iterations": (1, 1)}, {"variance": (2, 1)}):
        with pytest.raises(OptionError):
            ZeroTPrune(**wrong)
