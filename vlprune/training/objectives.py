"""What heads learn from: soft decisions in a forward that keeps all rows, and losses on what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import UnsupportedMethodError
from vlprune.methods.dynamicvit import DynamicViTHeads
from vlprune.methods.tnt import TNTHeads
from vlprune.methods.vtm import VTMHeads
from vlprune.schedule import staged

HIDDEN = 1e-6
"""Size of a row that is hidden: nothing looks at it, and what it would change is still known to its gradient.

With the logarithm of ``m + HIDDEN`` on its logit, a key's share of the attention is ``(m + HIDDEN) exp(logit)`` over the sum
of all: the masked softmax of DynamicViT.
"""


@dataclass(kw_only=True, eq=False)
class Objective(BlockMethod):
    """A method that hides rows instead of dropping them, so that gradients reach its ``module``.

    ``active`` is False while the unpruned model runs, from which it may learn. ``generator``: of what is drawn.
    """

    module: Any
    softens: ClassVar[bool] = True
    active: bool = True
    generator: torch.Generator = field(default_factory=torch.Generator)
    last: Tensor | None = None
    """The rows ``(B, N, C)`` of the last block that ran."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def counts(self, tokens: int, blocks: int) -> list[int]:
        """All rows stay."""
        return [tokens] * blocks

    def soften(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        self.last = tokens.hidden
        return self.hide(tokens) if self.active else (tokens.hidden, None)

    def hide(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        """:meth:`soften` while it is active; all sizes are 1 in front of the first block."""
        raise NotImplementedError

    def loss(self, output: Tensor, taught: Tensor, labels: Tensor | None) -> Tensor:
        """Of what the model gives with rows hidden ``(B, classes)``, or features, and what it gives without, ``taught``."""
        return answer_loss(output, taught, labels)

    def statistics(self) -> dict[str, float]:
        """What is worth telling of the last step, beside the loss."""
        return {}

    def noise(self, like: Tensor) -> Tensor:
        """Uniform in (0, 1), drawn on the host."""
        return torch.rand(like.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6).to(like.device)


def answer_loss(output: Tensor, taught: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy where there are labels; else how far the answer, or features, are from the unpruned model's."""
    if labels is not None:
        return functional.cross_entropy(output.float(), labels)
    return divergence(output, taught)


def divergence(output: Tensor, taught: Tensor) -> Tensor:
    """Of the class probabilities that two ``(B, classes)`` of logits, or features, give: Kullback-Leibler, per sample."""
    return functional.kl_div(
        output.float().log_softmax(-1), taught.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


@dataclass(kw_only=True, eq=False)
class DynamicViTObjective(Objective):
    """Straight-through Gumbel decisions in each stage, and DynamicViT's losses.

    A row that was hidden stays hidden. Each stage is to keep the share of the rows that the budget gives it.
    """

    module: DynamicViTHeads
    keep: float | None = None
    ratio_weight: float = 2.0
    answer_weight: float = 0.5
    token_weight: float = 0.5
    decided: Tensor | None = None
    mistakes: list[Tensor] = field(default_factory=list)
    taught_rows: Tensor | None = None
    kept: list[float] = field(default_factory=list)

    def hide(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        if tokens.block == 0:
            self.decided, self.mistakes, self.kept = None, [], []
        if tokens.block not in self.module.stages:
            return tokens.hidden, None if self.decided is None else tokens.sizes
        logs = self.module.decisions(tokens, self.decided)
        gumbel = -(-self.noise(logs).log()).log()
        soft = (logs + gumbel).softmax(-1)[..., 0]
        hard = (soft > 0.5).float() + (soft - soft.detach())  # in this order exactly 0 or 1
        self.decided = hard if self.decided is None else hard * self.decided
        rows = self.decided.shape[1]
        aim = staged(self.budget, rows, tokens.blocks, self.module.stages, self.keep)[tokens.block] / rows
        self.mistakes.append((self.decided.mean(1) - aim).square().mean())
        self.kept.append(self.decided.detach().mean().item())
        protected = self.decided.new_ones(len(self.decided), tokens.prefix)
        return tokens.hidden, torch.cat([protected, self.decided], 1) + HIDDEN

    def soften(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        x, sizes = super().soften(tokens)
        if not self.active:
            self.taught_rows = x.detach()
        return x, sizes

    def loss(self, output: Tensor, taught: Tensor, labels: Tensor | None) -> Tensor:
        loss = self.ratio_weight * torch.stack(self.mistakes).mean() + self.answer_weight * divergence(output, taught)
        if labels is not None:
            loss = loss + functional.cross_entropy(output.float(), labels)
        return loss + self.token_weight * self._of_rows()

    def _of_rows(self) -> Tensor:
        """Squared distance of the rows that are kept from those of the unpruned model, both normalised."""
        assert self.last is not None
        assert self.taught_rows is not None
        assert self.decided is not None
        width, kept = self.last.shape[-1:], self.decided.detach()
        prefix = self.last.shape[1] - kept.shape[1]
        ours, theirs = (functional.layer_norm(x[:, prefix:].float(), width) for x in (self.last, self.taught_rows))
        return ((ours - theirs).square().mean(-1) * kept).sum() / kept.sum().clamp(min=1)

    def statistics(self) -> dict[str, float]:
        return {f"kept {stage}": share for stage, share in zip(self.module.stages, self.kept, strict=True)}


@dataclass(kw_only=True, eq=False)
class TNTObjective(Objective):
    """Noise on every row behind each stage, less on what has a large share of the scores' softmax.

    ``noise_scale``: of the noise, in standard deviations of a row's features.
    """

    module: TNTHeads
    noise_scale: float = 0.5

    def hide(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        if tokens.block not in self.module.stages:
            return tokens.hidden, None
        share = self.module.scores(tokens).softmax(-1)[..., None]
        rows = tokens.hidden[:, tokens.prefix :]
        normal = torch.randn(rows.shape, generator=self.generator).to(rows.device)
        noisy = rows + self.noise_scale * rows.float().std(-1, keepdim=True) * normal * (1 - share)
        return torch.cat([tokens.hidden[:, : tokens.prefix], noisy.to(rows.dtype)], 1), None


@dataclass(kw_only=True, eq=False)
class VTMObjective(Objective):
    """The saliency is added to the logits of the blocks behind each stage, ``gain`` times, so that it learns what is useful.

    In the paper a second path through the attention has it, added to the first one; a frozen model has no use for two.
    """

    module: VTMHeads
    gain: float = 3.0

    def hide(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        if tokens.block not in self.module.stages:
            return tokens.hidden, tokens.sizes if tokens.block > self.module.stages[0] else None
        saliency = self.module.scores(tokens)
        saliency = self.gain * (saliency - saliency.mean(1, keepdim=True))
        return tokens.hidden, torch.cat([saliency.new_zeros(len(saliency), tokens.prefix), saliency], 1).exp()


OBJECTIVES: dict[str, type[Objective]] = {
    "dynamicvit": DynamicViTObjective,
    "tnt": TNTObjective,
    "vtm": VTMObjective,
}
HEADS = {"dynamicvit": DynamicViTHeads, "tnt": TNTHeads, "vtm": VTMHeads}


def objective(
    method: str, width: int, blocks: int, stages: tuple[int, ...] | None = None, seed: int = 0, **options: Any
) -> Objective:
    """That of a method with learned heads, for a model of ``blocks`` blocks and rows of ``width``; ``options`` are its fields.

    ``stages``: in which blocks the heads look; the method's own by default. ``seed``: of the weights that they begin with.
    """
    if method not in OBJECTIVES:
        raise UnsupportedMethodError(f"{method!r} has no heads to train; those that do: {', '.join(OBJECTIVES)}")
    kind = HEADS[method]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = kind(width, kind.default_stages(blocks) if stages is None else stages)
    return OBJECTIVES[method](module=heads, **{"budget": 0.5, **options})
