"""FEATHER against its definition written out, and attention without rotary embedding against plain projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests import flash, inside, zoo
from tests.reference import dropped, masked, text_layers
from vlprune.image import ImageLayout, LayerTokens
from vlprune.integrations.llava import single
from vlprune.method import Selection
from vlprune.methods.feather import LAST


def on_grid(layout: ImageLayout, stride: int) -> set[int]:
    found = set()
    for region in layout.regions:
        for r, row in enumerate(region.tolist()):
            found |= {place for c, place in enumerate(row) if r % stride == 0 and c % stride == 0}
    return found - {-1}


@pytest.mark.parametrize("content", inside.CONTENTS)
@pytest.mark.parametrize("stride", [1, 3])
def test_a_grid_first_then_attention_alone(stride, content):
    for budget, keep in ((0.4, None), (0.8, None), (1.0, (5, 1))):
        method = vlprune.FEATHER(budget=budget, keep=keep, stride=stride)
        for tokens, selection in inside.journeys(method, content, seed=2):
            weights = tokens[LAST][:, 0].double().tolist()
            heads = [[w / sum(head) if sum(head) else 0.0 for w in head] for head in weights]
            scores = [sum(row) / len(heads) for row in zip(*heads, strict=True)]
            evenly = on_grid(tokens.layout, stride) if tokens.layer == 2 else set()
            scores = [score + 2 * (place in evenly) for score, place in zip(scores, tokens.positions.tolist(), strict=True)]
            inside.assert_best(selection.keep.tolist(), scores, tokens.count)


@dataclass(kw_only=True)
class Noted(vlprune.FEATHER):
    """Notes the attention that it was shown."""

    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def prefill(self, tokens: LayerTokens) -> Selection:
        self.seen.setdefault(tokens.layer, []).append(tokens[LAST][:, 0])
        return super().prefill(tokens)


def unrotated(layer: Any, given: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(heads, n, head_dim)`` of normalised hidden states ``(n, D)``, keys repeated for their groups."""
    attention = layer.self_attn
    heads = [getattr(attention, f"{name}_proj")(given).view(len(given), -1, attention.head_dim) for name in "qk"]
    if hasattr(attention, "q_norm"):
        heads = [norm(h) for norm, h in zip((attention.q_norm, attention.k_norm), heads, strict=True)]
    query, key = (h.transpose(0, 1) for h in heads)
    return query, key.repeat_interleave(query.shape[0] // key.shape[0], 0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_attention_without_rotary_embedding(family, kernel):
    """In a batch with padding and several images, before and after tokens have left; nothing of it stays in the cache."""
    dtype = torch.float32 if kernel == "eager" else torch.float64
    model = flash.switch(zoo.build(family, dtype=dtype), kernel)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"], dtype=dtype)
    method = Noted(layers=(1, 3), keep=(0.5, 0.25), stride=2)
    with vlprune.applied(model, method), torch.no_grad():
        model(**inputs)
        report = inside.report(model)
        gone = dropped(model, inputs, report)
    given: dict[int, Tensor] = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: given.__setitem__(i, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for i, layer in enumerate(text_layers(model))
    ]
    with masked(model, inputs, gone), torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    starts, shown = [0] * len(inputs["input_ids"]), {1: [], 3: []}
    samples = [0, 1] if len(report.images) == 2 else [0, 1, 1]
    for image, sample in zip(report.images, samples, strict=True):
        places = (inputs["input_ids"][sample] == zoo.IMAGE).nonzero()[:, 0][starts[sample] :][: image.total]
        starts[sample] += image.total
        for layer in (1, 3):
            there = (inputs["attention_mask"][sample].bool() & ~gone.reading[layer - 1][sample]).nonzero()[:, 0]
            with torch.no_grad():
                query, key = unrotated(text_layers(model)[layer - 1], given[layer - 1][sample, there])
            scale = text_layers(model)[layer - 1].self_attn.scaling
            weights = (query[:, -1:] @ key.transpose(1, 2) * scale).softmax(-1)[:, 0]
            shown[layer].append(weights[:, torch.isin(there, places)])
    for layer in (1, 3):
        for found, expected in zip(method.seen[layer], shown[layer], strict=True):
            torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


def test_the_published_schedule():
    """A share of 0.3 and every third row and column, then 0.3 squared of what is left: 3.3 % of all, says the paper."""
    first = 0.3 + 0.7 / 9
    mean = (8 + 8 * first + 16 * 0.09 * first) / 32
    plan = vlprune.FEATHER(budget=mean).plan(single(24), inside.LLAVA)
    assert plan.prefill[8] == pytest.approx(first * 576, abs=2)
    assert plan.prefill[16] == pytest.approx(0.09 * first * 576, abs=1)
    assert plan.prefill[16] == pytest.approx(0.033 * 576, abs=1)


def test_a_stride_is_a_number_of_rows():
    with pytest.raises(vlprune.OptionError, match="from 1 on"):
        vlprune.FEATHER(stride=0)
