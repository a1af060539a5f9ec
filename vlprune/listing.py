"""What there is: ``vlprune methods`` and ``vlprune models``."""

from __future__ import annotations

import dataclasses
from typing import Any

import vlprune
from vlprune.engine.family import Family
from vlprune.engine.vit.architecture import Architecture, architectures
from vlprune.image import ModelShape
from vlprune.method import STAGES, Method
from vlprune.terminal import AsJson, clear_errors, print_json, print_table

TYPICAL = ModelShape(24, 32, 22, True)
"""LLaVA-1.5 7B: 24 vision blocks with [CLS], 32 LLM layers. Methods are asked what they need of such a model."""


@clear_errors
def methods(as_json: AsJson = False) -> None:
    """Lists the methods: where they prune, for which models, by which paper, what they measure, their default budget.

    Example: vlprune methods --json
    """
    found = [described(name, cls) for name, cls in all_methods().items()]
    print_json(found) if as_json else print_table(map(_method_row, found))


@clear_errors
def models(as_json: AsJson = False) -> None:
    """Lists the families of models that can be pruned, and at which stages.

    Example: vlprune models --json
    """
    found = [*map(family, vlprune.supported_models()), *map(architecture, architectures())]
    print_json(found) if as_json else print_table(map(_model_row, found))


# ------------------------------------------------------------------ facts


def all_methods() -> dict[str, type[Method]]:
    """Those for vision-language models first."""
    return {**vlprune.methods(), **vlprune.methods("vit")}


def described(name: str, cls: type[Method]) -> dict[str, Any]:
    """What a script may want to know of a method."""
    method = _blank(cls)
    return {
        "name": name,
        "summary": summary(cls),
        "stages": list(method.stages),
        "serves": list(method.serves),
        "paper": str(method.paper) or None,
        "needs": list(dict.fromkeys(type(signal).__name__ for signal in method.wants(TYPICAL))),
        "adaptive": bool(method.adaptive),
        "budget": method.budget,
        "options": {field.name: getattr(method, field.name, None) for field in dataclasses.fields(method)},
    }


def _blank(cls: type[Method]) -> Method:
    """The method with its defaults; unchecked, since options may be required (trained weights) and are not known here."""
    method = cls.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            setattr(method, field.name, field.default_factory())
    return method


def summary(cls: type) -> str:
    """The first line of the docstring, without its markup."""
    return (cls.__doc__ or "").strip().partition("\n")[0].replace("``", "")


def family(one: Family) -> dict[str, Any]:
    """What a script may want to know of a family of vision-language models."""
    return {
        "name": one.name,
        "serves": "vlm",
        "model_types": list(one.model_types),
        "stages": list(one.stages),
        "videos": one.video_layouts is not None,
        "tested": list(one.tested),
    }


def architecture(one: Architecture) -> dict[str, Any]:
    """What a script may want to know of vision transformers on their own."""
    return {
        "name": one.name,
        "serves": "vit",
        "model_types": list(one.model_types),
        "stages": ["reduce"],
        "videos": False,
        "tested": [],
    }


# ------------------------------------------------------------------ tables


def _method_row(method: dict[str, Any]) -> dict[str, str]:
    count = method["budget"]
    return {
        "name": method["name"],
        "stages": _listed(method["stages"]),
        "serves": _listed(method["serves"]),
        "budget": f"{count:.3g}" if isinstance(count, float) else str(count),
        "count": "by content" if method["adaptive"] else "known",
        "needs": _listed(method["needs"]),
        "paper": method["paper"] or "–",
    }


def _model_row(model: dict[str, Any]) -> dict[str, str]:
    everywhere = model["stages"] == list(STAGES)
    return {
        "family": model["name"],
        "serves": model["serves"],
        "model types": _listed(model["model_types"]),
        "stages": "all" if everywhere else _listed(model["stages"]),
        "videos": "yes" if model["videos"] else "–",
        "transformers": _listed(model["tested"]),
    }


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "–"
