"""vid-TLDR weighs what merges away as its specification says."""

from __future__ import annotations

import math

import pytest
import torch

from tests.vit import given
from vlprune import BudgetError, OptionError, ToMe, VidTLDR
from vlprune.methods import vid_tldr


def naive(tokens):
    """Rows, sizes and assignment, row by row in float64."""
    plain = given.tokens(tokens.hidden.shape[1], weights=None, queries=tokens.read.queries, keys=tokens.read.keys)
    attention, results = given.attention_map(plain).mean(1), []
    chosen = ToMe().reduce(given.tokens(tokens.hidden.shape[1], tokens.prefix, tokens.leaving, keys=tokens.hidden[:, None]))
    for image, places in enumerate(chosen.tolist()):
        focus = [sum(p * math.log(p) for p in row if p > 0) for row in attention[image].tolist()]
        free = focus[tokens.prefix :]
        low, high = min(free), max(free)
        scaled = [(value - low) / (high - low) for value in focus]
        mean = sum(scaled[tokens.prefix :]) / len(free)
        saliency = [0.0 if value < mean else (value - mean) / (1 - mean) for value in scaled]
        rows, sizes = [], []
        for place in range(tokens.count):
            members = [i for i, p in enumerate(places) if p == place]
            target = next((i for i in members if i % 2 == 1), members[0])
            weights = [float(tokens.sizes[image, i]) * (1 if i == target else saliency[i]) for i in members]
            parts = tokens.hidden[image, members].double() * torch.tensor(weights, dtype=torch.float64)[:, None]
            rows.append(parts.sum(0) / sum(weights))
            sizes.append(sum(weights))
        results.append((torch.stack(rows), sizes, places))
    return results


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_rows_sizes_and_assignment_are_those_of_the_specification(prefix, monkeypatch):
    for rows, leaving, at_once in ((12, 4, 2**22), (21, 9, 60)):
        monkeypatch.setattr(vid_tldr, "AT_ONCE", at_once)
        tokens = given.tokens(rows, prefix, leaving, seed=rows)
        method = VidTLDR()
        assigned = method.reduce(tokens)
        given.complete(tokens, assigned)
        hidden, sizes = method.merge(tokens, assigned, tokens.count)
        for image, (expected, weights, places) in enumerate(naive(tokens)):
            assert assigned[image].tolist() == places
            torch.testing.assert_close(hidden[image].double(), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sizes[image], torch.tensor(weights), atol=1e-4, rtol=1e-4)


def test_background_adds_nothing_to_what_it_merges_into():
    """One of two kinds of rows attends to everything alike: its features do not count, the others' do."""
    queries = torch.zeros(1, 1, 8, 4)
    queries[0, 0, 4:] = 8 * torch.eye(4)
    keys = torch.eye(4).repeat(2, 1)[None, None]
    hidden = torch.arange(8.0)[None, :, None] + torch.tensor([10.0, 0, 0])
    tokens = given.tokens(8, 0, 4, batch=1, heads=1, queries=queries, keys=keys, hidden=hidden, sizes=torch.ones(1, 8))
    assert vid_tldr.saliency(tokens)[0, :4].tolist() == [0, 0, 0, 0]
    assert (vid_tldr.saliency(tokens)[0, 4:] > 0.9).all()
    alike = given.tokens(8, 2, 3, queries=torch.zeros(2, 2, 8, 4))
    assert vid_tldr.saliency(alike)[:, 2:].unique().tolist() == [1.0]


def test_whatever_the_rows_the_choice_is_complete_and_counts():
    method = VidTLDR()
    for leaving in (1, 5):
        for name, tokens in given.adversarial(rows=11, leaving=leaving).items():
            assigned = method.reduce(tokens)
            given.complete(tokens, assigned)
            hidden, sizes = method.merge(tokens, assigned, tokens.count)
            assert sizes.isfinite().all()
            assert name == "not a number" or hidden.isfinite().all()
    assert VidTLDR(r=[600, 200, 0.5]).counts(1568, 5) == [968, 768, 384, 384, 384]
    counts = VidTLDR(budget=0.5).counts(1568, 12)
    assert sum(counts) == 1568 * 6
    assert len(set(counts[4:])) <= 2, "what the stages leave over may hold a row back for a few blocks"
    with pytest.raises(BudgetError, match="pairs them"):
        VidTLDR(budget=0.2, depth=1).counts(1568, 12)
    for wrong in ({"r": [1.5]}, {"r": [-1]}, {"depth": 0}):
        with pytest.raises(OptionError):
            VidTLDR(**wrong)
