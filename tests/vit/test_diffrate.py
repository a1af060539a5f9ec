"""DiffRate drops, merges and weighs what its specification says."""

from __future__ import annotations

import json

import pytest
import torch

from tests.vit import given
from vlprune import DiffRate, OptionError, from_dict


def naive(tokens, dropping):
    """Rows, sizes and the row of each, image by image in float64."""
    attention, results = given.attention_map(tokens)[:, :, 0].mean(1), []
    for scores, hidden, sizes in zip(attention.tolist(), tokens.hidden.double(), tokens.sizes.tolist(), strict=True):
        unit = [row / row.norm() for row in hidden]
        ranked = sorted(range(tokens.prefix, len(scores)), key=lambda i, s=scores: -s[i])
        ranked = ranked[: len(ranked) - dropping]
        stay, merging = ranked[: tokens.count - tokens.prefix], ranked[tokens.count - tokens.prefix :]
        into = {i: max(stay, key=lambda j, i=i, u=unit: float(u[i] @ u[j])) for i in merging}
        order = [*range(tokens.prefix), *sorted(stay)]
        members = [[m for m in into if into[m] == row] for row in order]
        rows = [hidden[[row, *group]].mean(0) for row, group in zip(order, members, strict=True)]
        weights = [
            max(1.0, sizes[row] + sum(sizes[m] * float(unit[m] @ unit[row]) for m in group))
            for row, group in zip(order, members, strict=True)
        ]
        places = [order.index(into.get(i, i)) if into.get(i, i) in order else -1 for i in range(len(scores))]
        results.append((torch.stack(rows), weights, places))
    return results


@pytest.mark.parametrize("pruned", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prefix", [1, 2])
def test_rows_sizes_and_assignment_are_those_of_the_specification(pruned, prefix):
    for rows, leaving, seed in ((13, 4, 0), (24, 17, 1), (10, 1, 2)):
        tokens = given.tokens(rows, prefix, leaving, seed=seed)
        method = DiffRate(pruned=pruned)
        assigned = method.reduce(tokens)
        given.complete(tokens, assigned)
        hidden, sizes = method.merge(tokens, assigned, tokens.count)
        for image, (expected, weights, places) in enumerate(naive(tokens, int(pruned * leaving))):
            assert assigned[image].tolist() == places
            torch.testing.assert_close(hidden[image].double(), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sizes[image], torch.tensor(weights), atol=1e-5, rtol=1e-5)


def test_sizes_stay_above_zero_when_all_cosines_are_negative():
    """Two rows, opposite of each other: the official code takes the logarithm of a size below 0 here."""
    hidden = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, -1, 0]]])
    tokens = given.tokens(3, 1, 1, batch=1, hidden=hidden, sizes=torch.tensor([[1.0, 2, 3]]))
    method = DiffRate(pruned=0.0)
    _, sizes = method.merge(tokens, method.reduce(tokens), 2)
    assert sizes.tolist() == [[1.0, 1.0]]


def test_whatever_the_rows_the_choice_is_complete():
    for leaving in (1, 9):
        for name, tokens in given.adversarial(rows=11, leaving=leaving).items():
            for pruned in (0.0, 0.5, 1.0):
                method = DiffRate(pruned=pruned)
                assigned = method.reduce(tokens)
                given.complete(tokens, assigned)
                assert name == "not a number" or (method.merge(tokens, assigned, tokens.count)[1] >= 1).all()


def test_counts_that_were_learned():
    """They are saved with the method, hold whatever the budget, and fit images with fewer patches."""
    saved = json.loads(json.dumps({"kept": [197, 190, 150, 150], "merged": [197, 180, 150, 101]}))
    method = DiffRate.from_counts(saved, prefix=1)
    assert method.counts(196, 4) == [196, 179, 149, 100]
    assert method.counts(120, 4) == [120, 120, 120, 100]
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    blocks = [given.tokens(197, leaving=17, batch=1, block=1), given.tokens(180, leaving=30, batch=1, block=2)]
    assert [method.dropping(tokens) for tokens in blocks] == [7, 30]
    assert (method.reduce(blocks[0]) < 0).sum() == 7
    assert DiffRate(budget=0.5).counts(196, 12)[0] == 196, "the first block's [CLS] has seen nothing yet"
    for wrong in ({"kept": [3]}, {"kept": [3], "merged": [3, 2]}, {"kept": [0], "merged": [1]}, {"pruned": 2.0}):
        with pytest.raises(OptionError):
            DiffRate(**wrong)
    with pytest.raises(OptionError, match="4 blocks"):
        method.counts(196, 12)
