"""The command ``vlprune calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vlprune.errors import VLPruneError
from vlprune.terminal import INTERRUPTED, clear_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vlprune.calibrate.search import Found

DIFFRATE, YOPO = "diffrate", "yopo"
TINYVIT = "tinyvit"
SYNTHVQA = "synthvqa[split=train]"
SAMPLES, ANSWER_TOKENS = 64, 8


@clear_errors
def calibrate(
    model: Annotated[
        str, typer.Argument(help="'tinyvlm', 'tinyvlm-qwen', or a hub id or folder; with diffrate an image classifier's.")
    ],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Your questions: a JSONL or parquet file with images, questions and answers, or a folder with one; by "
            "default SynthVQA's training split. With diffrate a folder of pictures, in folders named like classes if need be."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="What is calibrated: a method with knobs, yopo, or diffrate.")] = DIFFRATE,
    budget: Annotated[
        str, typer.Option(help="Share of visual tokens (0.2), or their count (64); with diffrate share of token-layers.")
    ] = "0.5",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try, those of earlier runs counted.")] = 60,
    samples: Annotated[int, typer.Option(min=1, help="Questions to try them on.")] = SAMPLES,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer to look at.")] = ANSWER_TOKENS,
    steps: Annotated[int, typer.Option(min=1, help="With diffrate: batches to learn from.")] = 300,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="With yopo: attention to visual tokens by that to others; heads below are inactive.")
    ] = 0.07,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of what is tried.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="JSON file of the settings, MODEL-METHOD.json by default; a run cut off goes on.")
    ] = None,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto': a GPU if there is one.")] = "auto",
) -> None:
    """Finds the settings of a method that change a model's answers least, at the same budget, on your own data.

    vlprune.apply(model, config=FILE) takes what it writes, at any time: it is the best so far.

    Example: vlprune calibrate tinyvlm --method hired --budget 0.2
    """
    from vlprune.evals.settings import budget_of

    share = budget_of(budget)
    out = out or Path(f"{Path(model).name}-{method}.json")
    console = Console(highlight=False)
    if method == DIFFRATE:
        _learn(console, model, data, float(share), steps, batch_size, out, device)
        return
    from vlprune.calibrate import search

    if method != YOPO:
        search.check(method, share)
    console.print(f"Loading {escape(model)} and questions.")
    loaded, batches, notes = _asked(model, data, samples, answer_tokens, batch_size, device)
    if method == YOPO:
        _count_heads(console, loaded, batches, share, threshold, out, notes)
        return
    console.print(f"{notes['samples']} questions of {escape(notes['data'])}: first the answers of the model as it is.")
    try:
        found = search.knobs(
            loaded,
            batches,
            method,
            out,
            budget=share,
            trials=trials,
            answer_tokens=answer_tokens,
            seed=seed,
            notes=notes,
            progress=lambda found: console.print(f"[dim]trial {found.trials} of {trials}: {_compared(found)}[/dim]"),
        )
    except KeyboardInterrupt:
        kept = f"{out} has the best so far" if out.exists() else "nothing was found yet"
        console.print(f"\nInterrupted: {escape(kept)}. The same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None
    _conclude(console, found, out)


# ------------------------------------------------------------------ knobs of methods for vision-language models


def _asked(
    model: str, data: Path | None, samples: int, answer_tokens: int, batch_size: int, device: str
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The model, its inputs for batches of questions, and what there is to tell of both."""
    from vlprune.evals import loading
    from vlprune.evals.answering import make_inputs
    from vlprune.evals.processes import Processes

    chosen = loading.find_all(str(data) if data else SYNTHVQA, model)
    (task,) = loading.tasks(chosen, model, batch_size, samples, answer_tokens)
    loaded = loading.model(model, Processes.join(device).device)
    batches = [make_inputs(loaded.model, loaded.processor, batch) for batch in task.batches]
    return loaded.model, batches, {"model": loaded.name, "data": task.benchmark.version, "samples": len(task.examples)}


def _conclude(console: Console, found: Found, out: Path) -> None:
    if found.loss == found.default:
        console.print(f"None of {found.trials} trials is better than the defaults, which {escape(str(out))} has now.")
    console.print(f"{escape(str(found.method))}: {_compared(found)}; written to {escape(str(out))}")


def _compared(found: Found) -> str:
    return f"states are {found.loss:.4f} apart (1 - cosine), {found.default:.4f} with the defaults"


def _count_heads(
    console: Console, model: Any, batches: list[Any], budget: float | int, threshold: float, out: Path, notes: dict[str, Any]
) -> None:
    from vlprune.calibrate.yopo import yopo

    found = yopo(model, batches, out, budget=budget, threshold=threshold, notes=notes)
    for layer, heads in found.inactive_heads().items():
        console.print(f"layer {layer}: heads {' '.join(map(str, heads))}")
    console.print(f"{len(found.heads)} heads of keys are inactive for images; written to {escape(str(out))}")


# ------------------------------------------------------------------ DiffRate, for image classifiers


def _learn(
    console: Console, model: str, images: Path | None, budget: float, steps: int, batch_size: int, out: Path, device: str
) -> None:
    from vlprune.calibrate.diffrate import diffrate

    loaded, batches = _classifier(model, images, batch_size, device)

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


def _classifier(model: str, images: Path | None, batch_size: int, device: str) -> tuple[Any, Iterable[Any]]:
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
