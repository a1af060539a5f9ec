"""Pictures of runs: accuracy against visual tokens, as a mean over the LLM's layers, and against the measured prefill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlprune.evals.report import Summary
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY, TIME = "accuracy.png", "time.png"
TOKENS, SECONDS = "layer_tokens", "prefill_ms"
"""What accuracy is drawn against."""
AXES = {TOKENS: "visual tokens of an image, mean over the LLM's layers", SECONDS: "prefill of a sample, ms"}
ACROSS = 3
"""Panels in a row."""
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#882255", "X"),
    ("#332288", "<"),
)
"""Colours of Okabe and Ito, and two of Tol, which people with any kind of colour vision tell apart, and a marker with each."""
BASELINES = {"random": "o", "uniform": "s", "pool": "^", "resize": "v"}
"""What needs no measurement is drawn grey and thin, with these markers."""
GREY = "#7A7A7A"


class Panel(NamedTuple):
    """``number``: which of the summaries' numbers."""

    summaries: Sequence[Summary]
    number: str
    title: str


def panels_of(summaries: dict[str, list[Summary]], titles: dict[str, str] | None = None) -> list[Panel]:
    """All numbers of a single benchmark, the headlines of several."""
    if len(summaries) == 1:
        (found,) = summaries.values()
        return [Panel(found, name, name) for name in found[0]["numbers"]]
    return [
        Panel(found, found[0]["headline"], f"{(titles or {}).get(name, name)}: {found[0]['headline']}")
        for name, found in summaries.items()
    ]


def draw(shown: Sequence[Panel], out: Path, subtitle: str = "") -> list[Path]:
    """Writes ``accuracy.png`` and ``time.png`` into ``out``."""
    for name, against in ((ACCURACY, TOKENS), (TIME, SECONDS)):
        figure(shown, subtitle, against).savefig(out / name)
    return [out / ACCURACY, out / TIME]


def figure(shown: Sequence[Panel], subtitle: str = "", against: str = TOKENS) -> Figure:
    """A panel for each of ``shown``: a line with its 95 % band for each method, and the best there is at each cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(ACROSS, len(shown))
    down = math.ceil(len(shown) / across)
    # A figure without pyplot leaves the reader's own matplotlib state, and its backend, alone.
    made = Figure(figsize=(5.5 * across, 0.4 + 4.8 * down), dpi=160, layout="constrained")
    FigureCanvasAgg(made)
    places: Any = made.subplots(down, across, squeeze=False, sharey=_percent(shown)).reshape(-1)
    handles: dict[str, Any] = {}
    for axes, panel in zip(places, shown, strict=False):
        _draw_panel(axes, panel, against)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    columns = max(1, min(3 * across, len(handles)))
    made.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    if subtitle:
        made.suptitle(subtitle, fontsize=9, color="#5D5D5D", x=0.01, ha="left")
    return made


def _percent(shown: Sequence[Panel]) -> bool:
    """Whether all scores can share an axis; those that are sums of points cannot."""
    return all(s["numbers"][panel.number]["maximum"] == 1 for panel in shown for s in panel.summaries[:1])


def _draw_panel(axes: Axes, panel: Panel, against: str) -> None:
    drawn = [s for s in panel.summaries if panel.number in s["numbers"] and s[against]]
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_ylabel("score, %" if _percent([panel]) else "points")
    axes.set_xlabel(AXES[against])
    _draw_unpruned(axes, [s for s in drawn if s["method"] == UNPRUNED], panel.number, against)
    styles = iter(STYLES * (1 + len(drawn) // len(STYLES)))
    points = [_point(s, panel.number, s[against]) for s in drawn if s["method"] == UNPRUNED]
    for method in dict.fromkeys(s["method"] for s in drawn if s["method"] != UNPRUNED):
        points += _draw_line(axes, method, [s for s in drawn if s["method"] == method], panel.number, against, styles)
    if against == SECONDS:
        _draw_front(axes, points)
    axes.set_xscale("log", base=2)
    ticks = _apart(sorted(x for x, _ in points))
    axes.set_xticks(ticks, [f"{tick:.0f}" if tick >= 10 else f"{tick:.1f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_unpruned(axes: Axes, summaries: list[Summary], number: str, against: str) -> None:
    for summary in summaries:
        low, value, high = _bounds(summary["numbers"][number])
        axes.axhspan(low, high, color="black", alpha=0.06, linewidth=0)
        axes.axhline(value, color="black", linewidth=1.2, linestyle=(0, (5, 3)), label="unpruned")
        if against == SECONDS:
            axes.plot([summary[against]], [value], color="black", marker="*", markersize=10, linestyle="none")


def _draw_line(
    axes: Axes, method: str, points: list[Summary], number: str, against: str, styles: Iterator[tuple[str, str]]
) -> list[tuple[float, float]]:
    """A method's curve with its band; returns its points."""
    place, label, dashes = against, method, "-"
    if against == TOKENS and _only_evicts(points):
        place, label, dashes = "cached_tokens", f"{method} (tokens in the cache)", (0, (3, 1.5))
    baseline = method in BASELINES
    colour, marker, width = (GREY, BASELINES[method], 1.0) if baseline else (*next(styles), 1.9)
    points = sorted(points, key=lambda s: s[place])
    x = [s[place] for s in points]
    low, value, high = zip(*(_bounds(s["numbers"][number]) for s in points), strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.05 if baseline else 0.1, linewidth=0)
    axes.plot(x, value, color=colour, marker=marker, markersize=5, linewidth=width, linestyle=dashes, label=label)
    return [_point(s, number, s[place]) for s in points]


def _draw_front(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Pareto front: steps through the points that no other beats in both cost and score."""
    front = pareto(points)
    x, y = zip(*front, strict=True) if front else ((), ())
    axes.step(x, y, where="post", color="#B8860B", linewidth=1.0, linestyle=":", label="best at a cost")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, score) those with a higher score than all that cost no more."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _point(summary: Summary, number: str, cost: float) -> tuple[float, float]:
    return cost, _bounds(summary["numbers"][number])[1]


def _bounds(number: Summary) -> tuple[float, float, float]:
    factor = 100 if number["maximum"] == 1 else 1
    return factor * number["low"], factor * number["value"], factor * number["high"]


def _only_evicts(points: list[Summary]) -> bool:
    """Whether all tokens pass through all layers, and only some stay in the cache."""
    whole = all(s["layer_tokens"] == s["visual_tokens"] for s in points)
    return whole and any(s["cached_tokens"] < s["visual_tokens"] for s in points)


def _apart(ticks: list[float]) -> list[float]:
    """Ticks of which each is at least a fifth larger than the one before, so that their labels do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.2 * kept[-1]:
            kept.append(tick)
    return kept
