"""DiffRate's counts of each block, learned by gradient on the user's data.

What is learned is, for each block but the first, a distribution over counts for what is left behind dropping, and one for
what is left behind merging. In training no row leaves: a row of rank ``k`` is hidden by a mask that is 1 up to the expected
count and has the gradient of the probability that ``k`` rows or more are left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune.blocks import BlockTokens
from vlprune.methods.diffrate import DiffRate
from vlprune.schedule import solved
from vlprune.training.fitting import shape_of
from vlprune.training.objectives import HIDDEN, Objective
from vlprune.training.trainer import Batch, Trainer, answer_of, inputs_of

GRANULARITY = 4
"""Distance of the counts that can be chosen, in rows."""


class Counts(nn.Module):
    """Logits ``(blocks - 1, 2, candidates)``: what each block but the first leaves behind dropping, and behind merging.

    They begin around the counts that the method has for the ``budget``, ``tokens`` rows in front of the first block.
    """

    def __init__(self, budget: float, tokens: int, blocks: int, granularity: int = GRANULARITY):
        super().__init__()
        self.budget, self.tokens, self.blocks = budget, tokens, blocks
        candidates = torch.arange(tokens, 0, -granularity, dtype=torch.float32)
        self.candidates: Tensor
        self.register_buffer("candidates", candidates, persistent=False)
        after = torch.tensor(solved(budget, tokens, blocks, first=1), dtype=torch.float32)
        middles = torch.stack([(after[:-1] + after[1:]) / 2, after[1:]], 1)[..., None]
        self.logits = nn.Parameter(-((candidates - middles) ** 2) / (2 * (tokens / 8) ** 2))

    def expected(self) -> Tensor:
        """Counts ``(blocks - 1, 2)``, real numbers."""
        return self.logits.softmax(-1) @ self.candidates

    def mask(self, block: int, merged: bool) -> Tensor:
        """``(tokens,)`` for ranks from 1: 1 up to the expected count, 0 behind, with the gradient of :meth:`expected`."""
        shares = self.logits[block - 1, int(merged)].softmax(-1)
        ranks = torch.arange(1, self.tokens + 1, device=shares.device)
        probability = (shares * (self.candidates >= ranks[:, None])).sum(-1)
        left = (shares @ self.candidates).detach().ceil()
        return (ranks <= left).float() + (probability - probability.detach())

    def token_share(self) -> Tensor:
        """Mean over all blocks of the share of the rows that is left, no block having more than the one before."""
        left, total = self.candidates.new_tensor(float(self.tokens)), self.candidates.new_tensor(float(self.tokens))
        for kept, merged in self.expected():
            left = torch.minimum(left, torch.minimum(kept, merged))
            total = total + left
        return total / (self.tokens * self.blocks)

    def settled(self) -> DiffRate:
        """The method with integers, within the budget."""
        whole = [[self.tokens, self.tokens], *self.expected().detach().ceil().int().tolist()]
        kept, merged = [], []
        for block, (left, joined) in enumerate(whole):
            before = merged[-1] if block else self.tokens
            kept.append(min(before, left))
            merged.append(min(kept[-1], joined))
        room = math.floor(round(self.budget * self.tokens * self.blocks, 6))
        merged = _scaled(merged, room)
        kept = [max(left, joined) for left, joined in zip(kept, merged, strict=True)]
        return DiffRate(budget=self.budget, kept=kept, merged=merged)

    def save(self, path: Path) -> None:
        """The method's settings as JSON, which ``vlprune.from_dict`` reads."""
        path.write_text(json.dumps(self.settled().to_dict(), indent=2) + "\n")


def _scaled(counts: list[int], room: int) -> list[int]:
    """Counts that fall, those behind the first scaled by one factor so that all together are ``room``, or just below."""

    def at(factor: float) -> list[int]:
        scaled = [counts[0]]
        for count in counts[1:]:
            scaled.append(max(1, min(scaled[-1], math.floor(count * factor))))
        return scaled

    low, high = 0.0, counts[0] / max(1, min(counts)) + 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= room else (low, middle)
    found = at(low)
    for block in range(1, len(found)):
        # What rounding left over, one each, without exceeding the block before.
        if sum(found) < room and found[block] < found[block - 1]:
            found[block] += 1
    return found


@dataclass(kw_only=True, eq=False)
class CountsObjective(Objective):
    """Drops and merges by masks, and asks for the budget's share of token-layers, ``weight`` times its squared miss."""

    reads = ("queries",)
    needs_cls = True
    module: Counts
    weight: float = 100.0
    alive: Tensor | None = field(default=None, repr=False)

    def hide(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        if tokens.block == 0:
            self.alive = None
            return tokens.hidden, None
        prefix = tokens.prefix
        alive = torch.ones_like(tokens.sizes[:, prefix:]) if self.alive is None else self.alive
        attention = tokens.read.of_cls()[:, prefix:].masked_fill(alive.detach() < 0.5, -1.0)
        order = attention.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        kept, merged = (self.module.mask(tokens.block, last)[rank] for last in (False, True))
        x, grown = self._merged(tokens, order, kept.detach() * alive.detach() > 0.5, merged.detach() > 0.5)
        self.alive = alive * kept * merged
        sizes = torch.cat([tokens.sizes[:, :prefix], grown * self.alive + HIDDEN], 1)
        return x, sizes

    def _merged(self, tokens: BlockTokens, order: Tensor, kept: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and sizes when the kept ones that do not stay have gone into the most similar ones that do."""
        prefix = tokens.prefix
        rows, sizes = tokens.hidden[:, prefix:], tokens.sizes[:, prefix:].detach().clamp(min=1.0)
        targets, sources = kept & stays, kept & ~stays
        with torch.no_grad():
            unit = functional.normalize(rows.float(), dim=-1)
            cosine = (unit @ unit.mT).masked_fill(~targets[:, None], -torch.inf)
            value, best = cosine.max(-1)
            into = torch.where(sources, best, torch.arange(rows.shape[1], device=rows.device))
            grown = torch.zeros_like(sizes).scatter_add(1, into, torch.where(sources, sizes * value, sizes)).clamp(min=1.0)
            number = torch.zeros_like(sizes).scatter_add(1, into, torch.ones_like(sizes))
        added = torch.zeros_like(rows, dtype=torch.float32).scatter_add(
            1, into[..., None].expand_as(rows), torch.where(sources[..., None], rows.float(), 0.0)
        )
        means = torch.where(targets[..., None], (rows + added) / number[..., None].clamp(min=1.0), rows)
        return torch.cat([tokens.hidden[:, :prefix], means.to(rows.dtype)], 1), grown

    def loss(self, output: Tensor, taught: Tensor, labels: Tensor | None) -> Tensor:
        missed = self.module.token_share() - self.budget
        return super().loss(output, taught, labels) + self.weight * missed.square()

    def statistics(self) -> dict[str, float]:
        return {"token share": self.module.token_share().item()}


def diffrate(
    model: nn.Module,
    batches: Iterable[Batch],
    out: str | Path,
    *,
    budget: float = 0.5,
    steps: int = 300,
    rate: float = 0.05,
    save_every: int = 50,
    progress: Callable[[int, dict[str, float]], None] = lambda step, statistics: None,
) -> DiffRate:
    """Learns DiffRate's counts for ``model`` and writes them to ``out``, a JSON file of the method's settings.

    ``batches`` as for :func:`vlprune.training.fit`: without labels, the counts that leave the model's own answers as they are.
    All images must give as many rows as those of the first batch. The model is the same afterwards.
    """
    _, blocks = shape_of(model)
    counts = Counts(budget, _rows(model, batches), blocks)
    goal = CountsObjective(module=counts, budget=budget)
    Trainer(model, goal, out, steps=steps, rate=rate, save_every=save_every, progress=progress).run(batches)
    return counts.settled()


def _rows(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Rows of an image, protected ones not counted."""
    import vlprune
    from vlprune.report import Report

    inputs, _ = inputs_of(next(iter(batches)), next(model.parameters()).device)
    with vlprune.applied(model, "tome", r=0), torch.no_grad():
        answer_of(model, inputs)
        report = vlprune.report(model)
    assert not isinstance(report, Report)
    return report.total
