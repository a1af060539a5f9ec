"""Floating point operations of a forward: two for each weight of a matrix and each row that it is applied to, and four for
each channel and each pair of a query and a key. A causal mask is not taken off, as torch's own counter does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from vlprune.engine.family import Parts
    from vlprune.engine.steps import Step
    from vlprune.image import ImageLayout


def text(parts: Parts, rows: Sequence[int], past: Sequence[int]) -> int:
    """Of the LLM's layers for one sequence. ``rows`` go through each layer, ``past`` are in its cache before."""
    width = heads_width(parts.text.config)
    layers = zip(parts.text_layers, rows, past, strict=True)
    return sum(_layer(layer, new, new * (new + old), width) for layer, new, old in layers)


def vision(parts: Parts, layout: ImageLayout, grid: tuple[int, int], steps: Sequence[Step] = ()) -> int:
    """Of vision encoder and projector for one image whose tiles are of ``grid`` tokens, each counted by itself.

    ``steps``: what left inside of the encoder. Windows are taken to lose alike; filler, and pairs of different images where
    a mask hides them, are not counted.
    """
    all_rows, rows_of_token = _rows(parts, grid), parts.family.groups(parts.model, grid).shape[1]
    left = {step.layer: step.rows for step in steps if step.stage == "encode" and step.rows is not None}
    width = getattr(parts.vision.config, "embed_dim", None) or parts.vision.config.hidden_size
    early = dict(zip(getattr(parts.vision.config, "deepstack_visual_indexes", ()), _early_projectors(parts), strict=False))
    flops, rows = 2 * all_rows * _weights(parts.vision, 4, 5), all_rows
    for layer, block in enumerate(parts.vision_layers):
        present = rows + parts.prefix
        pairs = _pairs(parts, layer, grid, all_rows) * (present / (all_rows + parts.prefix)) ** 2
        flops += _layer(block, present, round(pairs), width)
        if layer in early:
            flops += 2 * rows // rows_of_token * _weights(early[layer], 2)
        rows = left.get(layer, rows)
    projected = rows if parts.family.pointwise else all_rows
    return layout.tiles * (flops + 2 * projected // rows_of_token * _weights(parts.projector, 2))


def heads_width(config: Any) -> int:
    """Channels of all query heads of an LLM."""
    return head_width(config) * config.num_attention_heads


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer(layer: nn.Module, rows: int, pairs: int, width: int) -> int:
    return 2 * rows * _weights(layer, 2) + 4 * pairs * width


def _weights(module: nn.Module, *dimensions: int) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim in dimensions)


def _early_projectors(parts: Parts) -> Sequence[nn.Module]:
    """Qwen3-VL has projectors behind some of its vision blocks, too."""
    return getattr(parts.vision, "deepstack_merger_list", None) or ()


def _rows(parts: Parts, grid: tuple[int, int]) -> int:
    """Rows of a tile of ``grid`` tokens in the vision encoder, [CLS] not counted."""
    rows = parts.family.groups(parts.model, grid).numel()
    if parts.family.packed or parts.family.resizable:
        return rows
    # Tiles are of one size then, and pooling behind the encoder may leave rows over that belong to no token.
    tile, patch = (_pair(getattr(parts.vision.config, name)) for name in ("image_size", "patch_size"))
    return max(rows, (tile[0] // patch[0]) * (tile[1] // patch[1]))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _pairs(parts: Parts, layer: int, grid: tuple[int, int], rows: int) -> int:
    """Pairs of rows of a tile that attend to each other in a block; in some of Qwen2.5-VL's only those of one window do."""
    config = parts.vision.config
    if layer in getattr(config, "fullatt_block_indexes", (layer,)):
        return (rows + parts.prefix) ** 2
    side = config.window_size // config.patch_size // config.spatial_merge_size
    tokens = [(size // side) * side**2 + (size % side) ** 2 for size in grid]
    return tokens[0] * tokens[1] * config.spatial_merge_size**4
