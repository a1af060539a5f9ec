"""Accuracy and speed of methods for vision transformers with TinyViT; a row a setting, kept as it comes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlprune
from vlprune.config import read, shipped, trained
from vlprune.errors import BudgetError, UnsupportedMethodError
from vlprune.evals.provenance import git_commit, hardware, versions, weights_hash
from vlprune.evals.settings import TRAINED, UNPRUNED, Setting, parse, with_weights
from vlprune.evals.tinyvit import load_tinyvit, pixels, scenes
from vlprune.report import Report

MODEL = "tinyvit"
"""How names of heads and settings begin that come along for it."""
TIMED = 3
"""Batches that the unpruned model is timed on, too, right beside the pruned one."""

Row = dict[str, Any]


def default_methods() -> str:
    """All that are there, learned ones with heads for TinyViT alone, and calibrated settings; the unpruned model first."""
    usable = [name for name in vlprune.methods("vit") if name not in TRAINED or trained(MODEL, name)]
    calibrated = [name for name in shipped() if name.startswith(f"{MODEL}-")]
    found = [(read(name), name) for name in calibrated]
    return ",".join([UNPRUNED, *usable, *(f"{method.name}[config={name}]:{method.budget}" for method, name in found)])


@dataclass(frozen=True)
class Pictures:
    """``count`` pictures of the test split as batches of pixels and labels."""

    count: int
    batch_size: int = 50

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        shown = list(scenes.pictures("test", self.count))
        parts = [shown[first : first + self.batch_size] for first in range(0, self.count, self.batch_size)]
        return [
            (pixels([one.draw() for one in part]), torch.tensor([one.label for one in part], dtype=torch.int64))
            for part in parts
        ]


def method_of(setting: Setting) -> Any:
    """The method, with its heads for TinyViT where it has learned ones; None for the unpruned model."""
    if setting.method == UNPRUNED:
        return None
    known = vlprune.methods("vit")
    if setting.name not in known:
        raise UnsupportedMethodError(f"{setting.name!r} is no method for vision transformers; those: {', '.join(known)}")
    return Setting(with_weights(setting.method, MODEL), setting.budget).make()


def run(
    methods: str, budgets: str, count: int, out: Path, command: str, say: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """All rows of ``out/rows.jsonl``; those of the same weights and pictures that stand there are not measured again."""
    settings = parse(methods, budgets)
    for setting in settings:
        method_of(setting)  # what does not exist fails here, before anything is measured
    model = load_tinyvit()
    same = {"weights": weights_hash(model), "count": count}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = [row for row in known if all(row[name] == value for name, value in same.items())]
    done = {(row["method"], str(row["budget"])) for row in known}
    batches = Pictures(count).batches()
    rows = []
    about = {**hardware(torch.device("cpu")), "versions": versions(), "commit": git_commit(), "command": command}
    for setting in settings:
        if (setting.method, str(setting.budget)) in done:
            rows += [row for row in known if (row["method"], str(row["budget"])) == (setting.method, str(setting.budget))][:1]
            continue
        row = {"method": setting.method, "budget": setting.budget, **same, **measure(model, setting, batches), **about}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        say(row)
    return rows


@torch.inference_mode()
def measure(model: Any, setting: Setting, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
    """Accuracy, the share of token-layers that is left, images a second, and the speed-up beside the unpruned model."""
    right, share, taken, ratios = 0, 1.0, [], []
    try:
        method = method_of(setting)
        for number, (given, labels) in enumerate(batches):
            before = _timed(model, given)[1] if number < TIMED else None
            if method is not None:
                vlprune.apply(model, method)
            logits, seconds = _timed(model, given)
            if method is not None:
                report = vlprune.report(model)
                assert not isinstance(report, Report)
                share = report.layer_mean / report.total
                vlprune.remove(model)
            right += int((logits.argmax(-1) == labels).sum())
            taken.append(len(labels) / seconds)
            if before is not None:
                ratios.append(before / seconds)
    except BudgetError as error:
        vlprune.remove(model)
        return {"error": " ".join(str(error).split())}
    total = sum(len(labels) for _, labels in batches)
    accuracy = right / total
    return {
        "accuracy": accuracy,
        "half_width": 1.96 * (accuracy * (1 - accuracy) / total) ** 0.5,
        "share": share,
        "images_per_s": statistics.median(taken),
        "speedup": statistics.median(ratios),
    }


def _timed(model: Any, given: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    logits = model(pixel_values=given).logits
    return logits, time.perf_counter() - start


# ------------------------------------------------------------------ what is shown


def table(rows: Sequence[Row]) -> str:
    """In markdown, with where the rows are from."""
    first = rows[0]
    listed = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commits = " and ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    lines = [
        f"TinyViT, {first['count']} pictures of the test split; {first['device']}, {first['cores']} cores, {first['threads']} "
        f"threads; {listed}; commit {commits}; `{first['command']}`.",
        "",
        "| method | budget | token-layers | right | images/s | speed-up |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" not in row:
            budget = "–" if row["method"] == UNPRUNED else row["budget"]
            right = f"{100 * row['accuracy']:.1f} % ± {100 * row['half_width']:.1f}"
            lines.append(
                f"| {row['method']} | {budget} | {100 * row['share']:.1f} % | {right} | {row['images_per_s']:.0f} "
                f"| {row['speedup']:.2f}x |"
            )
    failed = [f"- {row['method']} {row['budget']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*lines, *(["", "Not possible:", "", *failed] if failed else [])]) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the share of token-layers that is left, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vlprune.evals.plot import GREY, STYLES

    figure = Figure(figsize=(7.5, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    measured = [row for row in rows if "error" not in row]
    pruned = [row for row in measured if row["method"] != UNPRUNED]
    for number, method in enumerate(dict.fromkeys(row["method"] for row in pruned)):
        points = sorted((row for row in pruned if row["method"] == method), key=lambda row: row["share"])
        colour, marker = STYLES[number % len(STYLES)]
        style = {"linestyle": ("-", "--", ":")[number // len(STYLES) % 3], "color": GREY if "patches" in method else colour}
        heights = [100 * row["accuracy"] for row in points]
        axes.plot([100 * row["share"] for row in points], heights, marker=marker, markersize=5, label=method, **style)
    for row in measured:
        if row["method"] == UNPRUNED:
            axes.axhline(100 * row["accuracy"], color="black", linewidth=1.0, linestyle=(0, (5, 3)), label="unpruned")
    axes.set_xlabel("token-layers left, % (patches behind each block's reduction, mean over the blocks)")
    axes.set_ylabel("largest shape named right, %")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path)
