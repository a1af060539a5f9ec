"""Notices when rows between blocks are asked for; blocks then hand out all rows of the image."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlprune.engine.vit.architecture import Architecture
from vlprune.engine.vit.run import Run


class LookForStates:
    """A hook before the model and the modules around its blocks: is one of them asked for hidden states?

    ``outermost``: of the model itself, where a forward starts, as a rule. Where one starts further inside, what the one before
    asked for may hold on: that costs time and changes no result.
    """

    def __init__(self, run: Run, always: bool, outermost: bool):
        self.run, self.always, self.outermost = run, always, outermost

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(getattr(module, "config", None), "output_hidden_states", False)
        self.run.dense = self.always or bool(asked) or (self.run.dense and not self.outermost)


class WithAllRows:
    """Stands in for a method of the model that hands out rows between blocks.

    An object and no closure, so that deepcopy and pickle keep it together with the model it belongs to.
    """

    def __init__(self, run: Run, model: nn.Module, name: str):
        self.run, self.model, self.name = run, model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.run.dense = self.run.dense, True
        try:
            return getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        finally:
            self.run.dense = before


def look(run: Run, architecture: Architecture, tower: nn.Module) -> list[Any]:
    """Installs what notices it in ``tower``; returns handles of hooks."""
    for name in architecture.intermediates:
        if hasattr(type(tower), name):
            tower.__dict__[name] = WithAllRows(run, tower, name)
    always = any(part in type(tower).__name__ for part in architecture.grids)
    names = architecture.path_of(tower).split(".")[:-1]
    around = [tower, *(tower.get_submodule(".".join(names[: depth + 1])) for depth in range(len(names)))]
    return [
        module.register_forward_pre_hook(LookForStates(run, always, module is tower), with_kwargs=True)
        for module in around
        if hasattr(tower, "config")
    ]


def look_away(architecture: Architecture, tower: nn.Module) -> None:
    """Takes out what :func:`look` has put beside its hooks."""
    for name in architecture.intermediates:
        tower.__dict__.pop(name, None)
