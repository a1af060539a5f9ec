"""Images as methods between encoder and LLM see them, random and adversarial, and plain Python to define choices with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import vlprune
from vlprune.image import ImageLayout, ImageTokens, ModelShape
from vlprune.integrations.layouts import tiles_in_a_row
from vlprune.integrations.llava import anyres, single

LAYOUTS: dict[str, Callable[[], ImageLayout]] = {
    "one tile": lambda: single(6),
    "one patch": lambda: single(1),
    "2 x 2 crops": lambda: anyres(56, 56, 4, 28, ((56, 56),)),
    "padded above and below": lambda: anyres(30, 84, 4, 28, ((56, 84),)),
    "padded left and right": lambda: anyres(84, 20, 4, 28, ((84, 28), (56, 28))),
    "frames of a video": lambda: tiles_in_a_row(3, (4, 6), separators=1, video=True),
}
CLIP = ModelShape(vision_layers=4, text_layers=4, feature_layer=2, has_cls=True)
SIGLIP = ModelShape(vision_layers=4, text_layers=4, feature_layer=3, has_cls=False)
SHAPES = {"[CLS]": CLIP, "no [CLS]": SIGLIP}


def _one_hot(*shape: int) -> Tensor:
    """Many exact duplicates and right angles."""
    return torch.nn.functional.one_hot(torch.arange(math.prod(shape)).view(shape) * 7 % 3, 4).float()


def _dominant(*shape: int) -> Tensor:
    values = torch.full((*shape, 4), 0.125)
    values.view(-1, 4)[shape[-1] // 2] = torch.tensor([8.0, -8, 8, -8])
    return values


CONTENTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ties": (lambda g, *shape: torch.randint(1, 4, shape, generator=g) / 16, lambda g, *shape: _one_hot(*shape)),
    "zeros": (lambda g, *shape: torch.zeros(shape), lambda g, *shape: torch.zeros(*shape, 4)),
    "constant": (lambda g, *shape: torch.full(shape, 0.25), lambda g, *shape: torch.ones(*shape, 4)),
    "one dominant token": (lambda g, *shape: _spike(*shape), lambda g, *shape: _dominant(*shape)),
}
"""Attention ``(tiles, heads, patches)`` and vectors ``(..., 4)``, adversarial. Means of four and cosines are exact."""


def _spike(*shape: int) -> Tensor:
    values = torch.full(shape, 1 / 1024)
    values[..., shape[-1] // 2] = 0.75
    return values


def image(
    method: vlprune.Method, layout: ImageLayout, content: str = "random", seed: int = 0, shape: ModelShape = CLIP
) -> ImageTokens:
    """One image with everything that ``method`` asks for of a model of ``shape``."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weights, vectors = CONTENTS.get(
        content, (lambda g, *size: noise(*size).mul(2).softmax(-1), lambda g, *size: noise(*size, 4))
    )
    tiles, patches = layout.placeholder.shape
    signals = {}
    for signal in method.wants(shape):
        if isinstance(signal, (vlprune.Hidden, vlprune.Keys)):
            heads = (2,) if isinstance(signal, vlprune.Keys) else ()
            signals[signal] = vectors(generator, tiles, *heads, patches)
        else:
            signals[signal] = weights(generator, tiles, 4, patches)
    return ImageTokens(vectors(generator, layout.total), layout, method.count(layout.total), signals)


def shares(img: ImageTokens) -> list[int]:
    """The budget handed out one by one, to the tile that has least of it and patches left."""
    free, given = img.layout.available, [0] * img.layout.tiles
    for _ in range(min(img.count, sum(free))):
        given[min((t for t in range(len(free)) if given[t] < free[t]), key=lambda t: (given[t], t))] += 1
    return given


def filled_up(keep: list[int], img: ImageTokens) -> list[int]:
    """Prompt indices in order, row ends where patches do not suffice."""
    assert len(set(keep)) == len(keep)
    return sorted([*keep, *img.layout.separators.tolist()[: img.count - len(keep)]])


def ranked(scores: list[float], places: list[int]) -> list[int]:
    """Patches of a tile that are in the prompt, highest score first, then lowest index."""
    return sorted((p for p, place in enumerate(places) if place >= 0), key=lambda p: (-scores[p], p))


def heads_mean(attention: Tensor) -> list[list[float]]:
    return attention.double().mean(1).tolist()


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0
