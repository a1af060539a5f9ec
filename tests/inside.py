"""Images before a layer of the LLM, random and adversarial, and what plain definitions need to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vlprune
from vlprune.image import ImageLayout, LayerTokens, ModelShape
from vlprune.integrations.llava import anyres, single
from vlprune.signals import QueryAttention, Signal

LAYOUTS: dict[str, Callable[[], ImageLayout]] = {
    "one tile": lambda: single(6),
    "one patch": lambda: single(1),
    "padded crops": lambda: anyres(30, 84, 4, 28, ((56, 84),)),
}
SHAPE = ModelShape(vision_layers=4, text_layers=8, feature_layer=2, has_cls=True)
LLAVA = ModelShape(vision_layers=24, text_layers=32, feature_layer=22, has_cls=True)
BEFORE, BEHIND, WIDTH, HEADS = 2, 5, 4, 2
"""Text tokens in front of the image and behind it; size of vectors; heads of keys."""


def _dominant(*shape: int) -> Tensor:
    values = torch.full(shape, 0.125)
    values[..., shape[-2] // 2, :] = torch.tensor([8.0, -8, 8, -8])
    return values


def _one_hot(*shape: int) -> Tensor:
    """Many exact duplicates and right angles."""
    return torch.nn.functional.one_hot(
        torch.arange(torch.Size(shape[:-1]).numel()).view(shape[:-1]) * 7 % 3, shape[-1]
    ).float()


CONTENTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "random": (
        lambda g, *shape: torch.randn(*shape, generator=g).mul(2).softmax(-1),
        lambda g, *shape: torch.randn(*shape, generator=g),
    ),
    "ties": (lambda g, *shape: torch.randint(1, 4, shape, generator=g) / 64, lambda g, *shape: _one_hot(*shape)),
    "zeros": (lambda g, *shape: torch.zeros(shape), lambda g, *shape: torch.zeros(shape)),
    "constant": (lambda g, *shape: torch.full(shape, 1 / 64), lambda g, *shape: torch.ones(shape)),
    "one dominant token": (lambda g, *shape: _spike(*shape), lambda g, *shape: _dominant(*shape)),
}
"""Attention ``(..., rows)`` and vectors ``(..., rows, width)``."""


def _spike(*shape: int) -> Tensor:
    values = torch.full(shape, 1 / 1024)
    values[..., shape[-1] // 2] = 0.75
    return values


def before_layer(
    method: vlprune.Method,
    layout: ImageLayout,
    layer: int,
    positions: Tensor,
    content: str | tuple[Callable[..., Tensor], Callable[..., Tensor]] = "random",
    seed: int = 0,
    shape: ModelShape = SHAPE,
    notes: dict[str, Tensor] | None = None,
) -> LayerTokens:
    """What ``method`` is shown of an image whose ``positions`` are left: all signals, of one image between words."""
    generator = torch.Generator().manual_seed(seed * 100 + layer)
    weights, vectors = CONTENTS[content] if isinstance(content, str) else content
    n = positions.shape[0]
    rows = BEFORE + n + BEHIND
    visual = torch.arange(n) + BEFORE
    text = torch.tensor([*range(BEFORE), *range(BEFORE + n, rows)])
    signals: dict[Signal, Tensor] = {}
    of_rows: dict[Signal, Tensor] = {}
    for signal in method.wants(shape):
        if signal.tower == "vision":
            continue
        if isinstance(signal, QueryAttention):
            queries = 1 if signal.queries == "last" or signal.mean_queries else len(text)
            attention = weights(generator, 1 if signal.mean_heads else 4, queries, rows)
            if signal.queries == "text" and not signal.mean_queries:
                attention[:, :BEFORE] = 0
            signals[signal] = attention[..., visual]
            continue
        if isinstance(signal, vlprune.AttentionColumns):
            signals[signal] = weights(generator, 4, rows)[..., visual]
            continue
        if isinstance(signal, vlprune.Transition):
            of_rows[signal] = vectors(generator, rows, WIDTH)[:, :2].tanh() + torch.tensor([1.0, 0.0])
            signals[signal] = of_rows[signal][visual]
            continue
        leading: dict[Any, tuple[int, ...]] = {vlprune.Keys: (HEADS,), vlprune.Values: (HEADS,), vlprune.ModuleDelta: (2,)}
        of_rows[signal] = vectors(generator, *leading.get(type(signal), ()), rows, WIDTH)
        signals[signal] = of_rows[signal][..., visual, :]
    plan = method.plan(layout, shape)
    return LayerTokens(
        layer=layer,
        hidden=vectors(generator, rows, WIDTH),
        visual=visual,
        positions=positions,
        last=rows - 1,
        count=plan.prefill[layer],
        layout=layout,
        shape=shape,
        signals=signals,
        row_signals=of_rows,
        notes={} if notes is None else notes,
        find_text=lambda: text,
    )


def journeys(
    method: vlprune.Method, content: str = "random", seed: int = 0, shape: ModelShape = SHAPE
) -> Iterator[tuple[LayerTokens, vlprune.Selection]]:
    """What ``method`` is shown and chooses, layer by layer, for each of ``LAYOUTS``."""
    for make in LAYOUTS.values():
        layout = make()
        try:
            plan = method.plan(layout, shape)
        except vlprune.BudgetError:
            assert layout.total == 1  # one token cannot become fewer
            continue
        positions, notes = torch.arange(plan.entering), {}
        for layer in plan.prefill:
            tokens = before_layer(method, layout, layer, positions, content, seed, shape, notes)
            selection = method.prefill(tokens)
            keep = selection.keep
            assert keep.tolist() == sorted(set(keep.tolist()))
            assert len(keep) == tokens.count
            yield tokens, selection
            positions = positions[keep]


def report(model: Any) -> vlprune.Report:
    found = vlprune.report(model)
    assert isinstance(found, vlprune.Report)
    return found


def best(scores: list[float], count: int) -> list[int]:
    """Places of the highest scores, in order; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def assert_best(kept: list[int], scores: list[float], count: int, tolerance: float = 1e-6) -> None:
    """``kept`` are the ``count`` best, but for scores so near to each other that float32 may swap them."""
    assert len(kept) == len(set(kept)) == count
    least = sorted(scores)[-count]
    assert all(scores[i] >= least - tolerance for i in kept)
    assert all(score <= least + tolerance for i, score in enumerate(scores) if i not in kept)


def length(vector: list[float]) -> float:
    return sum(x * x for x in vector) ** 0.5


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    norms = length(a) * length(b)
    return dot(a, b) / norms if norms else 0.0
