"""FastV against its definition written out."""

from __future__ import annotations

import pytest

import vlprune
from tests import inside
from vlprune.integrations.llava import single
from vlprune.methods.fastv import LAST


@pytest.mark.parametrize("content", inside.CONTENTS)
def test_the_last_tokens_attention_decides(content):
    """Once, before the layer; of equal tokens the first stay."""
    for layer, budget, keep in ((1, 0.3, None), (2, 0.6, None), (5, 0.9, None), (3, 1.0, 4)):
        method, seen = vlprune.FastV(layer=layer, budget=budget, keep=keep), 0
        for tokens, selection in inside.journeys(method, content, seed=layer):
            assert tokens.layer == layer
            assert selection.keep.tolist() == inside.best(tokens[LAST][0, 0].double().tolist(), tokens.count)
            seen += 1
        assert seen >= 2


def test_the_published_setting():
    """Half of 576 tokens from layer 2 on: a mean of 306 over 32 layers."""
    plan = vlprune.FastV(layer=2, keep=0.5).plan(single(24), inside.LLAVA)
    assert plan.prefill == {2: 288}
    assert vlprune.FastV(layer=2, budget=306).plan(single(24), inside.LLAVA) == plan
