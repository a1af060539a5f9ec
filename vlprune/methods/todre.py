"""ToDRE, stage 1: a set of tokens that are as unlike each other as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.image import ImageTokens, ModelShape
from vlprune.method import Method, Selection, register
from vlprune.methods.salience import attention_of, attention_signal, in_picture
from vlprune.signals import Signal


@register("todre")
@dataclass(kw_only=True)
class ToDRE(Method):
    """ToDRE's first stage: max-sum diversity of projected features, from the most attended token on.

    The first token is the patch with the most [CLS] attention in the last vision block (mean over heads), of the thumbnail
    where there is one, of all tiles otherwise. Each further one is the token whose cosines to those chosen before have the
    lowest sum; of equal ones, the lowest index. All tokens of the image take part, row ends included.

    Deviations from the paper, which is without code: encoders without [CLS] start from the attention of a tile's mean query,
    not from a random token; what it does not tell, the order and the positions of tokens, stays as in the prompt. The second
    stage, which may drop all visual tokens before a late LLM layer, is not here: its count depends on content.
    """

    paper: ClassVar[str] = "Li et al., ToDRE, 2025, arXiv:2505.18757"

    budget: int | float = 0.25

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (attention_signal(shape, shape.vision_layers - 1),)

    def select(self, image: ImageTokens) -> Selection:
        scores = in_picture(attention_of(image), image)
        scores = scores[:1] if image.layout.thumbnail else scores
        # index_select: plain indexing by one number waits for the device.
        start = image.host(image.layout.placeholder).flatten().index_select(0, scores.argmax().view(1))
        return Selection(_unlike(image.features.detach().float(), start, image.count).sort().values)


def _unlike(features: Tensor, start: Tensor, count: int) -> Tensor:
    """``(count,)`` rows of ``features (N, D)``, in the order chosen, ``start (1,)`` first. Extra memory is linear in N."""
    unit = torch.nn.functional.normalize(features, dim=-1).nan_to_num()
    sums = torch.zeros(unit.shape[0], device=unit.device)
    chosen = start.new_empty(count)
    for number in range(count):
        chosen[number] = start[0]
        sums = (sums + unit @ unit.index_select(0, start)[0]).index_fill(0, start, torch.inf)
        start = sums.argmin(0, keepdim=True)
    return chosen
