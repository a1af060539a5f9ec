"""PiToMe: rows with many close neighbours merge, rows that stand alone are protected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vlprune import options
from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.image import top
from vlprune.kernels import bipartite_match
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying, taken
from vlprune.schedule import by_ratio

AT_ONCE = 2**22
"""Similarities that exist at one time, at most, unless one row of a batch has more."""


@register("pitome")
@dataclass(kw_only=True)
class PiToMe(BlockMethod):
    """Protect Informative Tokens before Merging (NeurIPS 2024): an energy tells what lies in a crowd, and only that merges.

    The energy of a row is the mean over all rows of ``ELU(cosine - margin)`` of their keys, high in a crowd. Rows in the order
    of falling energy are sources and targets by turns; each source goes into its most similar target. Where rows are
    protected, the ``2 r`` of the highest energy take part, and all sources merge; elsewhere all rows take part, and the ``r``
    sources merge that are most similar to their targets.
    """

    paper: ClassVar[str] = (
        "Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024, arXiv:2405.16148"
    )
    budget: int | float = 0.5
    ratio: float | None = None
    """Share of the rows that each block keeps, in place of the budget."""
    protect: Literal["late", "early", "always", "never"] = "late"
    """Blocks in which rows of low energy are protected: the later half, the earlier half, all, none."""
    margin: float = 0.75
    """Cosine from which a row counts as a neighbour in the first block; it falls to 0 behind the last one."""
    alpha: float = 1.0
    """How far rows below the margin lower the energy."""
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0.5 <= self.ratio <= 1:
            raise OptionError(f"ratio={self.ratio!r}: allowed is a number from 0.5 to 1, for a block pairs its rows, and None")
        options.one_of("protect", self.protect, ("late", "early", "always", "never"))
        if not (math.isfinite(self.margin) and math.isfinite(self.alpha)):
            raise OptionError(f"margin={self.margin!r}, alpha={self.alpha!r}: allowed are finite numbers")

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self.ratio is None:
            return super().counts(tokens, blocks)
        return by_ratio(self.ratio, tokens, blocks)

    def protects(self, block: int, blocks: int) -> bool:
        """Whether rows of low energy are protected in this block."""
        early = block < -(-blocks // 2)
        return {"late": not early, "early": early, "always": True, "never": False}[self.protect]

    def reduce(self, tokens: BlockTokens) -> Tensor:
        metric, there = tokens.keys[:, tokens.prefix :], tokens.sizes[:, tokens.prefix :] > 0
        energies = energy(metric, self.margin * (1 - tokens.block / tokens.blocks), self.alpha, there)
        protects = self.protects(tokens.block, tokens.blocks)
        order = top(energies, 2 * tokens.leaving if protects else metric.shape[1])
        sources, targets = order[:, ::2], order[:, 1::2]
        similarity, best = bipartite_match(taken(metric, sources), taken(metric, targets))
        partners = targets.gather(1, best)
        if not protects:
            chosen = top(similarity, tokens.leaving)
            sources, partners = sources.gather(1, chosen), partners.gather(1, chosen)
        return numbered(staying(tokens.keys).scatter(1, sources + tokens.prefix, partners + tokens.prefix))


def energy(metric: Tensor, margin: float, alpha: float, there: Tensor | None = None) -> Tensor:
    """``(B, N)`` float32: the mean over the rows of ``metric (B, N, d)`` of ``ELU(cosine - margin)``, itself among them.

    ``there (B, N)`` bool: rows that are no padding, all by default. Padding is in nobody's mean, and infinitely high itself.
    """
    there = torch.ones_like(metric[..., 0], dtype=torch.bool) if there is None else there
    share = (there / there.sum(1, keepdim=True).clamp(min=1))[:, None]
    rows = functional.normalize(metric.float(), dim=-1)
    step = max(1, AT_ONCE // max(1, rows.shape[0] * rows.shape[1]))
    parts = [(functional.elu(part @ rows.mT - margin, alpha) * share).sum(-1) for part in rows.split(step, 1)]
    return torch.cat(parts, 1).masked_fill(~there, torch.inf)
