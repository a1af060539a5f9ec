"""The picture of a run: accuracy kept against visual tokens fed to the LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.evals.report import Summary
from vlprune.evals.runner import UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "accuracy.png"
PANELS = (("mean", "All kinds of question"), ("reading", "Reading: text, form, chart"))
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#5D5D5D", "X"),
)
"""Colours of Okabe and Ito, which people with any kind of colour vision tell apart, and a marker with each."""


def draw(summaries: list[Summary], out: Path, subtitle: str = "") -> Path:
    """Writes ``accuracy.png`` into ``out``: a line with its 95 % band for each method, one panel for each mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure without pyplot leaves the reader's own matplotlib state, and its backend, alone.
    figure = Figure(figsize=(11, 4.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, (key, title) in zip(panels, PANELS, strict=True):
        _panel(axes, [s for s in summaries if s[key] and s["tokens"]], key)
        axes.set_title(title, fontsize=11, loc="left")
    panels[0].set_ylabel("score, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if subtitle:
        figure.suptitle(subtitle, fontsize=9, color="#5D5D5D", x=0.01, ha="left")
    path = out / PICTURE
    figure.savefig(path)
    return path


def _panel(axes: Axes, summaries: list[Summary], key: str) -> None:
    methods = [m for m in dict.fromkeys(s["method"] for s in summaries) if m != UNPRUNED]
    for method, (colour, marker) in zip(methods, STYLES * (1 + len(methods) // len(STYLES)), strict=False):
        points = sorted((s for s in summaries if s["method"] == method), key=lambda s: s["tokens"])
        tokens = [s["tokens"] for s in points]
        low, value, high = ([100 * s[key][bound] for s in points] for bound in ("low", "value", "high"))
        axes.fill_between(tokens, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(tokens, value, color=colour, marker=marker, markersize=5, linewidth=1.8, label=method)
    for unpruned in (s for s in summaries if s["method"] == UNPRUNED):
        axes.axhspan(100 * unpruned[key]["low"], 100 * unpruned[key]["high"], color="black", alpha=0.06, linewidth=0)
        axes.axhline(100 * unpruned[key]["value"], color="black", linewidth=1.2, linestyle=(0, (5, 3)), label="unpruned")
    axes.set_xscale("log", base=2)
    ticks = sorted({round(s["tokens"]) for s in summaries})
    axes.set_xticks(_apart(ticks), [str(tick) for tick in _apart(ticks)])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens that enter the LLM, for one image")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(ticks: list[int]) -> list[int]:
    """Ticks of which each is at least an eighth larger than the one before, so that their labels do not touch."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.125 * kept[-1]:
            kept.append(tick)
    return kept
