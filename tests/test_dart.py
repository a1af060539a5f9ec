"""DART against its definition written out: pivots that take turns to choose."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests import inside
from vlprune.image import LayerTokens
from vlprune.integrations.llava import single
from vlprune.methods.dart import KEYS, STATES


def by_hand(tokens: LayerTokens, images: int, texts: int) -> list[int]:
    """Of all visual tokens, which are kept."""
    keys, states = tokens.rows(KEYS).double().tolist(), tokens.rows(STATES).double().tolist()
    visual, n = tokens.visual.tolist(), tokens.visual.shape[0]
    loud = [sum(abs(x) for head in keys for x in head[row]) for row in range(len(states))]
    kept = sorted(range(n), key=lambda i: (-loud[visual[i]], i))[: min(images, tokens.count)]
    text = sorted(tokens.text.tolist(), key=lambda row: (row < visual[0], -loud[row], row))[:texts]
    pivots = [visual[i] for i in kept] + text
    quotas = [0] * len(pivots)
    for turn in range(tokens.count - len(kept)):
        quotas[turn % len(pivots)] += 1
    for pivot, quota in zip(pivots, quotas, strict=True):
        free = [i for i in range(n) if i not in kept]
        kept += sorted(free, key=lambda i: (inside.cosine(states[visual[i]], states[pivot]), i))[:quota]
    return sorted(kept)


@pytest.mark.parametrize("content", inside.CONTENTS)
@pytest.mark.parametrize(("images", "texts"), [(4, 4), (1, 0), (2, 7), (3, 50)])
def test_pivots_choose_what_is_least_like_them(images, texts, content):
    for options in ({"budget": 0.2}, {"budget": 0.5}, {"keep": (3,)}):
        method = vlprune.DART(**options, image_pivots=images, text_pivots=texts)
        for seed in range(2):
            for tokens, selection in inside.journeys(method, content, seed):
                assert selection.keep.tolist() == by_hand(tokens, images, texts)


def test_a_prompt_without_text_behind_the_image():
    """Then text before it steps in; with no text at all, visual pivots choose alone."""
    method = vlprune.DART(budget=0.5)
    whole = inside.before_layer(method, single(6), 1, torch.arange(36))
    for text in (torch.tensor([0, 1]), torch.zeros(0, dtype=torch.long)):
        changed = {**whole.__dict__, "find_text": lambda text=text: text}
        changed.pop("text", None)
        tokens = LayerTokens(**changed)
        assert method.prefill(tokens).keep.tolist() == by_hand(tokens, 4, 4)


def test_the_official_budget():
    """128 tokens from layer 2 on, 14.5 more than there: 4 pivots, and eight times as many as come out even."""
    plan = vlprune.DART(keep=(128,)).plan(single(24), inside.LLAVA)
    assert plan.prefill == {2: 128}
    assert plan.at_layers(32)[:3] == [576, 576, 128]
    assert vlprune.DART(budget=192).plan(single(24), inside.LLAVA).prefill == {2: 166}


def test_pivots_are_needed():
    with pytest.raises(vlprune.OptionError, match="at least one visual pivot"):
        vlprune.DART(image_pivots=0)
