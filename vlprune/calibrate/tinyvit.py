"""Makes what comes along for TinyViT: heads of learned methods, and DiffRate's counts, learned on pictures of the train split.

Usage: ``python -m vlprune.calibrate.tinyvit``
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

import vlprune
from vlprune import calibrate, training
from vlprune.calibrate.images import SynthVQA
from vlprune.config import FOLDER
from vlprune.evals.tinyvit import load_tinyvit
from vlprune.method import Method
from vlprune.training.objectives import HEADS

BUDGET = 0.5
"""What heads are trained for; their scores rank all rows, so other budgets can be given afterwards."""
COUNTS = {0.5: "tinyvit-diffrate", 0.35: "tinyvit-diffrate-0.35"}
"""Names of DiffRate's counts, which belong to one budget each."""
JUDGED = SynthVQA(count=480, first=8_000_000)
"""Pictures on which counts that were learned are compared with those that follow from the budget."""


def make_heads(method: str, folder: Path, steps: int) -> Path:
    """Trained in float32, kept in float16."""
    path = folder / f"tinyvit-{method}.safetensors"
    training.fit(load_tinyvit(), method, SynthVQA(), path, steps=steps, budget=BUDGET, progress=_told(method, steps))
    HEADS[method].load(path).half().save(path)
    return path


def make_counts(budget: float, folder: Path, steps: int) -> Path:
    model, path, default = load_tinyvit(), folder / f"{COUNTS[budget]}.json", vlprune.DiffRate(budget=budget)
    found = calibrate.diffrate(model, SynthVQA(), path, budget=budget, steps=steps, progress=_told(path.stem, steps))
    told = {
        "method": found.name,
        "budget": budget,
        "model": "TinyViT",
        "data": f"TinyViT's pictures, train, {steps} batches of 16",
        "samples": JUDGED.count,
        "loss": loss(model, found, JUDGED),
        "loss of the defaults": loss(model, default, JUDGED),
    }
    path.write_text(json.dumps({"settings": found.to_dict(), "calibrated": told}, indent=2) + "\n")
    return path


@torch.no_grad()
def loss(model: Any, method: Method, batches: Iterable[Any]) -> float:
    """Mean cross-entropy of the labels."""
    with vlprune.applied(model, method):
        found = [functional.cross_entropy(model(pixels).logits, labels) for pixels, labels in batches]
    return torch.stack(found).mean().item()


def _told(name: str, steps: int) -> Any:
    def progress(step: int, statistics: dict[str, float]) -> None:
        if step % 20 == 0 or step == steps:
            told = ", ".join(f"{what} {value:.3f}" for what, value in statistics.items())
            typer.echo(f"{name}, step {step} of {steps}: {told}")

    return progress


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is made; one that was cut off goes on there.")] = FOLDER,
    methods: Annotated[str, typer.Option(help="Which, with commas between.")] = ",".join([*sorted(HEADS), "diffrate"]),
    steps: Annotated[int, typer.Option(help="Batches of 16 pictures for each.")] = 200,
) -> None:
    """Train heads and counts for TinyViT."""
    for method in methods.split(","):
        if method != "diffrate":
            typer.echo(make_heads(method, out, steps))
            continue
        for budget in COUNTS:
            typer.echo(make_counts(budget, out, steps))


if __name__ == "__main__":
    typer.run(main)
