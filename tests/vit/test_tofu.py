"""ToFu makes of ToMe's groups what its specification says."""

from __future__ import annotations

import pytest
import torch

from tests.vit import given
from vlprune import OptionError, ToFu, ToMe
from vlprune.methods.tofu import HOW, fused


def naive(rows, groups, how):
    """One row of a group, target last, from the specification, in float64."""
    if len(groups) == 1 or how == "prune":
        return rows[groups[-1]]
    members = rows[groups]
    if how == "max":
        return members.max(0).values
    mean = members.mean(0)
    return mean if how == "mean" else mean / mean.norm() * members.norm(dim=1).max()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_groups_become_what_the_specification_says(how, prefix):
    for rows, leaving in ((12, 4), (21, 1), (16, 7)):
        tokens = given.tokens(rows, prefix, leaving, seed=rows)
        method = ToFu(early=how)
        assigned = method.reduce(tokens)
        given.complete(tokens, assigned)
        assert torch.equal(assigned, ToMe().reduce(tokens))
        hidden, sizes = method.merge(tokens, assigned, tokens.count)
        assert sizes.sum(1).tolist() == tokens.sizes.sum(1).tolist()
        for image, places in enumerate(assigned.tolist()):
            for place in range(tokens.count):
                members = [i for i, p in enumerate(places) if p == place]
                members.sort(key=lambda i: i % 2 == 1)
                expected = naive(tokens.hidden[image].double(), members, how)
                torch.testing.assert_close(hidden[image, place].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_row_keeps_the_length_of_the_longest_where_a_mean_would_shrink():
    """At right angles, a mean of two equally long rows is shorter by a factor of the root of two; opposite, it is nothing."""
    rows = torch.tensor([[[3.0, 0], [0, 3.0]], [[1.0, 0], [-1.0, 0]]])
    assigned = torch.zeros(2, 2, dtype=torch.int64)
    assert fused(rows, assigned, 1, 0, "norm").norm(dim=-1).tolist() == [[pytest.approx(3)], [0]]
    assert fused(rows, assigned, 1, 0, "mean").norm(dim=-1).tolist() == [[pytest.approx(3 / 2**0.5)], [0]]


def test_early_blocks_prune_and_late_ones_merge_and_counts():
    tokens = [given.tokens(12, 1, 4, block=block, blocks=5) for block in (2, 3)]
    method = ToFu()
    assigned = method.reduce(tokens[0])
    for given_, how in zip(tokens, ("prune", "norm"), strict=True):
        expected = fused(given_.hidden, assigned, given_.count, 1, how)
        torch.testing.assert_close(method.merge(given_, assigned, given_.count)[0], expected)
    for case in given.adversarial(rows=11, leaving=5).values():
        given.complete(case, method.reduce(case))
    assert ToFu(ratio=0.9).counts(196, 2) == [177, 160]
    for wrong in ({"ratio": 0.2}, {"early": "drop"}):
        with pytest.raises(OptionError):
            ToFu(**wrong)


@pytest.mark.parametrize("how", HOW)
def test_padding_adds_nothing_to_a_group(how):
    """Rows of size 0 are as if they were not there, whichever side of a pair they are on."""
    tokens = given.tokens(12, 1, 5)
    sizes = torch.where(torch.arange(12) >= 8, 0.0, tokens.sizes)
    hidden = torch.where(torch.arange(12)[:, None] >= 8, 1e3, tokens.hidden)
    method = ToFu(early=how)
    padded = given.tokens(12, 1, 5, sizes=sizes, hidden=hidden, weights=None)
    assigned = method.reduce(padded)
    merged, _ = method.merge(padded, assigned, padded.count)
    for image in range(2):
        for place in set(assigned[image, :8].tolist()):
            members = [i for i in range(8) if int(assigned[image, i]) == place]
            members.sort(key=lambda i: i % 2 == 1)
            if how == "prune" and len(members) > 1 and members[-1] % 2 == 0:
                continue  # sources whose target is padding: any of them may stand for it
            expected = naive(hidden[image].double(), members, how)
            torch.testing.assert_close(merged[image, place].double(), expected, atol=1e-4, rtol=1e-4)
