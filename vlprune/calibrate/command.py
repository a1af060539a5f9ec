"""The command ``vlprune calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vlprune.errors import UnsupportedMethodError, VLPruneError
from vlprune.terminal import clear_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

METHODS = ("diffrate",)
TINYVIT = "tinyvit"


@clear_errors
def calibrate(
    model: Annotated[str, typer.Argument(help="'tinyvit', or an image classifier's hub id or folder.")],
    images: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of pictures; where their folders bear the names of the model's classes, those are their labels. "
            "For tinyvit by default pictures of its own."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"What is calibrated: {', '.join(METHODS)}.")] = "diffrate",
    budget: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of token-layers to be left.")] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Batches to learn from.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    out: Annotated[Path, typer.Option(help="JSON file of the method's settings; a run that was cut off goes on.")] = Path(
        "diffrate.json"
    ),
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto': a GPU if there is one.")] = "auto",
) -> None:
    """Finds a method's settings for a model on your own pictures; vlprune.from_dict reads what it writes.

    Example: vlprune calibrate google/vit-base-patch16-224 photos/ --budget 0.5
    """
    if method not in METHODS:
        raise UnsupportedMethodError(f"{method!r} has nothing to calibrate; those that do: {', '.join(METHODS)}")
    from vlprune.calibrate.diffrate import diffrate

    console = Console(highlight=False)
    loaded, batches = _loaded(model, images, batch_size, device)

    def say(step: int, statistics: dict[str, float]) -> None:
        if step == 1 or step % 10 == 0 or step == steps:
            told = ", ".join(f"{name} {value:.3f}" for name, value in statistics.items())
            console.print(f"[dim]step {step} of {steps}: {escape(told)}[/dim]")

    found = diffrate(loaded, batches, out, budget=budget, steps=steps, progress=say)
    assert found.kept is not None
    assert found.merged is not None
    console.print(f"rows behind dropping: {' '.join(map(str, found.kept))}")
    console.print(f"rows behind merging:  {' '.join(map(str, found.merged))}")
    console.print(f"written to {escape(str(out))}")


def _loaded(model: str, images: Path | None, batch_size: int, device: str) -> tuple[Any, Iterable[Any]]:
    """The model, and batches for it."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from vlprune.calibrate.images import Folder, SynthVQA

    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if images is not None and not images.is_dir():
        raise VLPruneError(f"{images} is no folder")
    if model == TINYVIT:
        from vlprune.evals import tinyvit

        loaded: Any = tinyvit.load_tinyvit()
        folder = str(tinyvit.CHECKPOINT)
        if images is None:
            return loaded.to(place), SynthVQA(batch_size=batch_size)
    else:
        if images is None:
            raise VLPruneError(f"calibrating {model} needs a folder of pictures: vlprune calibrate {model} photos/")
        folder = model
        try:
            loaded = AutoModelForImageClassification.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise VLPruneError(f"cannot load {model!r} as an image classifier: {error}") from error
    processor = AutoImageProcessor.from_pretrained(folder)
    labels = {str(name): int(number) for number, name in (loaded.config.id2label or {}).items()}
    return loaded.to(place).eval(), Folder(images, processor, labels, batch_size)
