"""CDPruner: tokens that are unlike each other and like what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape
from vlprune.kernels import dpp_map
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import tiles_alike
from vlprune.methods.staged import staged_plan

ROUNDING = 1e-6
"""Residuals up to this are rounding errors of kernels whose entries are at most 1."""


@register("cdpruner")
@dataclass(kw_only=True)
class CDPruner(Method):
    """CDPruner: a determinantal point process whose kernel is the tokens' likeness, times how they fit the question.

    With S the cosines of the projected features and ``r`` a token's relevance, tokens are chosen one by one, each the one that
    raises the determinant of the chosen part of ``r_i S_ij r_j`` most. Relevance is the mean cosine of the token to the
    embeddings of the text behind the image (all text where there is none behind it), brought to between 0 and 1 over the
    image: ``(m - min + 1e-6) / (max - min)``. Of several tiles each chooses an equal share by itself. Leaves before LLM
    layer 0, where text and image meet, so no layer sees what is dropped.

    ``text``: False leaves relevance out, a plain determinantal process. ``negated``: takes the least similar for the most
    relevant, as the official code does for CLIP, whose patches are like what they do not show.

    Deviations from the official code: relevance is that of the LLM's embeddings, since no supported model brings the text
    tower of CLIP along; all text behind the image counts, the prompt's template included; each image has a minimum and
    maximum of its own (there: the batch); tokens keep their positions. Once the kernel's rank is used up, what is left
    follows in the order of its residuals. Row ends are dropped, as there, unless the budget exceeds the patches. Behind a
    method that has dropped tokens already, those that are left are one tile.
    """

    paper: ClassVar[str] = "Zhang et al., CDPruner, NeurIPS 2025, arXiv:2506.10967"

    budget: int | float = 1 / 9
    text: bool = True
    negated: bool = False

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return staged_plan(layout.total, {0: self.count(layout.total)})

    def prefill(self, tokens: LayerTokens) -> Selection:
        unit = normalize(tokens.hidden[tokens.visual].float(), dim=-1).nan_to_num()
        relevance = self._relevance(unit, tokens)
        if tokens.positions.shape[0] < tokens.layout.total:
            kept = _chosen(unit[None], relevance[None], tokens.count)
            return Selection(kept[0].sort().values)
        image = ImageTokens(unit, tokens.layout, tokens.count)
        places, chosen = image.host(tokens.layout.placeholder), []
        for share, _, tiles in tiles_alike(tokens.layout, tokens.count):
            own = places[image.host(tiles)]
            there, rows = own >= 0, own.clamp(min=0)
            chosen.append(own.gather(1, _chosen(unit[rows], relevance[rows], share, there)).flatten())
        return Selection(with_separators(torch.cat(chosen), image))

    def _relevance(self, unit: Tensor, tokens: LayerTokens) -> Tensor:
        """``(N,)`` of visual tokens whose unit vectors are ``unit (N, D)``."""
        if not self.text:
            return torch.ones_like(unit[:, 0])
        behind = tokens.text > tokens.visual[-1]
        asked = behind | ~behind.any()
        words = normalize(tokens.hidden[tokens.text].float(), dim=-1).nan_to_num() * asked[:, None]
        # Rounded, so that equal tokens stay equal when their range is stretched.
        likeness = (unit @ (words.sum(0) / asked.sum().clamp(min=1))).mul(1e6).round() / 1e6
        likeness = -likeness if self.negated else likeness
        low, high = likeness.aminmax()
        return torch.where(high > low, (likeness - low + 1e-6) / (high - low).clamp(min=1e-6), 1.0)


def _chosen(unit: Tensor, relevance: Tensor, count: int, there: Tensor | None = None) -> Tensor:
    """``(tiles, count)`` of vectors ``unit (tiles, N, D)``, of which only those ``there (tiles, N)`` can be chosen."""
    likeness = unit @ unit.transpose(1, 2)
    # A token is exactly like itself, so that where all are equally relevant the first one goes first.
    likeness.diagonal(dim1=1, dim2=2).round_()
    kernel = relevance[:, :, None] * likeness * relevance[:, None]
    return dpp_map(kernel, count, there, ROUNDING)
