"""VScan: windows and the whole image are scanned, the rest is merged; the question decides halfway through the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import budget as budgets
from vlprune import options
from vlprune.budget import apportion
from vlprune.errors import OptionError
from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape, remembered, top
from vlprune.kernels import bipartite_match
from vlprune.knobs import Draw
from vlprune.method import Merge, Method, Plan, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import attention_signal, equal_shares, in_picture
from vlprune.methods.staged import LAST, staged_plan
from vlprune.signals import ReceivedAttention, Signal


@register("vscan")
@dataclass(kw_only=True)
class VScan(Method):
    """VScan: a local and a global scan of the vision encoder, merging, and attention of the question halfway through the LLM.

    Of the tokens that enter the LLM each tile has an equal share. Half of it is local: windows of ``window`` x ``window``
    patches have equal shares of it, and keep the patches with the most [CLS] attention in vision block ``local`` (the block
    of the features where the encoder is shallower). The other half is global: those with the most of it among the rest, in the
    block whose output goes to the projector. What leaves joins the kept patch with the most similar projected features,
    which becomes the mean of all. Before LLM layer ``layer`` the image keeps ``keep`` of them, those with the most
    attention from the prompt's last token (heads averaged, layer before). The budget is the mean over the LLM's layers.

    ``layer``: None for half of the layers, 16 of 32. ``keep``: the published 96 tokens become 32.

    Deviations from the official code: counts are exact for any grid and budget, windows at the edge may be smaller; kept
    tokens keep their positions (there: for LLaVA they are counted anew). Encoders without [CLS]: what patches receive, as
    there, but in the same two blocks as above (there: the last one with windows and the last one without).
    """

    paper: ClassVar[str] = "Zhang et al., VScan, TMLR 2026, arXiv:2505.22654"

    budget: int | float = 1 / 9
    window: int = 6
    local: int = 5
    layer: int | None = None
    keep: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.window) is not int or self.window < 1:
            raise OptionError(f"window={self.window!r}: allowed is a width of windows in patches, an int >= 1")
        if type(self.local) is not int or self.local < 0:
            raise OptionError(f"local={self.local!r}: allowed is a block of the vision encoder, an int >= 0")
        if self.layer is not None and (type(self.layer) is not int or self.layer < 1):
            raise OptionError(f"layer={self.layer!r}: allowed is an LLM layer from 1 on, or None for half of the layers")
        if not 0.0 < self.keep <= 1.0:
            raise OptionError(f"keep={self.keep!r}: allowed is a fraction in (0, 1] of the tokens that enter")

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {
            "window": draw.whole("window", 2, 12),
            "local": draw.whole("local", 0, shape.feature_layer),
            "layer": draw.whole("layer", 1, shape.text_layers - 1),
            "keep": draw.number("keep", 0.1, 1.0),
        }

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        blocks = {min(self.local, shape.feature_layer), shape.feature_layer}
        return *(attention_signal(shape, block, ReceivedAttention) for block in sorted(blocks)), LAST

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        layers, total = shape.text_layers, layout.total
        layer = layers // 2 if self.layer is None else options.in_model("layer", self.layer, layers)
        room = budgets.room(self.budget, total, layers)
        entering = budgets.largest(lambda n: budgets.stepped(n, max(1, int(n * self.keep)), layer, layers), room, total)
        entering = max(entering, 1)  # no image loses all of its tokens
        left = max(min((room - entering * layer) // (layers - layer), entering), 1)
        return staged_plan(entering, {layer: left})

    def select(self, image: ImageTokens) -> Selection:
        blocks = sorted((signal.layer or 0, values.mean(1)) for signal, values in image.signals.items() if signal != LAST)
        local, whole = (in_picture(values, image) for _, values in (blocks[0], blocks[-1]))
        places = image.host(image.layout.placeholder)
        windows = image.host(_windows(image.layout.grid, self.window)).expand_as(places)
        best = top(local, local.shape[1])
        by_window = best.gather(1, windows.gather(1, best).sort(dim=1, stable=True).indices)
        in_windows, of_all = map(image.host, _seats(image.layout, image.count, self.window))
        chosen = _flat(by_window)[in_windows]
        rest = whole.flatten().index_fill(0, chosen, -torch.inf).view_as(whole)
        chosen = torch.cat([chosen, _flat(top(rest, rest.shape[1]))[of_all]])
        kept = places.flatten()[chosen]
        return Selection(with_separators(kept, image), self._merge(kept, image))

    @staticmethod
    def _merge(kept: Tensor, image: ImageTokens) -> Merge:
        """Patches that leave join the kept ones that are most alike."""
        keep, kept, layout = with_separators(kept, image), kept.sort().values, image.layout
        gone = torch.ones(layout.total, dtype=torch.uint8, device=image.device).index_fill(0, keep, 0)
        gone = gone.index_fill(0, image.host(layout.separators), 0)
        leaving = gone.sort(descending=True, stable=True).indices[: sum(layout.available) - kept.shape[0]]
        _, choice = bipartite_match(image.features[leaving][None], image.features[kept][None])
        joins = torch.full((layout.total,), -1, device=image.device)
        joins[kept] = torch.searchsorted(keep, kept)
        joins[leaving] = torch.searchsorted(keep, kept[choice[0]])
        return Merge(joins)

    def prefill(self, tokens: LayerTokens) -> Selection:
        return Selection(top(tokens[LAST][0, 0], tokens.count).sort().values)


def _flat(patches: Tensor) -> Tensor:
    """``patches (tiles, N)`` as indices into all tiles' patches, one behind the other."""
    return (patches + torch.arange(patches.shape[0], device=patches.device)[:, None] * patches.shape[1]).flatten()


@remembered
def _windows(grid: tuple[int, int], size: int) -> Tensor:
    """The window of each patch ``(N,)``."""
    rows, columns = (torch.arange(n) // size for n in grid)
    return (rows[:, None] * (columns[-1] + 1) + columns).flatten()


@remembered
def _seats(layout: ImageLayout, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Places of the local tokens in an order window by window, best first, and of the global ones in an order of all that are
    left: flat indices ``(tiles, N)``."""
    windows, width = _windows(layout.grid, size), layout.placeholder.shape[1]
    members = windows.bincount()
    local, whole = [], []
    for tile, share in enumerate(equal_shares(layout, count)):
        there = windows[layout.placeholder[tile] >= 0].bincount(minlength=len(members)).tolist()
        given = apportion(share // 2, [1.0] * len(there), there)
        first = tile * width + members.cumsum(0) - members
        local += [torch.arange(n) + start for n, start in zip(given, first, strict=True)]
        whole.append(torch.arange(share - share // 2) + tile * width)
    return torch.cat(local), torch.cat(whole)
