"""LOOK-M: text has priority, and what leaves the cache is merged into what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from vlprune import options
from vlprune.image import CacheTokens
from vlprune.method import Merge, Mixture, register
from vlprune.methods.kv.merging import average, nearest, pivot, weighted
from vlprune.methods.kv.policy import CachePolicy

Merging = Literal["pivot", "average", "weighted", "none"]


@register("look-m")
@dataclass(kw_only=True)
class LookM(CachePolicy):
    """LOOK-M: each head keeps the visual tokens with the largest sum of attention, and merges the others into them.

    Text is kept by prior. An entry that leaves goes to the kept visual one whose key has the highest cosine with its own, and
    so does its value. ``merging``: ``"pivot"``, the kept entry becomes the mean of itself and of the midpoints between it
    and each that comes to it; ``"average"``, their mean; ``"weighted"``, the same with keys and values times their cosine;
    ``"none"``, they are lost. The second and the third merge only entries whose cosine is at least the mean of those that
    leave the head; the first merges all.

    Deviations from the official code: the prior is an order of two keys, text before score, where there a constant is
    subtracted that swallows the scores of images in half precision; entries go to visual ones, not to text; which ones are
    alike is decided head by head, there by the mean over heads, whose entries are not the same; "average" merges the entries
    that it filtered, where there indices and entries do not belong together; no recent window, since that is text.
    """

    paper: ClassVar[str] = "Wan et al., LOOK-M, Findings of EMNLP 2024, arXiv:2406.18139"

    merging: Merging = "pivot"

    def __post_init__(self) -> None:
        super().__post_init__()
        options.one_of("merging", self.merging, get_args(Merging))

    def merge(self, tokens: CacheTokens, scores: Tensor, keep: Tensor) -> Merge | Mixture | None:
        if self.merging == "none":
            return None
        likeness, target, stays = nearest(tokens.keys, keep)
        if self.merging == "pivot":
            return pivot(target, stays, keep.shape[-1])
        leave = (~stays).float()
        mean = (likeness * leave).sum(-1, keepdim=True) / leave.sum(-1, keepdim=True).clamp(min=1)
        target = target.masked_fill(~stays & (likeness < mean), -1)
        return average(target) if self.merging == "average" else weighted(target, stays, likeness, keep.shape[-1])
