"""PiToMe chooses what its specification says."""

from __future__ import annotations

import math

import pytest
import torch

from tests.vit import given
from vlprune import OptionError, PiToMe
from vlprune.methods import pitome


def naive(metric, r, margin, alpha, protects):
    """Groups of one image's rows: which row goes into which, pair by pair from the specification, in float64."""
    rows = range(len(metric))
    unit = [[v / max(math.hypot(*row), 1e-12) for v in row] for row in metric]
    cosine = [[sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in rows] for i in rows]
    shifted = [[value - margin for value in row] for row in cosine]
    energy = [sum(v if v > 0 else alpha * (math.exp(v) - 1) for v in row) / len(row) for row in shifted]
    order = sorted(rows, key=lambda i: -energy[i])
    if protects:
        order = order[: 2 * r]
    sources, targets = order[0::2], order[1::2]
    partner = {a: max(targets, key=lambda b, a=a: cosine[a][b]) for a in sources} if targets else {}
    merged = sorted(partner, key=lambda a: -cosine[a][partner[a]])[:r]
    return {a: partner[a] for a in merged}


@pytest.mark.parametrize("protect", ["always", "never"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_assignment_is_that_of_the_specification(protect, prefix):
    for rows, seed in ((9, 0), (20, 1), (31, 2)):
        for leaving in (1, (rows - prefix) // 4, (rows - prefix) // 2):
            tokens = given.tokens(rows, prefix, leaving, seed=seed)
            method = PiToMe(protect=protect, margin=0.8, alpha=0.7)
            assigned = method.reduce(tokens)
            given.complete(tokens, assigned)
            for keys, image in zip(tokens.keys[:, prefix:].double().tolist(), assigned.tolist(), strict=True):
                into = naive(keys, leaving, 0.8 * (1 - 3 / 12), 0.7, protect == "always")
                stay = [i for i in range(rows) if i - prefix not in into]
                expected = [stay.index(into[i - prefix] + prefix if i - prefix in into else i) for i in range(rows)]
                assert image == expected


def test_a_row_that_stands_alone_is_protected():
    """Eleven rows lie in a crowd, one does not: with protection it stays itself even when as many rows as can be leave."""
    crowd = torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(1, 1, 12, 4, generator=torch.Generator().manual_seed(0))
    crowd[0, 0, 6] = torch.tensor([0, 0, 1.0, 0])
    tokens = given.tokens(12, 0, 5, batch=1, heads=1, keys=crowd)
    assigned = PiToMe(protect="always").reduce(tokens)[0].tolist()
    assert assigned.count(assigned[6]) == 1


def test_whatever_the_rows_the_choice_is_complete_and_the_memory_bounded(monkeypatch):
    for protect in ("always", "never"):
        for leaving in (1, 5):
            for tokens in given.adversarial(rows=11, leaving=leaving).values():
                given.complete(tokens, PiToMe(protect=protect).reduce(tokens))
    keys = given.tokens(40).keys
    whole = pitome.energy(keys, 0.5, 1.0)
    monkeypatch.setattr(pitome, "AT_ONCE", 100)
    torch.testing.assert_close(pitome.energy(keys, 0.5, 1.0), whole)


def test_blocks_that_protect_and_counts_from_a_ratio():
    assert [PiToMe().protects(block, 5) for block in range(5)] == [False, False, False, True, True]
    assert [PiToMe(protect="early").protects(block, 5) for block in range(5)] == [True, True, True, False, False]
    assert PiToMe(ratio=0.9).counts(196, 3) == [177, 160, 144]
    assert PiToMe(ratio=0.5).counts(5, 4) == [3, 2, 1, 1]
    assert sum(PiToMe(budget=0.6).counts(196, 12)) == math.floor(0.6 * 196 * 12)
    for wrong in ({"ratio": 0.4}, {"protect": "some"}, {"margin": math.nan}):
        with pytest.raises(OptionError):
            PiToMe(**wrong)


def test_padding_is_no_neighbour_and_leaves_first():
    """The energies of rows are what they are without the padding behind them, and padding is merged before any of them."""
    keys = given.tokens(20, 0).keys
    there = torch.arange(20).expand(2, -1) < 14
    padded = pitome.energy(keys, 0.5, 1.0, there)
    torch.testing.assert_close(padded[:, :14], pitome.energy(keys[:, :14], 0.5, 1.0))
    assert (padded[:, 14:] == torch.inf).all()
    tokens = given.tokens(20, 0, 3, sizes=there.float())
    assigned = PiToMe(protect="always").reduce(tokens)
    assert all(len(set(image[:14])) == 14 for image in assigned.tolist())
