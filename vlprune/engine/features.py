"""What a seam gives, in whatever container the model has for it: taken apart image by image, and put together again.

Models give a tensor ``(images, n, D)``, a list of ``(n_i, D)``, one of ``(tiles, n, D)``, or one entry a sample that holds
several images. Before transformers 5 they give it bare, and Qwen3-VL beside its DeepStack features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.engine.devices import to_device
from vlprune.errors import VLPruneError
from vlprune.image import ImageLayout, centres


def features_of(out: Any) -> Any:
    """The container of features in ``out``."""
    if hasattr(out, "pooler_output"):
        return out.pooler_output
    return out[0] if _beside_others(out) else out


def with_features(out: Any, features: Any) -> Any:
    """``out`` with another container of features."""
    if hasattr(out, "pooler_output"):
        out.pooler_output = features
        return out
    return (features, *out[1:]) if _beside_others(out) else features


def _beside_others(out: Any) -> bool:
    return isinstance(out, tuple) and bool(out) and isinstance(out[0], (list, tuple))


def taken_apart(features: Any, layouts: list[ImageLayout], tail: Tensor | None) -> list[Tensor]:
    """Features ``(total, D)`` of each image. ``tail (n, D)``: what the model puts behind each of them later."""
    pieces = [piece.flatten(0, -2) for piece in features]
    totals = [layout.total for layout in layouts]
    lengths = [piece.shape[0] for piece in pieces]
    if lengths == totals:
        return pieces
    if tail is not None and [length + tail.shape[0] for length in lengths] == totals:
        return [torch.cat([piece, tail.to(piece)]) for piece in pieces]
    if sum(lengths) != sum(totals):
        raise VLPruneError(
            f"the vision encoder gave {sum(lengths)} visual tokens where {sum(totals)} were expected for images of "
            f"{totals} tokens; is this a variant of its family that puts its tokens together in another way?"
        )
    return list(torch.cat(pieces).split(totals))


def put_together(features: Any, images: list[Tensor]) -> Any:
    """The container ``features`` with other ``images``, each ``(total, D)``; what was put behind them is left out again."""
    pieces = list(features)
    lengths = [piece.flatten(0, -2).shape[0] for piece in pieces]
    if len(images) == len(pieces):
        parts = [image[:length] for image, length in zip(images, lengths, strict=True)]
    else:
        parts = list(torch.cat(images).split(lengths))
    parts = [part.view_as(piece) for part, piece in zip(parts, pieces, strict=True)]
    return torch.stack(parts) if torch.is_tensor(features) else type(features)(parts)


def restored(out: Any, layouts: list[ImageLayout], grids: list[tuple[int, int]]) -> Any:
    """``out`` of an encoder that saw each image's tiles at its ``grid``, put where their centres lie on the full one.

    Zeros elsewhere; DeepStack features alike.
    """
    out = with_features(out, _on_full_grids(features_of(out), layouts, grids))
    if getattr(out, "deepstack_features", None) is not None:
        out.deepstack_features = [_on_full_grids(level, layouts, grids) for level in out.deepstack_features]
    elif _beside_others(out):
        sizes = [layout.tiles * rows * columns for layout, (rows, columns) in zip(layouts, grids, strict=True)]
        out = (out[0], [torch.cat(_on_full_grids(level.split(sizes), layouts, grids)) for level in out[1]])
    return out


def _on_full_grids(features: Any, layouts: list[ImageLayout], grids: list[tuple[int, int]]) -> Any:
    full = []
    for image, layout, grid in zip(features, layouts, grids, strict=True):
        places = to_device(layout.placeholder[:, centres(layout.grid, grid)].flatten(), image.device)
        full.append(image.new_zeros(layout.total, image.shape[-1]).index_copy(0, places, image))
    return type(features)(full)
