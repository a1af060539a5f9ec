"""TOVA: token omission via attention. What the last token does not look at leaves the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlprune.method import register
from vlprune.methods.kv.policy import RunningPolicy
from vlprune.signals import AttentionColumns


@register("tova")
@dataclass(kw_only=True)
class TOVA(RunningPolicy):
    """Token Omission Via Attention: each layer keeps the visual tokens that the last token attends to, mean over all heads.

    All heads of a layer keep the same tokens. Nothing is remembered from token to token.

    ``again``: None, or evict as many entries again each time so many tokens have been generated, by the attention of the
    latest one.

    Deviations from the paper: only visual tokens are evicted; it evicts after each token, which is ``again=1``.
    """

    paper: ClassVar[str] = "Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, arXiv:2401.06104"
    one_set = True
    accumulates = False

    def votes(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, queries="last")
