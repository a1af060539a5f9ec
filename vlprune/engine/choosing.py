"""What a method chooses for one image between encoder and LLM; the same in every host that gives features and signals."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.engine.family import IMAGE
from vlprune.engine.merging import merged
from vlprune.engine.steps import Clock, Step
from vlprune.errors import BudgetError
from vlprune.image import ImageLayout, ImageTokens
from vlprune.method import Method, Plan


@dataclass(eq=False)
class Chosen:
    """What was chosen for one image before the LLM.

    ``keep (T,)`` on the device, None for all; ``grid`` the encoder saw a tile at; ``plan`` the counts of the stages to come;
    ``steps`` what was done; ``notes`` what the method wants to see again in later stages.
    """

    layout: ImageLayout
    keep: Tensor | None
    grid: tuple[int, int]
    plan: Plan
    steps: list[Step] = field(default_factory=list)
    notes: dict[str, Tensor] = field(default_factory=dict)
    kind: int = IMAGE

    @property
    def kept(self) -> int:
        return self.layout.total if self.keep is None else self.keep.shape[0]

    @property
    def idle(self) -> bool:
        """Whether nothing happens to the image at any stage."""
        return self.keep is None and not self.plan.prefill and not self.plan.cached


def asks(method: Method, layout: ImageLayout, plan: Plan) -> bool:
    """Whether the method is asked about an image; where all its tokens are to stay, it is not."""
    counts = (plan.entering, *plan.prefill.values(), *plan.cached.values())
    return method.adaptive or min(counts) < layout.total


def choose(method: Method, image: ImageTokens, plan: Plan, grid: tuple[int, int]) -> tuple[Chosen, Tensor]:
    """The choice for one image, and its features with merged rows in place."""
    if not asks(method, image.layout, plan):
        return Chosen(image.layout, None, grid, plan, notes=image.notes), image.features
    keep, features, steps = image.alive, image.features, []
    if "select" in method.stages:
        clock = Clock(image.device)
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            selection = method.select(image)
        keep, features = selection.keep, merged(image.features, selection)
        before = image.layout.total if image.alive is None else image.alive.shape[0]
        steps = [Step("select", None, before, keep, clock.stop())]
    kept = image.layout.total if keep is None else keep.shape[0]
    if not method.adaptive and kept != image.count:
        raise BudgetError(
            f"{type(method).__name__} kept {kept} visual tokens where its budget "
            f"{method.budget!r} allows exactly {image.count} of {image.layout.total}; "
            "a method whose count depends on the image's content says so: adaptive = True"
        )
    return Chosen(image.layout, keep, grid, plan, steps, image.notes), features
