"""EViT keeps and fuses what its specification says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

import vlprune
from tests.vit import given
from tests.vit.models import BASES, build, images
from vlprune import BudgetError, EViT, OptionError
from vlprune.schedule import quarters, staged_exactly


def naive(tokens, kept, fuse):
    """Rows of one image behind the block, one by one, and which of them stands for each, in float64."""
    attention = given.attention_map(tokens)[:, :, 0].mean(1)
    images, maps = [], []
    for scores, hidden in zip(attention.tolist(), tokens.hidden.double(), strict=True):
        free = range(tokens.prefix, len(scores))
        stay = sorted(sorted(free, key=lambda i, s=scores: -s[i])[:kept])
        gone = [i for i in free if i not in stay]
        rows = [hidden[i] for i in [*range(tokens.prefix), *stay]]
        if fuse:
            rows.append(sum(scores[i] * hidden[i] for i in gone))
        order = [*range(tokens.prefix), *stay]
        maps.append([order.index(i) if i in order else len(order) if fuse else -1 for i in range(len(scores))])
        images.append(torch.stack(rows))
    return torch.stack(images), maps


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_the_rows_are_those_of_the_specification(prefix):
    for rows, leaving, sized in ((12, 1, False), (20, 7, True), (9, 8 - prefix, False)):
        options = {} if sized else {"weights": None}
        tokens = given.tokens(rows, prefix, leaving, seed=rows, **options)
        for fuse in (True, False):
            method = EViT(fuse=fuse)
            assigned = method.reduce(tokens)
            given.complete(tokens, assigned)
            hidden, sizes = method.merge(tokens, assigned, tokens.count)
            expected, maps = naive(tokens, rows - prefix - leaving - fuse, fuse)
            assert assigned.tolist() == maps
            torch.testing.assert_close(hidden.double(), expected, atol=1e-5, rtol=1e-5)
            if fuse:
                assert sizes.sum(1).tolist() == tokens.sizes.sum(1).tolist()


def test_whatever_the_rows_the_choice_is_complete():
    for leaving in (1, 9):
        for tokens in given.adversarial(rows=11, leaving=leaving).values():
            for fuse in (True, False):
                given.complete(tokens, EViT(fuse=fuse).reduce(tokens))
    equal = given.adversarial(rows=11, leaving=4, weights=None)["equal"]
    assert EViT(fuse=False).reduce(equal)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1, -1], "earlier rows win"


@pytest.mark.parametrize("base", [*(base for base in BASES if base != "siglip"), "dinov3"])
def test_attention_read_beside_the_kernel_is_that_of_the_model(base):
    """Queries and keys are those that the model's own attention uses: its eager map has the same row of [CLS]."""
    model, seen = build(base, attention="eager"), []

    class Spy(EViT):
        def reduce(self, tokens):
            seen.append(tokens.read.of_cls())
            return super().reduce(tokens)

    with torch.no_grad():
        expected = model(pixel_values=images(), output_attentions=True).attentions[1][:, :, 0].mean(1)
        with vlprune.applied(model, Spy(keep=0.5, at=[1])):
            model(pixel_values=images())
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-4)


def test_dropped_rows_come_back_as_the_mean_of_those_that_are_left():
    """Behind the last block, in front of what norm there is."""
    model, seen = build("dinov2"), []
    model.encoder.layer[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    with vlprune.applied(model, "evit", budget=0.6, fuse=False), torch.no_grad():
        model(pixel_values=images())
        maps = torch.tensor(vlprune.report(model).assignment)
    out = seen[0] if torch.is_tensor(seen[0]) else seen[0][0]
    for rows, places in zip(out, maps, strict=True):
        kept = rows[1:][places[1:] >= 0]
        gone = rows[1:][places[1:] < 0]
        assert len(gone) > 0
        torch.testing.assert_close(gone, kept.mean(0).expand_as(gone), atol=1e-5, rtol=1e-5)


@drawn(st.integers(1, 300), st.integers(2, 24), st.floats(0.05, 1.0), st.data())
def test_stages_meet_a_budget_exactly(tokens, blocks, budget, data):
    at = sorted(data.draw(st.sets(st.integers(0, blocks - 1), max_size=4)))
    room, first = int(round(budget * tokens * blocks, 6)), min(at, default=blocks)
    if room < tokens * first + blocks - first:
        with pytest.raises(BudgetError, match="at least"):
            staged_exactly(budget, tokens, blocks, at)
        return
    counts = staged_exactly(budget, tokens, blocks, at)
    assert sum(counts) == room
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 1
    assert set(counts[:first]) <= {tokens}


def test_counts_of_the_paper_and_of_a_budget():
    kept = [math.ceil(0.7 * n) for n in (196, 139, 99)]
    assert EViT(keep=0.7).counts(196, 12) == [196] * 3 + [139] * 3 + [99] * 3 + [71] * 3
    assert kept == [138, 98, 70]
    assert EViT(keep=0.7, fuse=False).counts(196, 12)[3] == 138
    assert EViT(keep=1.0).counts(196, 12) == [196] * 12
    counts = EViT(budget=0.5).counts(196, 12)
    assert sum(counts) == 196 * 6
    assert len(set(counts)) <= 5, "three stages, and a row or two that what is left over keeps for a block"
    assert quarters(12) == [3, 6, 9]
    assert quarters(2) == [1]
    assert EViT(at=[2, 1], keep=0.5, fuse=False).counts(8, 4) == [8, 4, 2, 2]


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 1.1}])
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(OptionError):
        EViT(**wrong)
    with pytest.raises(OptionError, match="0 to 11"):
        EViT(at=[12]).counts(196, 12)
