"""Notes what an applied method merged and what it scored by, for pictures. Without it nothing of that is kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import NotAppliedError
from vlprune.image import CacheTokens, ImageTokens, LayerTokens, VisionTokens
from vlprune.method import STAGES, Merge, Selection
from vlprune.signals import Signal

ATTENTION = "Attention"
"""Signals of these names say how much each token is looked at, which is what pictures show."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method chose of an image at one stage.

    ``places (..., N)``: placeholders of the rows that it was shown, -1 for padding. ``scores``: name -> attention to each
    placeholder ``(total,)``, averaged over heads and queries, NaN for those that are not measured.
    """

    stage: str
    layer: int | None
    total: int
    places: Tensor
    selection: Selection
    scores: dict[str, Tensor]

    def joined(self) -> Tensor:
        """The placeholder ``(total,)`` that each one was merged into, -1 for none."""
        into = torch.full((self.total + 1,), -1)
        if self.selection.merge is not None:
            target = _targets(self.selection.merge)
            kept = self.places.gather(-1, self.selection.keep.cpu())
            found = torch.where(target < 0, -1, kept.gather(-1, target.clamp(min=0)))
            # The places of padding, -1, are the last entry, which is cut off.
            into[self.places.flatten()] = found.flatten()
        return into[:-1]


def _targets(merge: Any) -> Tensor:
    """The kept row that each row adds to, or adds most to; -1 for none."""
    if isinstance(merge, Merge):
        return merge.target.cpu()
    most = merge.weight.max(-2)
    return torch.where(most.values > 0, most.indices, -1).cpu()


@dataclass(eq=False)
class Watched:
    """Choices of each image of the last forward, in order: ``choices[image]``."""

    choices: list[list[Choice]] = field(default_factory=list)

    def groups(self, image: int = 0) -> Tensor:
        """The placeholder ``(total,)`` that each one of an image has become a part of, its own if others have become a part of
        it; -1 for those that nothing was merged with. Merging in the caches, a layer at a time, is left out."""
        choices = [choice for choice in self.choices[image] if choice.stage != "evict"]
        if not choices:
            return torch.full((self.choices[image][0].total,), -1)
        root = torch.arange(choices[0].total)
        merged = torch.zeros(choices[0].total, dtype=torch.bool)
        for choice in choices:
            into = choice.joined()
            moved = (root >= 0) & (into[root.clamp(min=0)] >= 0)
            root = torch.where(moved, into[root.clamp(min=0)], root)
            merged |= into >= 0
        return torch.where(merged, root, -1)

    def scores(self, image: int = 0) -> dict[str, Tensor]:
        """Name -> attention to each of an image's placeholders ``(total,)``, of all that the method was shown."""
        found: dict[str, Tensor] = {}
        for choice in self.choices[image]:
            for name, values in choice.scores.items():
                found.setdefault(name, values)
        return found

    def note(self, stage: str, tokens: Any, selection: Selection | None) -> None:
        if selection is None:
            return
        layer, places = _seen(tokens)
        layout = tokens.layout
        scores = {_name(signal, layer): _by_place(v, places, layout) for signal, v in tokens.signals.items() if _shown(signal)}
        choice = Choice(stage, layer, layout.total, places, selection, scores)
        # Images are asked about in order, at each stage and layer anew.
        for known in self.choices:
            if all((one.stage, one.layer) != (stage, layer) for one in known):
                known.append(choice)
                return
        self.choices.append([choice])


@contextmanager
def watched(model: nn.Module) -> Iterator[Watched]:
    """Inside the block, notes what the method that is applied to ``model`` chooses; begin it anew for each forward.

    Raises:
        NotAppliedError: no method is applied.
    """
    from vlprune.engine.patch import patch_of

    patch = patch_of(model)
    if patch is None:
        raise NotAppliedError("no method is applied to this model; vlprune.apply(model) applies one")
    method, seen = patch.method, Watched()
    for stage in STAGES:
        # On the object alone, whose class still tells which stages it has.
        method.__dict__[stage] = functools.partial(_asked, seen, stage, getattr(method, stage))
    try:
        yield seen
    finally:
        for stage in STAGES:
            method.__dict__.pop(stage, None)


def _asked(seen: Watched, stage: str, ask: Any, tokens: Any) -> Any:
    selection = ask(tokens)
    seen.note(stage, tokens, selection)
    return selection


def _seen(tokens: Any) -> tuple[int | None, Tensor]:
    """The layer at which a method is asked, and the placeholders of the rows that it is shown."""
    if isinstance(tokens, VisionTokens):
        return tokens.layer, tokens.layout.placeholder.gather(1, tokens.patches.cpu())
    if isinstance(tokens, ImageTokens):
        return None, torch.arange(tokens.layout.total)
    assert isinstance(tokens, (LayerTokens, CacheTokens))
    return tokens.layer, tokens.positions.cpu()


def _shown(signal: Signal) -> bool:
    return ATTENTION in type(signal).__name__ and type(signal).__name__ != "AttentionSupport"


def _name(signal: Signal, layer: int | None) -> str:
    known = {"ClsAttention": "[CLS] attention", "QueryAttention": "attention of the text"}
    whose = known.get(type(signal).__name__, "attention")
    tower = "vision block" if signal.tower == "vision" else "LLM layer"
    at = signal.layer if signal.layer is not None else layer
    return f"{whose}, {tower} {at}"


def _by_place(values: Tensor, places: Tensor, layout: Any) -> Tensor:
    """``values (tiles, heads, n)``, or of the LLM ``(..., n)``, at the placeholders of their rows."""
    values = values.detach().float().cpu()
    if values.ndim == 3 and values.shape[0] == layout.tiles and values.shape[-1] == layout.placeholder.shape[1]:
        places = layout.placeholder if places.ndim == 1 else places
        values = values.mean(1)
    elif places.ndim == 2 and values.ndim == 3 and values.shape[0] == places.shape[0] and values.shape[-1] == places.shape[1]:
        values = values.mean(1)
    else:
        values = values.reshape(-1, values.shape[-1]).mean(0)
    found = torch.full((layout.total + 1,), torch.nan)
    if values.shape == places.shape:
        found[places.flatten()] = values.flatten()
    return found[:-1]
