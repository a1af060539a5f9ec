"""How much a vision encoder attends to each patch, and budgets divided among tiles, for methods that rank patches by it."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.budget import apportion, rounded_up
from vlprune.image import ImageLayout, ImageTokens, ModelShape, VisionTokens, remembered, top
from vlprune.signals import ClsAttention, GlobalAttention, MeanAttention, ReceivedAttention, Signal

KINDS = (ClsAttention, GlobalAttention, MeanAttention, ReceivedAttention)


def attention_signal(shape: ModelShape, layer: int, otherwise: type[Signal] = MeanAttention) -> Signal:
    """What [CLS] attends to in vision block ``layer``; ``otherwise`` in its place for encoders without [CLS]."""
    return ClsAttention(layer) if shape.has_cls else otherwise(layer)


def attention_of(image: ImageTokens) -> Tensor:
    """Attention to each patch ``(tiles, patches)``: mean over heads, summed over the blocks that were asked for."""
    layers = [values.mean(1) for signal, values in image.signals.items() if isinstance(signal, KINDS)]
    return torch.stack(layers).sum(0)


def number_or_lowest(scores: Tensor) -> Tensor:
    """``scores`` without NaN and infinities; NaN ranks behind all else."""
    lowest = torch.finfo(scores.dtype).min
    return scores.nan_to_num(nan=lowest, neginf=lowest)


def attention_by_place(image: ImageTokens) -> Tensor:
    """:func:`attention_of` of each place in the prompt ``(total,)``; 0 for row ends."""
    attention, total = attention_of(image), image.layout.total
    places = image.host(image.layout.placeholder)
    # One more place takes what lies in the padding.
    by_place = attention.new_zeros(total + 1)
    return by_place.scatter(0, torch.where(places < 0, total, places).flatten(), attention.flatten())[:total]


def as_one_head(image: ImageTokens) -> tuple[Tensor, Tensor]:
    """Scores that rank patches like the attention of all heads as one, and that attention: both ``(tiles, patches)``.

    Logits of one wide head are the sum of the heads' logits over the root of their number. Of each head the logarithm of its
    attention is its logits less a constant, and what is missing from a sum of 1 is the attention that [CLS] pays to itself.
    Scores are rounded, so that patches that differ by rounding errors only are equal.
    """
    signal, values = next((s, v.nan_to_num()) for s, v in image.signals.items() if isinstance(s, KINDS))
    tiny = torch.finfo(values.dtype).tiny
    logits = values.clamp(min=tiny).log().sum(1) / values.shape[1] ** 0.5
    logits = logits.mul(1e4).round() / 1e4
    if not isinstance(signal, ClsAttention):
        return logits, logits.softmax(1)
    own = (1 - values.sum(2)).clamp(min=tiny).log().sum(1, keepdim=True) / values.shape[1] ** 0.5
    return logits, torch.cat([own, logits], 1).softmax(1)[:, 1:]


def normalised(weights: Tensor) -> Tensor:
    """``weights`` that add up to 1 along the last dimension; zeros stay zeros."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def value_affinity(values: Tensor, value: Tensor) -> Tensor:
    """Softmax over rows ``(..., heads, n)`` of their ``values (..., heads, n, head_dim)`` times one ``value``."""
    return (values @ value[..., None])[..., 0].softmax(-1)


def ranks(scores: Tensor) -> Tensor:
    """Place of every one in its row's order, best first: ``(rows, n)``."""
    order = top(scores, scores.shape[1])
    return torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))


def in_picture(scores: Tensor, image: ImageTokens) -> Tensor:
    """``scores (tiles, patches)`` that rank what is no number behind all else, and patches in the padding behind that."""
    ranked = number_or_lowest(scores)
    return ranked.masked_fill(image.host(image.layout.placeholder) < 0, -torch.inf)


def best_of_encoder(scores: Tensor, tokens: VisionTokens, count: int) -> Tensor:
    """Ascending rows ``(tiles, count)`` of each tile with the highest ``scores (tiles, n)``; those in the padding go first.

    So how many tokens of the prompt are left is known before.
    """
    places = tokens.layout.placeholder.to(scores.device, non_blocking=True).gather(1, tokens.patches)
    return top(number_or_lowest(scores).masked_fill(places < 0, -torch.inf), count).sort().values


@remembered
def equal_shares(layout: ImageLayout, count: int) -> list[int]:
    """``count`` divided evenly among tiles, none above its patches that are in the prompt; earlier tiles get what is odd.

    Where ``count`` exceeds all patches, each tile has all of its own.
    """
    count = min(count, sum(layout.available))
    return apportion(count, [1.0] * layout.tiles, layout.available)


@remembered
def tiles_alike(layout: ImageLayout, count: int) -> list[tuple[int, int, Tensor]]:
    """Tiles that can be computed on together: their share of ``count``, their patches in the prompt, and their indices."""
    numbers = list(zip(equal_shares(layout, count), layout.available, strict=True))
    return [
        (share, available, torch.tensor([tile for tile, own in enumerate(numbers) if own == (share, available)]))
        for share, available in dict.fromkeys(numbers)
    ]


def best_of_tiles(scores: Tensor, image: ImageTokens) -> Tensor:
    """Prompt indices of each tile's best patches by ``scores (tiles, patches)``, its equal share of the budget many."""
    order = top(in_picture(scores, image), scores.shape[1])
    places = image.host(image.layout.placeholder).gather(1, order)
    return places.flatten()[image.host(_seats(image.layout, image.count))]


def best_share_of_tiles(attention: Tensor, share: float, alive: Tensor, image: ImageTokens) -> Tensor:
    """Which of the image's placeholders ``(total,)`` bool are the part ``share``, rounded up, of their tile's patches that
    ``attention (tiles, patches)`` is highest for. Only ``alive``, indices of placeholders, count."""
    places, patches, total = image.host(image.layout.placeholder), attention.shape[1], image.layout.total
    flags = torch.zeros(total + 1, dtype=torch.bool, device=image.device)  # one more place takes the padding
    there = flags.index_fill(0, alive, True)[places]
    quotas = image.host(torch.tensor([rounded_up(share, tokens) for tokens in range(patches + 1)]))
    within = torch.arange(patches, device=image.device) < quotas[there.sum(1)][:, None]
    order = top(number_or_lowest(attention).masked_fill(~there, -torch.inf), patches)
    chosen = torch.zeros_like(there).scatter(1, order, within)
    return flags.scatter(0, torch.where(chosen, places, total).flatten(), True)[:total]


@remembered
def _seats(layout: ImageLayout, count: int) -> Tensor:
    """Flat indices into ``(tiles, ranks)`` of the first ranks of each tile."""
    width = layout.placeholder.shape[1]
    return torch.cat([tile * width + torch.arange(share) for tile, share in enumerate(equal_shares(layout, count))])


def rows_of(values: Tensor, patches: Tensor) -> Tensor:
    """``(tiles, n, D)``: rows ``patches (tiles, n)`` of ``values (tiles, N, D)``."""
    return values.gather(1, patches[..., None].expand(-1, -1, values.shape[-1]))
