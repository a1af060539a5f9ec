"""FastV: after a few layers the LLM drops the visual tokens that the end of the question does not look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlprune import budget as budgets
from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import ImageLayout, LayerTokens, ModelShape, top
from vlprune.knobs import Draw
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.staged import LAST, staged_plan


@register("fastv")
@dataclass(kw_only=True)
class FastV(Method):
    """FastV: before an early LLM layer the visual tokens leave that the prompt's last token attends to least.

    Before layer ``layer`` each image keeps its tokens with the most attention from the last token of the prompt in the layer
    before, averaged over heads. All tokens pass through the layers before that, so the fewest a budget can ask for
    is ``layer`` of so many layers; ``keep`` gives the number of tokens from ``layer`` on instead, and then ``budget`` does
    not count.

    ``layer``: LLM layer before which tokens leave, counted from 0, at least 1.
    ``keep``: tokens of an image (int), or fraction of them (float), from ``layer`` on; None to meet ``budget``.

    As in the official code, the score is the attention of the last token (the paper's text speaks of attention received),
    and kept tokens keep their positions. Deviations: each image of a prompt keeps its own share, each sample of a batch has
    its own choice (the official code applies the first sample's to all), scores are float32, drafts of assisted decoding do
    not count as the end of the prompt.
    """

    paper: ClassVar[str] = "Chen et al., FastV, ECCV 2024, arXiv:2403.06764"
    needs = (LAST,)

    budget: int | float = 0.5
    layer: int = 2
    keep: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer, int) or self.layer < 1:
            raise OptionError(
                f"layer={self.layer!r}: allowed is an LLM layer from 1 on; the layer before it tells what to keep"
            )
        if self.keep is not None:
            budgets.check(self.keep)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"layer": draw.whole("layer", 1, shape.text_layers - 1)}

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        options.in_model("layer", self.layer, shape.text_layers)
        kept = None if self.keep is None else budgets.tokens(self.keep, total)
        after = self._after(total, shape.text_layers) if kept is None else kept
        return staged_plan(total, {self.layer: after})

    def _after(self, total: int, layers: int) -> int:
        """Tokens from ``layer`` on, so that the mean over all layers is the budget."""
        room = budgets.room(self.budget, total, layers)
        after = (room - self.layer * total) // (layers - self.layer)
        if after < 1:
            raise budgets.unreachable(self.name, self.budget, total, budgets.stepped(total, 1, self.layer, layers) / layers)
        return min(after, total)

    def starts(self, depth: int) -> list[int]:
        """The layers before which tokens leave."""
        return [self.layer]

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens[LAST][0, 0]

    def prefill(self, tokens: LayerTokens) -> Selection:
        return Selection(top(self.score(tokens), tokens.count).sort().values)
