"""ZipVL's adaptive ratio: as many tokens as hold a share of all scores, a budget for any method that scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune.errors import OptionError, UnsupportedMethodError
from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape, top
from vlprune.method import Method, Plan, ScoreMethod, Selection, make, register
from vlprune.signals import Signal


@register("zipvl")
@dataclass(kw_only=True)
class ZipVL(Method):
    """ZipVL's adaptive ratio for any scorer: of each image stay the fewest tokens that hold ``mass`` of all its scores.

    ``mass``: share of the sum of scores. ``scorer``: the method that scores, by name: one that has a ``score``, between
    encoder and LLM or before LLM layers. ``options``: its options. An image whose attention is spread keeps more than one
    whose attention is not, so counts depend on the content, the host waits for them, and ``budget`` is not looked at.

    Deviations from the paper, which is without code: there each layer has tokens of its own, text among them, which attend
    in that layer only, and all are computed on; here visual tokens leave, before the layers in which the scorer drops. It
    counts by attention added up and chooses by attention per query that sees a token; here scores are the scorer's.
    """

    paper: ClassVar[str] = "He et al., ZipVL, 2024, arXiv:2410.08584"
    adaptive = True

    mass: float = 0.975
    scorer: str = "fastv"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mass <= 1.0:
            raise OptionError(f"mass={self.mass!r}: allowed is a share above 0 and up to 1")
        if not hasattr(self._member, "score") or not set(self._member.stages) <= {"select", "prefill"}:
            raise UnsupportedMethodError(f"scorer={self.scorer!r} gives no scores; 'fastv' and 'pyramiddrop' do")

    @cached_property
    def _member(self) -> Any:
        return make(self.scorer, **self.options)

    @property
    def stages(self) -> tuple[str, ...]:
        return self._member.stages

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return self._member.wants(shape)

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        if isinstance(self._member, ScoreMethod):
            return Plan(total)
        return Plan(total, dict.fromkeys(self._member.starts(shape.text_layers), total))

    def select(self, image: ImageTokens) -> Selection:
        return Selection(covering(self._member.score(image), self.mass))

    def prefill(self, tokens: LayerTokens) -> Selection:
        return Selection(covering(self._member.score(tokens), self.mass))


def covering(scores: Tensor, mass: float) -> Tensor:
    """Ascending indices of the fewest of ``scores (N,)`` that add up to ``mass`` of their sum; of equal ones the first.

    Scores below zero, and what is no number, count as zero. Where all are zero, every token stays. The host waits.
    """
    weights = scores.double().nan_to_num(nan=0.0, posinf=1e300).clamp(min=0)
    order = top(weights, weights.shape[0])
    sums = weights[order].cumsum(0)
    # A sum of many may be off by rounding, and so may a share of it.
    short = (sums < mass * sums[-1:] * (1 - 1e-12)).sum()
    count = torch.where(sums[-1:].sum() > 0, short + 1, weights.shape[0])
    return order[: int(count)].sort().values
