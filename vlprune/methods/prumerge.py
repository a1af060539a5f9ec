"""PruMerge and PruMerge+: patches that stand out in [CLS] attention take in those that are like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import ImageTokens, ModelShape, remembered, top
from vlprune.knobs import Draw
from vlprune.method import Method, Mixture, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import as_one_head, attention_signal, in_picture, rows_of, tiles_alike
from vlprune.signals import Keys, Signal


@register("prumerge")
@dataclass(kw_only=True)
class PruMerge(Method):
    """PruMerge: the patches with the most [CLS] attention stay, each takes in its neighbours, one token all that leave.

    ``a`` is the attention of [CLS] in the last vision block with all heads as one, ``softmax(q k / sqrt(hidden))``. Of ``T``
    tokens of a tile ``T - 1`` are kept patches. Each adds ``a_j x_j`` of the ``neighbours`` other patches, kept or not, whose
    keys are most alike to its own (cosine, all heads as one) to its projected features. One token more is the sum of ``a_j
    x_j`` over all patches that leave; it stands where the most attended of these was. A tile of one token keeps the patch.

    ``spatial``: share of the kept patches, in [0, 1], that are taken at even distances, in raster order, from those with less
    attention. ``outliers``: the attention tells how many patches are kept, as the paper has it, and the budget is an upper
    bound: in each tile the part ``r`` of patches whose ``a`` is above ``Q3 + 1.5 (Q3 - Q1)``, at least one, and with
    ``spatial`` those of every ``int(int(1 / r) / 3)``-th patch that are not among them.

    Deviations from the official code: the budget is met exactly unless ``outliers`` is set; projected features are merged;
    tokens are in raster order and keep their positions; every tile of an image has an equal share and merges by itself, and
    padding takes no part; a stride of 0 is one of 1. Row ends are dropped unless the budget exceeds the patches. Encoders
    without [CLS]: the attention of a tile's mean query.
    """

    paper: ClassVar[str] = "Shang et al., LLaVA-PruMerge, ICCV 2025, arXiv:2403.15388"

    budget: int | float = 1 / 18
    neighbours: int = 32
    spatial: float = 0.0
    outliers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.neighbours) is not int or self.neighbours < 0:
            raise OptionError(f"neighbours={self.neighbours!r}: allowed is an int >= 0")
        options.share("spatial", self.spatial, of="the kept patches")

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.outliers

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"neighbours": draw.whole("neighbours", 0, 64), "spatial": draw.number("spatial", 0.0, 1.0)}

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        last = shape.vision_layers - 1
        return attention_signal(shape, last), Keys(last)

    def select(self, image: ImageTokens) -> Selection:
        keys = next(values.transpose(1, 2).flatten(2) for signal, values in image.signals.items() if isinstance(signal, Keys))
        unit = torch.nn.functional.normalize(keys, dim=-1).nan_to_num()
        logits, attention = as_one_head(image)
        scores = in_picture(logits, image)
        attention = attention.masked_fill(scores == -torch.inf, 0)
        places = image.host(image.layout.placeholder)
        kept, rows = [], []
        for share, available, tiles in tiles_alike(image.layout, image.count):
            near = min(self.neighbours, available - 1)
            for own, patches in self._chosen(scores, attention, share, available, image.host(tiles)):
                extra = patches.shape[1] < min(share, available)
                place, weight = _taken_in(patches, scores[own], attention[own], unit[own], near, extra)
                kept.append(places[own].gather(1, place).flatten())
                rows.append(_at(weight, places[own], image.layout.total))
        found = torch.cat(kept)
        keep = found.sort().values if self.outliers else with_separators(found, image)
        stay = torch.zeros(keep.shape[0], image.layout.total, device=image.device).scatter(1, keep[:, None], 1.0)
        return Selection(keep, Mixture(stay.index_copy(0, torch.searchsorted(keep, found), torch.cat(rows))))

    def _chosen(
        self, scores: Tensor, attention: Tensor, share: int, available: int, tiles: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Kept patches ``(k, n)`` of ``tiles``, which have equal shares; tiles that keep equally many stand together."""
        most = share - (1 < share < available)  # one is left for what leaves
        if self.outliers:
            return [(tile, self._outliers(scores[tile][0], attention[tile][0], most)) for tile in tiles.split(1)]
        sampled = round(most * self.spatial)
        best = top(scores[tiles], most - sampled)
        left = scores[tiles].scatter(1, best, -torch.inf) > -torch.inf
        rest = left.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        even = _even(available - most + sampled, sampled).to(rest.device, non_blocking=True)
        return [(tiles, torch.cat([best, rest[:, even]], 1))]

    def _outliers(self, scores: Tensor, attention: Tensor, most: int) -> Tensor:
        """Kept patches ``(1, n)`` of a tile by the interquartile range of its attention. Asks the device for their number."""
        there = scores > -torch.inf
        inside = attention[there]
        low, high = torch.quantile(inside, torch.tensor([0.25, 0.75], device=inside.device))
        above = int((inside > high + 1.5 * (high - low)).sum())
        kept = min(max(above, 1), most)
        order = top(scores, scores.shape[0])
        best = order[:kept].tolist()
        if self.spatial:
            ratio = max(above, 1) / len(inside)
            stride = max(int(int(1 / ratio) / 3), 1)
            patches = there.nonzero()[:, 0].tolist()
            best += [patch for patch in patches[:-1:stride] if patch not in best][: most - kept]
        return torch.tensor([best], device=scores.device)


@register("prumerge+")
@dataclass(kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge+: PruMerge with three patches at even distances for each one that stands out."""

    budget: int | float = 0.25
    spatial: float = 0.75


def _taken_in(
    patches: Tensor, scores: Tensor, attention: Tensor, unit: Tensor, near: int, extra: bool
) -> tuple[Tensor, Tensor]:
    """Where the tokens of ``k`` tiles stand ``(k, T)``, and their mixtures ``(k, T, N)``. ``patches (k, n)`` are kept."""
    alike = rows_of(unit, patches) @ unit.transpose(1, 2)
    # Rounded for the same reason as the scores.
    alike = (alike.mul(1e5).round() / 1e5).masked_fill((scores == -torch.inf)[:, None], -torch.inf)
    closest = top(alike.scatter(2, patches[..., None], -torch.inf), near)
    own = attention[:, None].expand_as(alike)
    weight = torch.zeros_like(alike).scatter(2, closest, own.gather(2, closest)).scatter(2, patches[..., None], 1.0)
    if not extra:
        return patches, weight
    stands = top(scores.scatter(1, patches, -torch.inf), 1)
    rest = attention.scatter(1, patches, 0.0)[:, None]
    return torch.cat([patches, stands], 1), torch.cat([weight, rest], 1)


def _at(weight: Tensor, places: Tensor, total: int) -> Tensor:
    """``weight (k, T, N)`` of patches as one of prompt indices ``(k T, total)``; patches in the padding have none."""
    columns = places.clamp(min=0)[:, None].expand_as(weight)
    full = weight.new_zeros(*weight.shape[:2], total)
    return full.scatter_add(2, columns, weight.masked_fill(places[:, None] < 0, 0)).flatten(0, 1)


@remembered
def _even(total: int, count: int) -> Tensor:
    """``count`` of ``total`` indices at even distances, the first one among them."""
    return torch.arange(count) * total // max(count, 1)
