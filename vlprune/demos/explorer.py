"""Accuracy against budget of all methods, from measured results, as a drawing whose points tell what they are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlprune.evals.plot import BASELINES, GREY
from vlprune.evals.settings import UNPRUNED

RESULTS = Path(__file__).parent / "results"
"""In the repository a link to ``docs/results``, in a wheel a copy of it."""
AXES = {
    "tokens": ("layer_tokens", "visual tokens, mean over the LLM's layers"),
    "time": ("prefill_ms", "prefill of a sample, ms"),
}
WIDTH, HEIGHT = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 20, 56
"""Room around the chart, for its axes and the names of lines."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3AA0D8", "#7B4FB5", "#A63D40", "#4C7A34", "#1F7A8C")
LABEL = 15
"""Pixels between the names of two lines, at least."""

Setting = dict[str, Any]


def results() -> dict[str, dict[str, Any]]:
    """Summaries of runs, by the name of their model."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("summary*.json"))]
    return {summary["run"]["model"]["name"]: summary for summary in sorted(found, key=lambda one: one["run"]["model"]["name"])}


def numbers(summary: dict[str, Any]) -> list[str]:
    """What was scored: the headline, other means, and single kinds of question."""
    (benchmark,) = list(summary["benchmarks"].values())[:1]
    first = benchmark["settings"][0]
    return [*first["numbers"], *first["categories"]]


def told(summary: dict[str, Any]) -> str:
    """On what the numbers were measured."""
    (benchmark,) = list(summary["benchmarks"].values())[:1]
    hardware = summary["run"]["hardware"]
    where = f"{hardware['device']}, {hardware['cores']} cores"
    return f"{benchmark['version']}, {benchmark['samples']} questions, measured on {where}"


def chart(summary: dict[str, Any], number: str, against: str = "tokens") -> str:
    """An SVG: a line for each method, a dashed one for the unpruned model; each point names itself under the cursor."""
    (benchmark,) = list(summary["benchmarks"].values())[:1]
    cost, axis = AXES[against]
    settings = [one for one in benchmark["settings"] if one[cost] and _score(one, number)]
    if not settings:
        return "<p class='vp-note'>These results have no such number.</p>"
    scale = _Scale([_cost(one, cost) for one in settings], [_score(one, number)["value"] for one in settings])
    methods = dict.fromkeys(one["method"] for one in settings if one["method"] != UNPRUNED)
    lines = {method: [one for one in settings if one["method"] == method] for method in methods}
    colours = {m: COLOURS[n % len(COLOURS)] for n, m in enumerate(m for m in methods if m not in BASELINES)}
    parts = [_axes(scale, axis, number)]
    parts += [_unpruned(one, number, scale) for one in settings if one["method"] == UNPRUNED][:1]
    labels = _spread({m: scale.y(_score(max(s, key=lambda one: _cost(one, cost)), number)["value"]) for m, s in lines.items()})
    for method, points in lines.items():
        points.sort(key=lambda one: _cost(one, cost))
        parts.append(_line(method, points, number, cost, scale, colours.get(method, GREY), labels[method]))
    return (
        f"<div class='vp-chart'><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{escape(number)} against {escape(axis)}'>{''.join(parts)}</svg></div>"
        f"<p class='vp-note'>{escape(told(summary))}. Point at a line or a dot. Grey: baselines that look at nothing. "
        "SnapKV prunes the cache alone, so its points lie at the tokens left there.</p>"
    )


def _score(setting: Setting, number: str) -> Any:
    return {**setting["categories"], **setting["numbers"]}.get(number)


def _cost(setting: Setting, cost: str) -> float:
    """Where all tokens go through all layers and only the cache holds fewer, those in the cache."""
    only_cache = cost == "layer_tokens" and setting["layer_tokens"] == setting["visual_tokens"]
    return setting["cached_tokens"] if only_cache else setting[cost]


class _Scale:
    """From costs (on a logarithmic axis) and scores to pixels."""

    def __init__(self, costs: Sequence[float], scores: Sequence[float]):
        self.low, self.high = math.log2(min(costs)) - 0.1, math.log2(max(costs)) + 0.1
        self.bottom = math.floor(min(scores) * 10) / 10
        self.top = max(math.ceil(max(scores) * 10) / 10, self.bottom + 0.1)

    def x(self, cost: float) -> float:
        return LEFT + (math.log2(cost) - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, score: float) -> float:
        return TOP + (self.top - score) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        return [2.0**n for n in range(math.ceil(self.low), math.floor(self.high) + 1)]


def _axes(scale: _Scale, axis: str, number: str) -> str:
    parts = []
    steps = round((scale.top - scale.bottom) * 10)
    for n in range(steps + 1):
        score = scale.bottom + n / 10
        y = scale.y(score)
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{score * 100:.0f} %</text>")
    for tick in scale.ticks():
        parts.append(f"<text x='{scale.x(tick):.1f}' y='{HEIGHT - BOTTOM + 20}' text-anchor='middle'>{tick:.0f}</text>")
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f"<text class='axis' x='{middle}' y='{HEIGHT - 12}' text-anchor='middle'>{escape(axis)}</text>")
    parts.append(f"<text class='axis' x='{LEFT}' y='12'>{escape(number)}</text>")
    return "".join(parts)


def _unpruned(setting: Setting, number: str, scale: _Scale) -> str:
    value = _score(setting, number)["value"]
    y = scale.y(value)
    return (
        f"<g class='line'><line class='unpruned' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text class='name' x='{LEFT + 6}' y='{y - 6:.1f}'>unpruned, {value:.1%}</text></g>"
    )


def _line(method: str, points: list[Setting], number: str, cost: str, scale: _Scale, colour: str, label: float) -> str:
    places = [(scale.x(_cost(one, cost)), scale.y(_score(one, number)["value"])) for one in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    thin = "thin" if method in BASELINES else ""
    parts = [f"<g class='line {thin}' style='--line: {colour}' tabindex='0'><polyline points='{path}'/>"]
    end, name = places[-1], WIDTH - RIGHT + 14
    parts.append(f"<path class='leader' d='M{end[0]:.1f},{end[1]:.1f} L{name - 4},{label:.1f}'/>")
    parts.append(f"<text class='name' x='{name}' y='{label + 4:.1f}'>{escape(method)}</text>")
    parts += [_point(method, one, number, x, y) for one, (x, y) in zip(points, places, strict=True)]
    return "".join([*parts, "</g>"])


def _point(method: str, setting: Setting, number: str, x: float, y: float) -> str:
    """A dot with what is shown where the cursor is on it."""
    score = _score(setting, number)
    half = 100 * (score["high"] - score["low"]) / 2
    lines = [
        f"{method}, budget {setting['budget']:g}",
        f"{number}: {score['value']:.1%} ± {half:.1f}",
        f"{setting['layer_tokens']:.0f} of {setting['visual_tokens']:.0f} tokens, {setting['cached_tokens']:.0f} in the cache",
        f"prefill {setting['prefill_ms']:.1f} ms, {setting['speedup']:.2f}x",
    ]
    width = 8 + 7.2 * max(map(len, lines))
    left, top = min(max(x - width / 2, 2), WIDTH - width - 2), y + 12 if y < HEIGHT / 2 else y - 92
    texts = "".join(f"<tspan x='{left + 8:.1f}' dy='17'>{escape(line)}</tspan>" for line in lines)
    return (
        f"<g class='point' tabindex='0'><circle class='hit' cx='{x:.1f}' cy='{y:.1f}' r='11'/>"
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5'/><g class='tip'>"
        f"<rect x='{left:.1f}' y='{top:.1f}' width='{width:.0f}' height='80' rx='6'/>"
        f"<text y='{top + 4:.1f}'>{texts}</text></g></g>"
    )


def _spread(wanted: dict[str, float]) -> dict[str, float]:
    """Heights of names, as near to the wanted ones as they go without touching."""
    placed: dict[str, float] = {}
    last = -math.inf
    for method, y in sorted(wanted.items(), key=lambda item: item[1]):
        last = placed[method] = max(y, last + LABEL)
    over = last - (HEIGHT - BOTTOM)
    for method in reversed(list(placed)):
        if over <= 0:
            break
        placed[method] -= over
        following = list(placed)
        index = following.index(method)
        over = placed[following[index - 1]] + LABEL - placed[method] if index else 0
    return placed
