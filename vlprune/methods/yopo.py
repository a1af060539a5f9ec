"""YOPO: from one layer of the LLM on there are no visual tokens, and before it some heads take no notice of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlprune.errors import OptionError
from vlprune.method import register
from vlprune.methods.exit import VisualExit


@register("yopo")
@dataclass(kw_only=True)
class YOPO(VisualExit):
    """YOPO, the part without training: visual tokens leave before one LLM layer; before it some heads take no notice of them.

    In an inactive head no token takes anything of a visual one, and visual ones take nothing at all: their values are zero,
    and so is what attention gives them. The softmax counts them as ever, as in the official code, which masks behind it. All
    saving is the exit's: kernels compute inactive heads like others, and the cache keeps their entries.

    ``layer``: LLM layer from which on there are no visual tokens; published are 20 of 32 for LLaVA, 24 for Qwen2-VL and
    InternVL2. None: as many whole layers as ``budget`` allows.
    ``heads``: inactive heads, pairs of an LLM layer and a head of keys; ``vlprune calibrate MODEL --method yopo`` finds a
    model's, none by default.

    Deviations from the official code: a head of keys is inactive with all heads of queries that share it, or not at all, since
    its values are theirs together. Attention among neighbours alone and half of the feed-forward network, which the paper
    trains the model for, are not here.
    """

    paper: ClassVar[str] = "Zhang et al., Treat Visual Tokens as Text?, 2024, arXiv:2410.06169"

    heads: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = tuple(tuple(pair) for pair in self.heads)
        if any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise OptionError(f"heads={self.heads!r}: allowed are pairs of an LLM layer and a head of keys, from 0 on")
        self.heads = tuple(sorted(set(pairs)))

    def inactive_heads(self) -> Mapping[int, Sequence[int]]:
        found: dict[int, list[int]] = {}
        for layer, head in self.heads:
            found.setdefault(layer, []).append(head)
        return found
