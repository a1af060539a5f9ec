"""MCTF pairs what its specification says."""

from __future__ import annotations

import pytest
import torch

from tests.vit import given
from vlprune import MCTF, OptionError


def naive(tokens, temperatures):
    """Which row goes into which of the first image and the order of those that stay, pair by pair in float64."""
    t1, t2, t3 = temperatures
    hidden, sizes = tokens.hidden[0].double(), tokens.sizes[0].tolist()
    received = given.attention_map(tokens)[0].mean((0, 1)).tolist()
    rows = range(len(sizes))
    u, z = [1 / v for v in received], [1 / v for v in sizes]
    u, z = [v / max(u) for v in u], [v / max(z) for v in z]

    def weight(i, j):
        cosine = float(hidden[i] @ hidden[j] / hidden[i].norm() / hidden[j].norm())
        return max(0.0, (1 + cosine) / 2) ** (1 / t1) * (u[i] * u[j]) ** (1 / t2) * (z[i] * z[j]) ** (1 / t3)

    even, odd = ([i for i in rows if i >= tokens.prefix and i % 2 == side] for side in (0, 1))
    into = {}
    partner = {i: max(odd, key=lambda j, i=i: weight(i, j)) for i in even}
    for i in sorted(even, key=lambda i: -weight(i, partner[i]))[: tokens.leaving // 2]:
        into[i] = partner[i]
    left = [i for i in even if i not in into]
    partner = {j: max(left, key=lambda i, j=j: weight(i, j)) for j in odd}
    for j in sorted(odd, key=lambda j: -weight(j, partner[j]))[: tokens.leaving - tokens.leaving // 2]:
        into[j] = partner[j]
    return into, [*range(tokens.prefix), *left, *[j for j in odd if j not in into]]


@pytest.mark.parametrize("temperatures", [(1.0, 20.0, 40.0), (0.5, 2.0, 3.0), (4.0, 1.0, 1.0)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_assignment_is_that_of_the_specification(temperatures, prefix):
    for rows, leaving in ((12, 4), (21, 1), (17, (17 - prefix) // 2)):
        tokens = given.tokens(rows, prefix, leaving, seed=rows, batch=1)
        assigned = MCTF(temperatures=temperatures).reduce(tokens)
        given.complete(tokens, assigned)
        into, order = naive(tokens, temperatures)
        expected = []
        for row in range(rows):
            while row in into:
                row = into[row]
            expected.append(order.index(row))
        assert assigned[0].tolist() == expected


def test_means_weigh_by_size_or_by_size_and_attention():
    tokens = given.tokens(15, 1, 6)
    received = given.attention_map(tokens).mean((1, 2))
    for pooling, weights in (("size", tokens.sizes.double()), ("attention", tokens.sizes * received)):
        method = MCTF(pooling=pooling)
        assigned = method.reduce(tokens)
        hidden, sizes = method.merge(tokens, assigned, tokens.count)
        for image in range(2):
            for place in range(tokens.count):
                members = assigned[image] == place
                parts = weights[image][members, None]
                expected = (tokens.hidden[image][members] * parts).sum(0) / parts.sum()
                torch.testing.assert_close(hidden[image, place].double(), expected, atol=1e-5, rtol=1e-5)
                assert sizes[image, place] == tokens.sizes[image][members].sum()


def test_of_pairs_that_are_equally_alike_the_uninformative_and_small_ones_merge():
    """Rows all alike and of one size: those that get little attention go; with attention alike, the small ones do."""
    keys = torch.zeros(1, 1, 9, 4)
    queries = torch.ones(1, 1, 9, 4)
    keys[..., 5:, 0] = 3.0
    same = torch.ones(1, 9, 3)
    ones = torch.ones(1, 9)
    tokens = given.tokens(9, 1, 2, batch=1, heads=1, keys=keys, queries=queries, hidden=same, sizes=ones)
    assigned = MCTF().reduce(tokens)[0]
    assert {int(assigned[i]) for i in range(5, 9)}.isdisjoint({int(assigned[i]) for i in range(1, 5)})
    assert len(set(assigned[5:].tolist())) == 4
    sizes = torch.tensor([[1.0, 9, 9, 9, 9, 1, 1, 1, 1]])
    tokens = given.tokens(9, 1, 2, batch=1, heads=1, keys=keys * 0, hidden=same, sizes=sizes, weights=None)
    assert len(set(MCTF().reduce(tokens)[0][1:5].tolist())) == 4


def test_whatever_the_rows_the_choice_is_complete_and_counts():
    for leaving in (1, 2, 5):
        for tokens in given.adversarial(rows=11, leaving=leaving).values():
            given.complete(tokens, MCTF().reduce(tokens))
    assert MCTF(r=16).counts(196, 3) == [196, 180, 164]
    assert MCTF(budget=0.6).counts(196, 12)[0] == 196
    for wrong in ({"r": -1}, {"temperatures": (1, 0, 1)}, {"temperatures": (1, 2)}, {"pooling": "sum"}):
        with pytest.raises(OptionError):
            MCTF(**wrong)
