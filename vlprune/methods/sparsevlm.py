"""SparseVLM: words that the image is about choose visual tokens; some of the others are merged and recycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.image import LayerTokens, ModelShape, top
from vlprune.knobs import Draw
from vlprune.method import Merge, Selection, register
from vlprune.methods.staged import StagedMethod
from vlprune.signals import Hidden, QueryAttention

TEXT, EMBEDDINGS = QueryAttention(queries="text", mean_heads=True), Hidden(0, "text", state="before")
RATERS = "sparsevlm_raters"


@register("sparsevlm")
@dataclass(kw_only=True)
class SparseVLM(StagedMethod):
    """SparseVLM: visual tokens leave at several LLM layers by the attention of text that the image is about.

    Raters are text tokens behind the image: on the embeddings, each visual token spreads a softmax of dot products over
    them, and those that get more than their mean share rate. Before each of ``layers`` a token's score is the attention that
    raters pay it in the layer before, averaged over them and over heads. The best stay; of those that leave, the best
    ``recycle`` are grouped by density peaks, ten to a group, and each group's mean stays in its centre's place. Both together
    are the count.

    ``recycle``: share of the tokens that leave which is merged, 0 for none.
    ``layers``, ``keep``: see :class:`~vlprune.methods.staged.StagedMethod`; 3, 7 and 16 of 32, with 300, 200 and 110 of 576.

    Deviations from the official code (version 1.5): groups are part of the budget, there they come on top; kept tokens and
    centres keep their positions and their order; equal densities go by index, there by random numbers. A text token rates no
    image behind it; where none is behind, or all shares are equal, all of it rates.
    """

    paper: ClassVar[str] = "Zhang et al., SparseVLM, ICML 2025, arXiv:2410.04417"
    needs = (TEXT, EMBEDDINGS)
    published = {3: 300 / 576, 7: 200 / 576, 16: 110 / 576}

    recycle: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("recycle", self.recycle)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return super().knobs(draw, shape) | {"recycle": draw.number("recycle", 0.0, 1.0)}

    def prefill(self, tokens: LayerTokens) -> Selection:
        if RATERS not in tokens.notes:
            tokens.notes[RATERS] = raters(tokens)
        rate = tokens.notes[RATERS].float()
        scores = (rate @ tokens[TEXT][0]) / rate.sum().clamp(min=1)
        order = top(scores, scores.shape[0])
        kept, candidates, groups = self.shares(scores.shape[0], tokens.count)
        if not groups:
            return Selection(order[:kept].sort().values)
        pool = order[kept : kept + candidates].sort().values
        centres, group = clusters(tokens.hidden[tokens.visual[pool]].float(), groups)
        keep = torch.cat([order[:kept], pool[centres]]).sort().values
        target = torch.full_like(order, -1).index_copy(0, pool, torch.searchsorted(keep, pool[centres][group]))
        return Selection(keep, Merge(target))

    def shares(self, present: int, count: int) -> tuple[int, int, int]:
        """Of ``present`` tokens that are to become ``count``: how many stay, how many are merged, and into how many groups."""
        if self.recycle == 0.0 or count >= present:
            return count, 0, 0
        for kept in range(count - 1, 0, -1):
            merged = min(int(self.recycle * (present - kept)) + 1, present - kept)
            groups = merged // 10 + 1
            if kept + groups <= count:
                # Where rounding leaves a gap, one more stays as it is.
                return count - groups, min(merged, present - count + groups), groups
        return count, 0, 0


def raters(tokens: LayerTokens) -> Tensor:
    """Which of the text tokens ``(R,)`` bool rate this image."""
    embeddings = tokens.rows(EMBEDDINGS)
    behind = tokens.text > tokens.visual[-1]
    behind = behind | ~behind.any()
    logits = tokens[EMBEDDINGS] @ embeddings[tokens.text].T
    shares = logits.masked_fill(~behind, -torch.inf).softmax(-1).mean(0)
    # Equal shares, which differ by rounding only, make no rater; then all rate.
    rate = (shares > shares.sum() / behind.sum() * (1 + 1e-5)) & behind
    return torch.where(rate.any(), rate, behind)


def clusters(states: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Density peaks of ``states (n, D)``: indices of the ``groups`` centres, and each state's centre ``(n,)``.

    Density falls with the mean squared distance to the ``groups`` nearest states, itself among them. Centres have the highest
    product of density and distance to the nearest state that is denser; of equal states the first is taken to be denser.
    """
    # Not by matrix products, which give equal states a distance.
    distances = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[-1] ** 0.5
    density = (-distances.sort(-1).values[:, :groups].square().mean(-1)).exp()
    index = torch.arange(states.shape[0], device=states.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (index < index[:, None]))
    parent = distances.masked_fill(~denser, torch.inf).amin(-1)
    parent = torch.where(denser.any(-1), parent, distances.amax())
    centres = top(parent * density, groups)
    group = top(-distances[:, centres], 1)[:, 0]
    return centres, group.index_copy(0, centres, torch.arange(groups, device=states.device))
