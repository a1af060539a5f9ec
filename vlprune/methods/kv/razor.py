"""RazorAttention: layers that retrieve keep their caches, the others keep what is near and a mean of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlprune import budget as budgets
from vlprune import options
from vlprune.image import CacheTokens, ImageLayout, ModelShape
from vlprune.method import Merge, Method, Plan, Selection, register


@register("razorattention")
@dataclass(kw_only=True)
class RazorAttention(Method):
    """RazorAttention, by layers: those with retrieval heads keep all visual tokens, the others an image's last ones.

    Which heads retrieve is found out once for a model, by :func:`vlprune.retrieval.retrieval_layers`. In the other layers one
    more entry is the mean of keys and values of all that leave (``compensation``), in the place of the last of them. The
    budget is the mean over the layers: what the retrieving ones leave of it, the others share evenly. Nothing is measured.

    ``retrieval``: layers that keep all; none by default.

    Deviations from the paper, which decides head by head: a cache is a rectangle, where a head that keeps little saves nothing
    beside one that keeps all, so a layer goes whole as soon as one of its heads retrieves. The compensation entry counts as
    one token, as in golden-stick's code; the paper weighs it by how many it stands for. Only visual tokens are evicted: the
    first tokens and the local window, which the other heads keep, are text here.
    """

    paper: ClassVar[str] = "Tang et al., RazorAttention, ICLR 2025, arXiv:2407.15891"

    budget: int | float = 0.2
    retrieval: Sequence[int] = ()
    compensation: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retrieval = options.ascending_layers("retrieval", self.retrieval, first=0) if self.retrieval else ()

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        counts = self._counts(layout.total, shape.text_layers)
        return Plan(layout.total, cached={layer: count for layer, count in enumerate(counts) if count < layout.total})

    def _counts(self, total: int, layers: int) -> Sequence[int]:
        if self.retrieval:
            options.in_model("retrieval", self.retrieval, layers)
        mean, whole = self.count(total), len(self.retrieval)
        rest, others = mean * layers - whole * total, layers - whole
        if mean < total and rest < others:
            raise budgets.unreachable(self.name, self.budget, total, (whole * total + others) / layers)
        shared = iter(budgets.apportion(rest, [1.0] * others, [total] * others))
        return [total if layer in self.retrieval else next(shared) for layer in range(layers)]

    def evict(self, tokens: CacheTokens) -> Selection:
        entries, count, device = tokens.keys.shape[1], tokens.count, tokens.keys.device
        keep = torch.arange(entries - count, entries, device=device)
        if not self.compensation:
            return Selection(keep)
        return Selection(keep, Merge((torch.arange(entries, device=device) - (entries - count)).clamp(min=0)))
