"""Benchmarks by name: ``find("textvqa")`` gives one, with options of its own; ``NAMES`` lists them."""

from __future__ import annotations

import importlib
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmarks.base import Benchmark, DataError

_CLASSES = {
    "synthvqa": "SynthVQA",
}
"""Each class is in the module of its benchmark's name."""
NAMES = tuple(_CLASSES)


def find(name: str, **options: Any) -> Benchmark:
    """The benchmark of that name. Raises :class:`DataError` where there is none, and
    :class:`vlprune.errors.OptionError` for an option that it does not have."""
    if name not in _CLASSES:
        raise DataError(f"unknown benchmark {name!r}: there are {', '.join(NAMES)}")
    cls = getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])
    unknown = sorted(set(options) - set(cls.options()))
    if unknown:
        raise OptionError(f"{name} has no option {', '.join(unknown)}: there are {', '.join(cls.options())}")
    return cls(**options)
