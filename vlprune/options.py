"""Checks of options that several methods have: each raises :class:`OptionError`, which says what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from vlprune.errors import OptionError

Layers = TypeVar("Layers", int, Sequence[int])


def share(name: str, value: float, of: str = "") -> None:
    """From 0 to 1, both included. ``of``: what it is a share of."""
    if not 0.0 <= value <= 1.0:
        raise OptionError(f"{name}={value!r}: allowed is a share {f'of {of} ' if of else ''}from 0 to 1")


def above_zero(name: str, value: float) -> None:
    """A finite number above 0."""
    if not 0.0 < value < float("inf"):
        raise OptionError(f"{name}={value!r}: allowed is a number above 0")


def positive(name: str, value: int, what: str) -> None:
    """At least 1."""
    if value < 1:
        raise OptionError(f"{name}={value!r}: allowed is a {what} from 1 on")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """One of the names that are ``allowed``."""
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise OptionError(f"{name}={value!r}: allowed are {', '.join(others)} and {last}")


def ascending_layers(name: str, layers: Sequence[int], first: int) -> tuple[int, ...]:
    """``layers`` of the LLM, at least one, none below ``first``, none twice, in ascending order."""
    layers = tuple(layers)
    if not layers or list(layers) != sorted({layer for layer in layers if layer >= first}):
        raise OptionError(f"{name}={layers!r}: allowed are layers of the LLM from {first} on, in ascending order")
    return layers


def in_model(name: str, given: Layers, depth: int, last: int | None = None) -> Layers:
    """``given``, a layer or ascending layers, if an LLM of ``depth`` layers has them, none behind ``last`` of them."""
    highest = given if isinstance(given, int) else given[-1]
    if highest > (depth - 1 if last is None else last):
        allowed = "" if last is None else f", and allowed are 0 to {last}"
        raise OptionError(f"{name}={given!r}: this model's LLM has layers 0 to {depth - 1}{allowed}")
    return given


def both_or_neither(method: object, first: str, second: str, otherwise: str) -> None:
    """Both of two options or neither of them. ``otherwise``: what happens without them."""
    given = {name: getattr(method, name) for name in (first, second)}
    if (given[first] is None) != (given[second] is None):
        listed = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise OptionError(f"{listed}: give both, or neither and {otherwise}")
