"""Recipes: what to run for the main tables of the field, with the published numbers beside it as data.

A recipe is a YAML file in this folder. Its ``published`` tables name their source, and have for each column the benchmark and
which of its numbers it is, and for each method and budget the numbers as printed: percent, or points of MME.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vlprune.errors import VLPruneError
from vlprune.evals.settings import UNPRUNED, Setting

NAMES = tuple(sorted(one.name.removesuffix(".yaml") for one in files(__name__).iterdir() if one.name.endswith(".yaml")))
FULL = "full"
"""Where a table has the unpruned model."""


@dataclass(frozen=True)
class Published:
    """A number of a paper: ``value`` is ``number`` of ``benchmark``, in percent or points, as ``source`` has it."""

    setting: Setting
    benchmark: str
    number: str
    value: float
    source: str


@dataclass(frozen=True)
class Recipe:
    """``model`` to ``budgets`` are what ``vlprune eval`` takes; ``notes`` tell in what a run differs from the papers."""

    name: str
    title: str
    model: str
    benchmarks: str
    methods: str
    budgets: str
    notes: tuple[str, ...]
    published: tuple[Published, ...]

    def command(self) -> list[str]:
        """What to type, in words."""
        options = {"model": self.model, "benchmarks": self.benchmarks, "methods": self.methods, "budgets": self.budgets}
        return ["vlprune", "eval", *(word for name, value in options.items() for word in (f"--{name}", value))]


def load(name: str) -> Recipe:
    """The recipe of that name. Raises :class:`vlprune.errors.VLPruneError` where there is none."""
    import yaml

    if name not in NAMES:
        raise VLPruneError(f"unknown recipe {name!r}: there are {', '.join(NAMES)}")
    written = yaml.safe_load((files(__name__) / f"{name}.yaml").read_text(encoding="utf-8"))
    tables = written.pop("published")
    notes = tuple(written.pop("notes"))
    return Recipe(name=name, notes=notes, published=tuple(one for table in tables for one in _numbers(table)), **written)


def _numbers(table: Mapping[str, Any]) -> Iterator[Published]:
    for method, rows in table["rows"].items():
        for budget, values in rows.items():
            setting = Setting(UNPRUNED) if budget == FULL else Setting(method, budget)
            for (benchmark, number), value in zip(table["columns"], values, strict=True):
                if value is not None:
                    yield Published(setting, benchmark, number, value, table["source"])


@dataclass(frozen=True)
class Beside:
    """A published number and the measured one, with half of its 95 % interval; None where that was not measured."""

    published: Published
    measured: float | None
    margin: float | None


def beside(recipe: Recipe, summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Beside]:
    """Every published number of a recipe with its counterpart in ``summaries``: those of :mod:`vlprune.evals.report`, by
    benchmark, under the keys of :func:`vlprune.evals.loading.key_of`."""
    from vlprune.evals.loading import key_of

    found = {
        (benchmark, Setting(one["method"], one["budget"]).label): one["numbers"]
        for benchmark, settings in summaries.items()
        for one in settings
    }
    return [
        _beside(one, found.get((key_of(one.benchmark), one.setting.label), {}).get(one.number)) for one in recipe.published
    ]


def _beside(published: Published, number: Mapping[str, float] | None) -> Beside:
    if number is None:
        return Beside(published, None, None)
    unit = 100 if number["maximum"] == 1 else 1
    return Beside(published, unit * number["value"], unit * (number["high"] - number["low"]) / 2)
