"""The picture of a run: accuracy kept against visual tokens, as a mean over the LLM's layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.evals.report import Summary
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "accuracy.png"
PANELS = (("mean", "All kinds of question"), ("reading", "Reading: text, form, chart"))
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
"""Colours of Okabe and Ito, which people with any kind of colour vision tell apart, and a marker with each."""
BASELINES = {"random": "o", "uniform": "s", "pool": "^", "resize": "v"}
"""What needs no measurement is drawn grey and thin, with these markers."""
GREY = "#7A7A7A"


def draw(summaries: list[Summary], out: Path, subtitle: str = "") -> Path:
    """Writes ``accuracy.png`` into ``out``: a line with its 95 % band for each method, one panel for each mean."""
    path = out / PICTURE
    figure(summaries, subtitle).savefig(path)
    return path


def figure(summaries: list[Summary], subtitle: str = "") -> Figure:
    return panels([(summaries, key, title) for key, title in PANELS], subtitle)


def panels(shown: list[tuple[list[Summary], str, str]], subtitle: str = "") -> Figure:
    """A panel for each of ``shown``: summaries, which of their means to draw, and a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure without pyplot leaves the reader's own matplotlib state, and its backend, alone.
    made = Figure(figsize=(5.5 * len(shown), 5.2), dpi=160, layout="constrained")
    FigureCanvasAgg(made)
    row: Any = made.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (summaries, key, title) in zip(row, shown, strict=True):
        _panel(axes, [s for s in summaries if s[key] and s["tokens"]], key)
        axes.set_title(title, fontsize=11, loc="left")
    row[0].set_ylabel("score, %")
    handles, labels = row[0].get_legend_handles_labels()
    columns = max(1, min(3 * len(shown), len(labels)))
    made.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    if subtitle:
        made.suptitle(subtitle, fontsize=9, color="#5D5D5D", x=0.01, ha="left")
    return made


def _panel(axes: Axes, summaries: list[Summary], key: str) -> None:
    methods = [m for m in dict.fromkeys(s["method"] for s in summaries) if m != UNPRUNED]
    styles = iter(STYLES * (1 + len(methods) // len(STYLES)))
    tokens = {round(s["layer_tokens"]) for s in summaries if s["method"] == UNPRUNED}
    for method in methods:
        tokens.update(map(round, _line(axes, method, [s for s in summaries if s["method"] == method], key, styles)))
    for unpruned in (s for s in summaries if s["method"] == UNPRUNED):
        axes.axhspan(100 * unpruned[key]["low"], 100 * unpruned[key]["high"], color="black", alpha=0.06, linewidth=0)
        axes.axhline(100 * unpruned[key]["value"], color="black", linewidth=1.2, linestyle=(0, (5, 3)), label="unpruned")
    axes.set_xscale("log", base=2)
    ticks = _apart(sorted(tokens))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens of an image, mean over the LLM's layers")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, method: str, points: list[Summary], key: str, styles: Iterator[tuple[str, str]]) -> list[float]:
    """A method's curve with its band; returns the tokens at its points."""
    place, label, dashes = "layer_tokens", method, "-"
    if _only_evicts(points):
        place, label, dashes = "cached_tokens", f"{method} (tokens in the cache)", (0, (3, 1.5))
    colour, marker, width = (GREY, BASELINES[method], 1.0) if method in BASELINES else (*next(styles), 1.9)
    points = sorted(points, key=lambda s: s[place])
    tokens = [s[place] for s in points]
    low, value, high = ([100 * s[key][bound] for s in points] for bound in ("low", "value", "high"))
    axes.fill_between(tokens, low, high, color=colour, alpha=0.05 if method in BASELINES else 0.1, linewidth=0)
    axes.plot(tokens, value, color=colour, marker=marker, markersize=5, linewidth=width, linestyle=dashes, label=label)
    return tokens


def _only_evicts(points: list[Summary]) -> bool:
    """Whether all tokens pass through all layers, and only some stay in the cache."""
    whole = all(s["layer_tokens"] == s["visual_tokens"] for s in points)
    return whole and any(s["cached_tokens"] < s["visual_tokens"] for s in points)


def _apart(ticks: list[int]) -> list[int]:
    """Ticks of which each is at least a fifth larger than the one before, so that their labels do not touch."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.2 * kept[-1]:
            kept.append(tick)
    return kept
