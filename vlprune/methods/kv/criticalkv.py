"""CriticalKV: what a token changes in the output is its attention times the length of its projected value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.errors import UnsupportedMethodError
from vlprune.image import CacheTokens
from vlprune.method import register
from vlprune.methods.kv.policy import by_head
from vlprune.methods.kv.snapkv import SnapKV


@register("criticalkv")
@dataclass(kw_only=True)
class CriticalKV(SnapKV):
    """CriticalKV: SnapKV's scores, times the L1 norm of the values behind the output projection.

    The ``safeguard`` part of the budget goes to the highest scores of SnapKV as they are; the rest to the highest
    (score + 1e-4) x ||W_o v||, where W_o is the slice of the output projection that belongs to a query head, and norms are
    averaged over the query heads that share a head of keys.

    ``window``, ``kernel``: SnapKV's. ``safeguard``: share of the budget that attention alone decides.

    Deviations from kvpress, whose form this is: only visual tokens are evicted. Output projections whose weights are
    quantised or offloaded cannot be read and are refused.
    """

    paper: ClassVar[str] = "Feng et al., Identify Critical KV Cache in LLM Inference, arXiv:2502.03805"

    safeguard: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("safeguard", self.safeguard)

    def score(self, tokens: CacheTokens) -> Tensor:
        return (super().score(tokens) + 1e-4) * by_head(projected_norms(tokens), tokens)

    def first(self, tokens: CacheTokens, scores: Tensor) -> Tensor:
        alone = super().score(tokens)
        sure = alone.sort(dim=-1, descending=True, stable=True).indices[:, : int(self.safeguard * tokens.count)]
        return torch.zeros_like(alone, dtype=torch.bool).scatter(-1, sure, True)


def projected_norms(tokens: CacheTokens) -> Tensor:
    """L1 norm of each value behind the output projection of each query head: ``(heads, N)``. One head at a time."""
    if tokens.output is None:
        raise UnsupportedMethodError(
            "criticalkv reads the weights of the output projection, which are quantised or offloaded here; "
            "use vatp, which reads values as they are, or snapkv"
        )
    group = tokens.output.shape[0] // tokens.values.shape[0]
    values = tokens.values.float()
    return torch.stack([(values[h // group] @ w.float().T).abs().sum(-1) for h, w in enumerate(tokens.output)])
