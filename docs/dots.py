"""The picture of all methods: a row a method, a dot a budget, a panel a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cells import MEAN, Summary
from compared import AGAINST, OWN, UNPRUNED, Results, budgets, find, parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 140
COLOURS = ("#003B5C", "#0088B8", "#7CC5E0")
SIZES = (7.5, 5.5, 3.5)
"""Of the budgets, the largest first: dots are light and small where little is kept, and none hides another."""
OWN_COLOUR = "#D55E00"
"""Of methods whose count the content decides."""
ROW, GAP = 0.19, 2.0
"""Height of a row in inches, and rows between two parts."""


class Panel(NamedTuple):
    """``rows``: method -> its settings by budget (one under None where the content decides); ``random``: score by budget."""

    title: str
    rows: dict[str, dict[float | None, Summary]]
    random: dict[float, float]
    unpruned: Summary


def panels(results: Results) -> tuple[dict[str, list[str]], list[Panel]]:
    """Parts with their methods, and a panel for each model."""
    found = parts(results)
    shown = []
    for model in results:
        rows = {name: _settings(name, model, title == OWN, results) for title, names in found.items() for name in names}
        random = {budget: _score(row) for budget, row in rows[AGAINST].items() if budget is not None}
        unpruned = find(results, model, UNPRUNED)
        assert unpruned is not None
        shown.append(Panel(model, rows, random, unpruned))
    return found, shown


def _settings(name: str, model: str, own: bool, results: Results) -> dict[float | None, Summary]:
    wanted = {None: find(results, model, name)} if own else {b: find(results, model, name, b) for b in budgets(results)}
    return {budget: row for budget, row in wanted.items() if row is not None}


def figure(shown: tuple[dict[str, list[str]], list[Panel]]) -> Figure:
    """Rows from the top in the order of the parts, which are set apart; the panels share them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, models = shown
    places = _places(found)
    bottom = max(places.values())
    made = Figure(figsize=(3.3 * len(models) + 1.2, ROW * (bottom + 1) + 1.3), layout="constrained")
    FigureCanvasAgg(made)
    grid: Any = made.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, models, strict=True):
        _draw(axes, panel, places)
    grid[0].set_yticks(list(places.values()), list(places), fontsize=8.5)
    grid[0].set_ylim(bottom + 0.8, -1.4)
    for title, names in found.items():
        if names:
            above: Any = {"transform": grid[0].get_yaxis_transform(), "fontsize": 8, "style": "italic", "color": "#555555"}
            grid[0].text(0.01, places[names[0]] - 0.75, title, **above)
    handles, labels = grid[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8.5)
    return made


def _places(found: dict[str, list[str]]) -> dict[str, float]:
    """Where each method's row is, counted from the top."""
    places, now = {}, 0.0
    for names in found.values():
        for name in names:
            places[name] = now
            now += 1
        now += GAP - 1 if names else 0
    return places


def _draw(axes: Axes, panel: Panel, places: dict[str, float]) -> None:
    number = panel.unpruned["numbers"][MEAN]
    axes.axvspan(100 * number["low"], 100 * number["high"], color="black", alpha=0.07, linewidth=0)
    axes.axvline(_score(panel.unpruned), color="black", linewidth=1, linestyle=(0, (5, 3)), label="unpruned")
    colours: dict[float | None, str] = {**dict(zip(panel.random, COLOURS, strict=True)), None: OWN_COLOUR}
    for budget, score in panel.random.items():
        axes.axvline(score, color=colours[budget], linewidth=1.1, alpha=0.75, zorder=1)
    for name, place in places.items():
        scores = [_score(row) for row in panel.rows[name].values()]
        axes.plot([min(scores, default=0), max(scores, default=0)], [place] * 2, color="#BBBBBB", linewidth=1.2, zorder=2)
    sizes = (*SIZES, SIZES[1])
    for (budget, colour), size in zip(colours.items(), sizes, strict=True):
        dots = [(_score(rows[budget]), places[name]) for name, rows in panel.rows.items() if budget in rows]
        label = "count by content" if budget is None else f"{100 * budget:.0f} % of the tokens"
        look: Any = {"color": colour, "markersize": size, "markeredgewidth": 0, "zorder": 3, "clip_on": False}
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", label=label, **look)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel("mean score over the kinds of question, %", fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _score(row: Summary) -> float:
    return 100 * row["numbers"][MEAN]["value"]
