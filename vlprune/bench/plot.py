"""Pictures of a run: speed-up against budget with the floor's line, and the parts of each prefill stacked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.bench.journal import Row
from vlprune.bench.model import PARTS
from vlprune.bench.report import grouped
from vlprune.evals.plot import BASELINES, GREY, STYLES
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPEED, STACKED = "speed.png", "parts.png"
COLOURS = dict(zip(PARTS, ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#BBBBBB"), strict=True))


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes ``speed.png`` and ``parts.png`` into ``out``: a panel for each model, attention kernel and batch size."""
    groups = {title: [row for row in group if not row.get("error")] for title, group in grouped(rows).items()}
    groups = {title: group for title, group in groups.items() if group}
    if not groups:
        return []
    out.mkdir(parents=True, exist_ok=True)
    speed, stacked = out / SPEED, out / STACKED
    _panels(groups, _speed, 5.0).savefig(speed)
    most = max(map(len, groups.values()))
    _panels(groups, _stacked, 1.6 + 0.27 * most).savefig(stacked)
    return [speed, stacked]


def _panels(groups: dict[str, list[Row]], panel: Any, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure without pyplot leaves the reader's own matplotlib state, and its backend, alone.
    figure = Figure(figsize=(7.5 * len(groups), height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(groups), squeeze=False)[0]
    for place, (title, group) in zip(axes, groups.items(), strict=True):
        panel(place, group)
        place.set_title(_broken(title), fontsize=9, loc="left")
        place.spines[["top", "right"]].set_visible(False)
    return figure


def _broken(title: str) -> str:
    """Over two lines, the prompts' length beginning the second."""
    return title.replace(", prompts", "\nprompts")


def _speed(axes: Axes, rows: Sequence[Row]) -> None:
    pruned = [row for row in rows if row["method"] != UNPRUNED and row.get("speedup") is not None]
    styles = iter(STYLES * (1 + len(pruned)))
    for method in dict.fromkeys(str(row["method"]) for row in pruned):
        points = sorted((row for row in pruned if row["method"] == method), key=_share)
        budgets = [_share(row) for row in points]
        colour, marker, width = (GREY, BASELINES[method], 1.0) if method in BASELINES else (*next(styles), 1.9)
        low, value, high = ([row[f"speedup{end}"] for row in points] for end in ("_low", "", "_high"))
        axes.fill_between(budgets, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(budgets, value, color=colour, marker=marker, markersize=5, linewidth=width, label=method)
    _floor(axes, pruned)
    axes.axhline(1.0, color="black", linewidth=1.0, linestyle=(0, (5, 3)), label="unpruned")
    axes.set_xlabel("visual tokens kept, mean over the LLM's layers, share of all")
    axes.set_ylabel("prefill, times as fast as unpruned")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _share(row: Row) -> float:
    """Where a row stands: the share of tokens that the LLM's layers see, which is the budget of all that save prefill."""
    return row["layer_mean"] / row["visual_tokens"]


def _floor(axes: Axes, rows: Sequence[Row]) -> None:
    """The floor of what leaves the encoder alone and drops in front of the LLM, which is one curve for all such methods."""
    points = {_share(row): row["floor_speedup"] for row in rows if row["method"] in ("uniform", "random", "hired")}
    points = {share: speedup for share, speedup in sorted(points.items()) if speedup is not None}
    if points:
        style = {"color": "black", "linewidth": 1.2, "linestyle": ":", "marker": "_", "markersize": 9}
        axes.plot(list(points), list(points.values()), label="floor (dropped before the LLM)", **style)


def _stacked(axes: Axes, rows: Sequence[Row]) -> None:
    labels = [_label(row) for row in rows]
    places = list(range(len(rows)))[::-1]
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row.get(f"{part}_ms") or 0.0 for row in rows]
        axes.barh(places, widths, left=left, color=COLOURS[part], height=0.75, label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    floors = [(row["floor_ms"], place) for row, place in zip(rows, places, strict=True) if row.get("floor_ms") is not None]
    if floors:
        x, y = zip(*floors, strict=True)
        axes.scatter(x, y, marker="|", s=130, color="black", linewidths=1.6, label="floor", zorder=3)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlabel("prefill of the batch, ms")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _label(row: Row) -> str:
    if row["method"] == UNPRUNED:
        return "none again" if row.get("repeat") else "none"
    return f"{row['method']} {row['budget']}"
