"""Tables and a picture of ``vlprune bench vit``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.bench import tables, vit
from vlprune.bench.journal import Row
from vlprune.evals.plot import STYLES
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from rich.console import Console

PICTURE = "vit.png"
LEGEND = (
    "tokens: patches of an image that are left, as a mean over the blocks. Times are of the whole batch, medians over "
    "rounds (20th to 80th percentile). speed-up: unpatched by patched forward of the same round, ± half of the median's 95 % "
    "interval. arithmetic: the speed-up that the arithmetic which is left in the blocks would allow. choosing, merging: their "
    "part of the forward."
)


def columns() -> list[tables.Column]:
    return [
        ("method", tables.method_of),
        ("budget", tables.budget_of),
        ("tokens", tables.number("layer_mean", 0)),
        ("forward ms", tables.spread("forward_ms")),
        ("images/s", tables.number("images_per_s")),
        ("speed-up", tables.between("speedup", unit="x")),
        ("arithmetic", tables.number("arithmetic_speedup", 2, unit="x")),
        ("choosing, merging ms", tables.number("reduction_ms", 0)),
    ]


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what they were measured on and with; of rows that were measured again, the last."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        title = f"{row['model']}, {row['dtype']}, batch {row['batch']}, {row['device']}"
        found.setdefault(title, {})[vit.keys(row)] = row
    return {title: list(group.values()) for title, group in found.items()}


def show(rows: Sequence[Row], console: Console) -> None:
    tables.show_settings(grouped(rows), columns(), console, LEGEND)


def page(rows: Sequence[Row]) -> str:
    """Everything that was measured, with the hardware named."""
    parts = ["# Measured: speed of vision transformers\n\nHow it is measured: [speed](../speed.md). Weights are random."]
    parts += [
        f"## {title}\n\n{tables.provenance(group)}\n\n{tables.markdown(group, columns())}"
        for title, group in grouped(rows).items()
    ]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def overview(rows: Sequence[Row]) -> str:
    """For a page that tells more."""
    parts = [
        f"**Vision transformer, {title}**\n\n{tables.provenance(group)}\n\n{tables.markdown(group, columns())}\n"
        for title, group in grouped(rows).items()
    ]
    return "\n".join([*parts, "Picture and legend: [vision transformers](results/speed-vit.md).\n"])


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes ``vit.png``: speed-up against the share of token-layers, a panel for each model and machine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {
        title: [row for row in group if row["method"] != UNPRUNED and row.get("speedup")]
        for title, group in grouped(rows).items()
    }
    groups = {title: group for title, group in groups.items() if group}
    if not groups:
        return []
    figure = Figure(figsize=(5.5 * len(groups), 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(groups), squeeze=False)[0]
    for place, (title, group) in zip(axes, groups.items(), strict=True):
        _panel(place, title, group)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / PICTURE)
    return [out / PICTURE]


def _panel(axes: Any, title: str, group: Sequence[Row]) -> None:
    allowed = sorted({(row["layer_mean"] / row["tokens"], row["arithmetic_speedup"]) for row in group})
    axes.plot(*zip(*allowed, strict=True), color="black", linestyle=":", marker="_", label="arithmetic")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in group)):
        points = sorted((row for row in group if row["method"] == method), key=lambda row: row["layer_mean"])
        shares = [row["layer_mean"] / row["tokens"] for row in points]
        colour, marker = STYLES[number % len(STYLES)]
        low, value, high = ([row[f"speedup{end}"] for row in points] for end in ("_low", "", "_high"))
        axes.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(shares, value, color=colour, marker=marker, label=method)
    axes.axhline(1.0, color="black", linewidth=1.0, linestyle=(0, (5, 3)), label="unpatched")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("patches kept, mean over the blocks, share of all")
    axes.set_ylabel("times as fast as unpatched")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)
