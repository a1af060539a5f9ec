"""Benchmarks by name: ``find("textvqa")`` gives one, with options of its own; ``NAMES`` lists them. A path gives own data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmarks.base import Benchmark, DataError

_CLASSES = {
    "synthvqa": "SynthVQA",
    "vqav2": "VQAv2",
    "textvqa": "TextVQA",
    "gqa": "GQA",
    "pope": "POPE",
    "mme": "MME",
    "scienceqa": "ScienceQA",
    "docvqa": "DocVQA",
    "chartqa": "ChartQA",
    "mmbench": "MMBench",
    "own": "Own",
}
"""Each class is in the module of its benchmark's name."""
NAMES = tuple(_CLASSES)


def find(name: str, **options: Any) -> Benchmark:
    """The benchmark of that name, or one of a user's own data in the folder or file of that name.

    Raises :class:`DataError` where there is neither, and :class:`vlprune.errors.OptionError` for an option that it does not
    have.
    """
    if name not in _CLASSES:
        if not Path(name).exists():
            raise DataError(f"unknown benchmark {name!r}: there are {', '.join(NAMES)}, and no file or folder of this name")
        name, options = "own", {"path": name, **options}
    cls = getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])
    unknown = sorted(set(options) - set(cls.options()))
    if unknown:
        raise OptionError(f"{name} has no option {', '.join(unknown)}: there are {', '.join(cls.options())}")
    return cls(**options)
