"""ToDRE: tokens that are as unlike each other as can be, until the text looks at them no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.exit import everything, nothing
from vlprune.methods.salience import attention_of, attention_signal, in_picture
from vlprune.methods.staged import TEXT, attention_of_text
from vlprune.signals import Signal


@register("todre")
@dataclass(kw_only=True)
class ToDRE(Method):
    """ToDRE: max-sum diversity of projected features, from the most attended token on; then an exit where attention has faded.

    The first token is the patch with the most [CLS] attention in the last vision block (mean over heads), of the thumbnail
    where there is one, of all tiles otherwise. Each further one is the token whose cosines to those chosen before have the
    lowest sum; of equal ones, the lowest index. All tokens of the image take part, row ends included.

    ``exit_threshold``: before layer ``exit_layer`` of the LLM all tokens of an image leave if text behind it pays them less
    than this share of its attention in the layer before, averaged over heads (0.1 in the paper). Counts then depend on the
    content, and the host waits for them. None: nothing leaves inside the LLM.
    ``exit_layer``: None for the layer behind seven eighths of the LLM.

    Deviations from the paper, which is without code: encoders without [CLS] start from the attention of a tile's mean query,
    not from a random token; what it does not tell, the order and the positions of tokens, stays as in the prompt. It asks that
    visual tokens pay text little attention, too: under causal attention they pay what is behind them none.
    """

    paper: ClassVar[str] = "Li et al., ToDRE, 2025, arXiv:2505.18757"

    budget: int | float = 0.25
    exit_threshold: float | None = None
    exit_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit_threshold is not None and not 0.0 <= self.exit_threshold <= 1.0:
            raise OptionError(f"exit_threshold={self.exit_threshold!r}: allowed is a share from 0 to 1, or None")

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether an exit depends on the content."""
        return self.exit_threshold is not None

    @property
    def stages(self) -> tuple[str, ...]:
        return ("select", "prefill") if self.adaptive else ("select",)

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        count, depth = self.count(layout.total), shape.text_layers
        layer = max(1, depth * 7 // 8) if self.exit_layer is None else self.exit_layer
        if not 1 <= layer < depth:
            raise OptionError(f"exit_layer={self.exit_layer!r}: allowed are layers 1 to {depth - 1} of this model's LLM")
        return Plan(count, {layer: count} if self.adaptive else {})

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        first = attention_signal(shape, shape.vision_layers - 1)
        return (first, TEXT) if self.adaptive else (first,)

    def select(self, image: ImageTokens) -> Selection:
        scores = in_picture(attention_of(image), image)
        scores = scores[:1] if image.layout.thumbnail else scores
        # index_select: plain indexing by one number waits for the device.
        start = image.host(image.layout.placeholder).flatten().index_select(0, scores.argmax().view(1))
        return Selection(_unlike(image.features.detach().float(), start, image.count).sort().values)

    def prefill(self, tokens: LayerTokens) -> Selection:
        assert self.exit_threshold is not None
        return nothing(tokens) if attention_of_text(tokens).sum() < self.exit_threshold else everything(tokens)


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
