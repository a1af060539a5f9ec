"""What a run measures: methods with their options, each at a budget, as they are written on the command line."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlprune.budget import Budget
from vlprune.config import read, trained
from vlprune.errors import BudgetError, OptionError
from vlprune.method import Method, make
from vlprune.method import methods as registered

UNPRUNED = "none"
EVERY = "all"
"""Stands for the unpruned model and every method for vision-language models, baselines among them."""
TRAINED = {"dyvte": "router", "dynamicvit": "heads", "tnt": "heads", "vtm": "heads"}
"""Methods that need weights which were trained for the model, and the option that names them."""
WITHOUT_SINKS = "without_sinks"
"""An option of every method that chooses inside the LLM; it is no field of theirs."""
METHODS = (
    "none,hired,flowcut,mustdrop:0.4:0.2:0.15,fastv:0.8:0.6:0.45,snapkv,divprune,scope,"
    "random,uniform:1.0:0.4:0.2:0.1,pool,resize"
)
"""What is measured by default. FastV and MustDrop cannot reach the lowest budgets of the others; ``uniform:1.0`` is a check:
nothing may be lost there."""
BUDGETS = "0.4,0.2,0.1"


@dataclass(frozen=True)
class Setting:
    """A method at a budget; the method ``none`` is the model without any patch, at budget 1.0.

    ``method`` is a name as it was written, options in brackets: ``fastv[layer=1]``; ``hired[config=tinyvlm-hired]`` takes them
    from a file, or from settings that come with vlprune; ``snapkv[without_sinks=true]`` leaves attention sinks out of account.
    """

    method: str
    budget: float | int = 1.0

    @property
    def label(self) -> str:
        """Names the setting, and tells a count of 1 from the fraction 1.0, which are equal in Python."""
        return self.method if self.method == UNPRUNED else f"{self.method} {self.budget}"

    @property
    def name(self) -> str:
        """The method's name without options."""
        return self.method.partition("[")[0]

    def make(self) -> Method:
        """The method; raises what ``vlprune.apply`` raises where it is unknown, or an option or the budget is not allowed."""
        options = options_of(self.method)
        config = options.pop("config", None)
        base = self.name if config is None else read(config)
        if isinstance(base, Method) and base.name != self.name:
            raise OptionError(f"{self.method}: this config is of {base.name}; write {base.name}[config={config}]")
        return make(base, **{**options, "budget": self.budget})


def parse(methods: str, budgets: str, model: str = "") -> list[Setting]:
    """Settings of ``"none,hired,fastv[layer=1]:0.8:0.6"``; a method that names no budget is measured at all of ``budgets``.

    ``"all"`` are all methods that there are, with weights that come along for ``model``.
    """
    common = [budget_of(text) for text in parts(budgets, ",")]
    found = []
    for text in parts(methods, ","):
        method, *own = parts(text, ":")
        if method == UNPRUNED and own:
            raise BudgetError(f"{text!r}: the unpruned model has no budget; write {UNPRUNED!r}")
        wanted = [UNPRUNED, *(with_weights(name, model) for name in registered())] if method == EVERY else [method]
        found += settings_of(wanted, [budget_of(budget) for budget in own] or common)
    return distinct(sorted(found, key=lambda setting: setting.method != UNPRUNED))


def with_weights(method: str, model: str) -> str:
    """A method that needs weights, with those that were trained for the model; without them it says itself what to do."""
    weights = trained(model, method) if method in TRAINED else None
    return f"{method}[{TRAINED[method]}={weights}]" if weights else method


def names_each(methods: str | None) -> bool:
    """Whether somebody asked for each of the settings, so that one that is not possible is a mistake."""
    return methods is not None and not any(parts(text, ":")[0] == EVERY for text in parts(methods, ","))


def settings_of(methods: Sequence[str], budgets: Sequence[float | int]) -> list[Setting]:
    """Every method at every budget; ``none`` once, and first, since the others are compared with it."""
    pruned = [Setting(method, budget) for method in methods if method != UNPRUNED for budget in budgets]
    return distinct([Setting(UNPRUNED)] * (UNPRUNED in methods) + pruned)


def distinct(settings: Sequence[Setting]) -> list[Setting]:
    return list({setting.label: setting for setting in settings}.values())


def budget_of(text: str) -> Budget:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise BudgetError(f"a budget is a count (64) or a fraction (0.2) of visual tokens, not {text!r}") from None


def options_of(method: str) -> dict[str, Any]:
    """Options in the brackets of ``method``, of the types that the method's fields have."""
    name, options = bracketed(method)
    if not options:
        return {}
    if "budget" in options:
        raise OptionError(f"{method}: budgets stand behind a colon, as in {name}:0.4:0.2, or in --budgets")
    # A class, not an object: some methods cannot be made without their options.
    cls = {**registered(), **registered("vit")}.get(name)
    types_of = {**get_type_hints(cls or type(make(name))), WITHOUT_SINKS: bool}
    # What is not an option of the method is told by the method.
    return {key: _value(f"{name}[{key}={text}]", text, types_of.get(key, str)) for key, text in options.items()}


def bracketed(text: str) -> tuple[str, dict[str, str]]:
    """A name, and the options in brackets behind it: ``fastv[layer=1]``."""
    match = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]*)\])?", text)
    if match is None:
        raise OptionError(f"{text!r}: options stand in one pair of brackets behind the name, as in fastv[layer=1]")
    name, inside = match.groups()
    return name, dict(_option(name, part) for part in parts(inside or "", ","))


def _option(name: str, text: str) -> tuple[str, str]:
    option, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise OptionError(f"{name}[{text}]: an option is written as name=value, as in fastv[layer=1]")
    return option, value


def literal(text: str) -> Any:
    """What a value looks like: a number, true, false or none, and text otherwise."""
    try:
        return _value(text, text, int | float | bool | None)
    except OptionError:
        return text


def _value(where: str, text: str, kind: Any) -> Any:
    """``text`` as the first type of ``kind`` that it can be read as."""
    kinds = list(_kinds(kind))
    for kind in kinds:
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is int and re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        if kind is float and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
            return float(text)
        if kind is str or kind == text:
            return text
    allowed = ", ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in kinds)
    raise OptionError(f"{where}: allowed on the command line is {allowed.replace('NoneType', 'none') or 'nothing'}")


def _kinds(kind: Any) -> Iterator[Any]:
    """The types that a value of ``kind`` may have on the command line, a literal being its own; ``int`` before ``float``."""
    if get_origin(kind) in (Union, types.UnionType):
        found = [one for part in get_args(kind) for one in _kinds(part)]
        yield from sorted(found, key=lambda one: one is float)
    elif get_origin(kind) is Literal:
        yield from get_args(kind)
    elif kind in (int, float, bool, str, type(None)):
        yield kind


def parts(text: str, separator: str) -> list[str]:
    """``text`` between separators that stand outside of brackets."""
    return [part.strip() for part in re.split(rf"{separator}(?![^\[]*\])", text) if part.strip()]
