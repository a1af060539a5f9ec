"""ApET's choice and what it merges against their definitions, in float64 with plain lists and elimination."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import vlprune
from tests.between import CONTENTS, LAYOUTS, cosine, image
from vlprune.engine.merging import merged


def solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """``x`` of ``matrix x = right`` by Gauss and Jordan with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        best = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        for r in range(len(rows)):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def by_hand(rows: list[list[float]], count: int, size: int, first: int) -> tuple[list[int], dict[int, list[float]]]:
    n, basis = range(len(rows)), [first]
    while len(basis) < min(size, count):
        near = {i: min(sum((x - y) ** 2 for x, y in zip(rows[i], rows[b], strict=True)) for b in basis) for i in n}
        basis.append(max((i for i in n if i not in basis), key=lambda i: (round(near[i], 5), -i)))
    ridge = [[dot(rows[a], rows[b]) + 1e-5 * (a == b) for b in basis] for a in basis]
    longest = max(math.sqrt(dot(row, row)) for row in rows)
    errors = {}
    for i in n:
        parts = solved(ridge, [dot(rows[i], rows[b]) for b in basis])
        left = [x - sum(p * rows[b][c] for p, b in zip(parts, basis, strict=True)) for c, x in enumerate(rows[i])]
        errors[i] = round(math.sqrt(dot(left, left)) / max(longest, 1e-30) * 1e5)
    others = sorted((i for i in n if i not in basis), key=lambda i: (-errors[i], i))
    centres = sorted(others[: count - len(basis)])
    joined: dict[int, list[int]] = {c: [c] for c in centres}
    for i in n:
        if i not in basis and i not in centres and centres:
            like = [round(cosine(rows[i], rows[c]), 6) for c in centres]
            joined[centres[like.index(max(like))]].append(i)
    means = {c: [sum(rows[i][k] for i in m) / len(m) for k in range(len(rows[0]))] for c, m in joined.items()}
    return sorted([*basis, *centres]), means


@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_and_the_means_are_the_definitions(layout, content):
    for budget, basis in ((1, 10), (7, 3), (0.3, 2), (0.9, 10)):
        method = vlprune.ApET(budget=budget, basis=basis, seed=3)
        img = image(method, LAYOUTS[layout](), content)
        if content == "random":
            img = replace(img, features=torch.randn(img.layout.total, 14, generator=torch.Generator().manual_seed(1)))
        selection = method.select(img)
        keep, means = by_hand(img.features.double().tolist(), img.count, basis, method._first(img.layout.total))
        assert selection.keep.tolist() == keep, (budget, basis)
        found = merged(img.features, selection)
        for place in keep:
            expected = torch.tensor(means.get(place, img.features[place].tolist()))
            torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=1e-4)


def test_a_token_of_its_own_kind_is_kept():
    method = vlprune.ApET(budget=3, basis=2)
    img = image(method, LAYOUTS["one tile"](), "zeros")
    img.features[:, 0], img.features[::2, 0], img.features[21] = 1.0, 2.0, torch.tensor([0.5, 0.5, 0, 0])
    assert 21 in method.select(img).keep


def test_what_is_no_number_still_gives_a_full_choice():
    method = vlprune.ApET(budget=9, basis=4)
    img = image(method, LAYOUTS["one tile"]())
    img.features[::3], img.features[1] = float("nan"), float("inf")
    assert len(method.select(img).keep.unique()) == 9


def test_each_seed_starts_somewhere_else_and_always_there():
    firsts = [vlprune.ApET(seed=seed)._first(576) for seed in range(8)]
    assert len(set(firsts)) > 4
    assert firsts == [vlprune.ApET(seed=seed)._first(576) for seed in range(8)]


@pytest.mark.parametrize("basis", [0, -1, 2.0])
def test_knobs_out_of_range(basis):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.ApET(basis=basis)
