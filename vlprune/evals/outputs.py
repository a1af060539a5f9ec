"""The files that are made of a run's rows: summary, tables, pictures, the page of changed answers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlprune.errors import VLPruneError
from vlprune.evals import gallery, plot, tables
from vlprune.evals.benchmarks.base import Example
from vlprune.evals.journal import write_json, write_whole
from vlprune.evals.report import Run, Summary

SUMMARY, MARKDOWN, CSV, PAGE = "summary.json", "table.md", "table.csv", "changes.html"

Examples = Mapping[str, Mapping[str, Example]]
"""Examples by benchmark and id."""


def write(run: Run, summaries: dict[str, list[Summary]], examples: Examples | None = None, changes: int = 0) -> list[Path]:
    """Writes all of them into the folder of the run and returns their paths.

    ``changes``: samples of each benchmark on the page of changed answers, which has the images of ``examples``;
    without them they are loaded again.
    """
    paths = [run.out / SUMMARY, run.out / MARKDOWN, run.out / CSV]
    write_json(paths[0], run.to_dict(summaries))
    write_whole(paths[1], tables.markdown(summaries, run.manifest))
    write_whole(paths[2], tables.to_csv([(run.model, summaries)]))
    if summaries:
        paths += plot.draw(plot.panels_of(summaries, _titles(run)), run.out, _subtitle(run))
    if changes and any(gallery.changes(rows) for rows in run.rows.values()):
        shown = _load(run) if examples is None else examples
        paths.append(run.out / PAGE)
        write_whole(paths[-1], gallery.page(_subtitle(run, bands=False), run.rows, shown, changes))
    return paths


def _load(run: Run) -> Examples:
    """Examples of the run's benchmarks; where the data cannot be had, the page has no images."""
    found: dict[str, Mapping[str, Example]] = {}
    for name in run.rows:
        with contextlib.suppress(VLPruneError):
            examples = run.benchmark(name).examples(run.manifest["benchmarks"][name]["samples"])
            found[name] = {example.id: example for example in examples}
    return found


def write_together(runs: Sequence[Run], out: Path) -> list[Path]:
    """One table (markdown, CSV) and one picture of several runs, into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    found = [(run, run.summaries()) for run in runs]
    paths = [out / MARKDOWN, out / CSV]
    write_whole(paths[0], "\n".join(f"# {run.model}\n\n{tables.markdown(s, run.manifest)}" for run, s in found))
    write_whole(paths[1], tables.to_csv([(run.model, summaries) for run, summaries in found]))
    shown = [
        panel._replace(title=f"{run.model}, {panel.title}")
        for run, summaries in found
        for panel in plot.panels_of(summaries, _titles(run))
    ]
    return paths + (plot.draw(shown, out) if shown else [])


def _titles(run: Run) -> dict[str, str]:
    return {name: data["title"] for name, data in run.manifest["benchmarks"].items()}


def _subtitle(run: Run, bands: bool = True) -> str:
    data = ", ".join(f"{one['title']} ({one['samples']} samples)" for one in run.manifest["benchmarks"].values())
    return f"{run.model} on {data}{', bands: 95 % intervals' if bands else ''}"
