"""Rows as a block method sees them: random ones, and such as put a rule to the test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.blocks import BlockAttention, BlockTokens


def tokens(
    rows: int = 13, prefix: int = 1, leaving: int = 4, batch: int = 2, seed: int = 0, heads: int = 2, **given: Any
) -> BlockTokens:
    """Random rows; ``hidden``, ``sizes``, ``queries``, ``keys`` and so on in place of what would be drawn."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    queries, keys, values = (draw(batch, heads, rows, 4) * 2 for _ in range(3))
    sizes = torch.randint(1, 4, (batch, rows), generator=generator).float()
    hidden = draw(batch, rows, 6)
    queries, keys, values = given.pop("queries", queries), given.pop("keys", keys), given.pop("values", values)
    sizes, hidden = given.pop("sizes", sizes), given.pop("hidden", hidden)
    weights = given.pop("weights", sizes.log())
    attention = BlockAttention(queries, keys, values, weights, 0.5)
    place = {"block": 3, "blocks": 12, **given}
    return BlockTokens(keys.mean(1).float(), hidden, sizes, prefix, leaving, attention=attention, **place)


def adversarial(**given: Any) -> dict[str, BlockTokens]:
    """Rows all equal, all zero, two kinds only, huge, not a number: a choice must still be made, and be complete."""
    shape = tokens(**given)
    like = {"keys": shape.read.keys, "queries": shape.read.queries, "values": shape.read.values, "hidden": shape.hidden}

    def made(fill: Any) -> BlockTokens:
        return tokens(**{**given, **{name: fill(value) for name, value in like.items()}})

    def two_kinds(value: Tensor) -> Tensor:
        return torch.where(torch.arange(value.shape[-2])[:, None] % 3 == 0, 1.0, -1.0).expand_as(value).clone()

    def broken(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., value.shape[-2] // 2, :] = float("nan")
        return value

    return {
        "equal": made(torch.ones_like),
        "zero": made(torch.zeros_like),
        "two kinds": made(two_kinds),
        "huge": made(lambda value: value * 1e18),
        "not a number": made(broken),
    }


def attention_map(given: BlockTokens) -> Tensor:
    """The block's attention ``(B, H, N, N)`` in float64, all of it."""
    part = given.read
    logits = part.queries.double() @ part.keys.double().mT * part.scaling
    if part.weights is not None:
        logits = logits + part.weights.double()[:, None, None]
    return logits.softmax(-1)


def complete(given: BlockTokens, assigned: Tensor) -> None:
    """Every output row is used, protected rows are alone where they were, and nothing else is said."""
    assert assigned.dtype == torch.int64
    assert assigned.shape == given.sizes.shape
    for image in assigned.tolist():
        front, others = image[: given.prefix], image[given.prefix :]
        assert front == list(range(given.prefix))
        assert {place for place in others if place >= 0} == set(range(given.prefix, given.count))
        assert min(others, default=0) >= -1
