"""The command ``vlprune eval-vit``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlprune.terminal import clear_errors


@clear_errors
def evaluate(
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, with commas between, options in brackets; 'none' is the unpruned model. All by default."),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Shares of token-layers that are left.")] = "0.5,0.35,0.25,0.15",
    samples: Annotated[int, typer.Option(min=1, help="Pictures of the test split.")] = 600,
    out: Annotated[
        Path, typer.Option(help="Folder for rows, table and picture; a run that was cut off goes on there.")
    ] = Path("results/eval-tinyvit"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")] = None,
) -> None:
    """Measures methods for vision transformers with TinyViT, on the CPU: accuracy and speed at budgets.

    Example: vlprune eval-vit --methods none,tome --budgets 0.25 --samples 10 --out tinyvit
    """
    import torch

    from vlprune.evals.tinyvit import evaluate as runner

    if threads:
        torch.set_num_threads(threads)
    console = Console(highlight=False)

    def say(row: dict[str, Any]) -> None:
        told = row.get("error") or f"{row['accuracy']:.1%} right, {row['share']:.1%} of token-layers, {row['speedup']:.2f}x"
        console.print(f"{row['method']} {row['budget']}: {told}", markup=False)

    command = shlex.join(["vlprune", *sys.argv[1:]])
    rows = runner.run(methods or runner.default_methods(), budgets, samples, out, command, say)
    (out / "table.md").write_text(runner.table(rows))
    runner.draw(rows, out / "accuracy.png")
    console.print(f"{len(rows)} rows: {out / 'table.md'}, {out / 'accuracy.png'}", markup=False)
