"""What the command line does: ``vlprune eval``, ``vlprune methods``, ``vlprune models``."""

from __future__ import annotations

import functools
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlprune.errors import VLPruneError
from vlprune.evals import settings as written
from vlprune.evals import tinyvlm

app = typer.Typer(
    help="Visual-token pruning for Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
TINYVLM = "tinyvlm"
PLAIN_INTERVAL = 20.0
"""Seconds between two lines of progress where no terminal shows a bar."""
BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes."""
P = ParamSpec("P")


@app.callback()
def _options() -> None:
    """Makes ``eval`` a sub-command even where it is the only one."""


def clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that vlprune raises on purpose become one red line and exit code 2; Ctrl-C exits with 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except VLPruneError as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(
                f"[red]vlprune: {escape(' '.join(str(error).split()))}[/red]"
            )
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


# ------------------------------------------------------------------ eval


@app.command("eval")
@clear_errors
def evaluate(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, with commas between; 'none' is the unpruned model. Options stand in brackets, budgets of a "
            "method's own behind colons: 'none,hired,fastv[layer=1]:0.8:0.6'.",
            show_default=written.METHODS,
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Fractions (0.2) or counts (64) of an image's visual tokens, for methods that name none.")
    ] = written.BUDGETS,
    samples: Annotated[int, typer.Option(min=1, help="Questions of the SynthVQA test split.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for rows, summary, table and picture; by default one for each model in results/."),
    ] = None,
    model: Annotated[str, typer.Option(help="'tinyvlm', 'tinyvlm-qwen', or a model's hub id or folder.")] = TINYVLM,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run left in the folder.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")] = None,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto': a GPU if there is one.")] = "auto",
) -> None:
    """Measures accuracy, time and memory of methods at budgets on SynthVQA.

    Interrupted, it goes on where it was when it is started again.
    """
    console = Console(highlight=False)
    out = out or _folder(model)
    settings = _settings(methods, budgets)
    console.print(f"Loading {model} and drawing {samples} questions.")
    loaded, processor, instruction = _load(model, device, threads)
    from vlprune.evals import runner, synthvqa

    examples = list(synthvqa.examples("test", samples))
    if methods is None:
        refused = runner.refusals(loaded, processor, examples, settings)
        _print_refusals(console, refused)
        settings = [setting for setting in settings if setting not in refused]
    _print_plan(console, settings, samples, out, loaded.device)
    try:
        with _progress(console, len(settings) * samples) as progress:
            rows = runner.run(
                loaded,
                processor,
                examples,
                settings,
                out,
                batch_size=batch_size,
                max_new_tokens=8 if model in tinyvlm.NAMES else 16,
                instruction=instruction,
                name=tinyvlm.NAMES.get(model, model),
                command=_command(),
                restart=restart,
                progress=progress,
            )
    except KeyboardInterrupt:
        _say_what_is_kept(console, out)
        raise typer.Exit(INTERRUPTED) from None
    _finish(console, rows, out)


def _settings(methods: str | None, budgets: str) -> list[written.Setting]:
    settings = written.parse(written.METHODS if methods is None else methods, budgets)
    if not settings:
        raise VLPruneError("nothing to do: --methods and --budgets name no setting")
    for setting in settings:
        if setting.method != written.UNPRUNED:
            setting.make()
    return settings


def _folder(model: str) -> Path:
    """Where results of a model go, those of other models apart from TinyVLM's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name)
    return Path("results/eval") if model == TINYVLM else Path(f"results/eval-{name}")


def _load(model: str, device: str, threads: int | None) -> tuple[Any, Any, str]:
    """Model, processor, and what is appended to each question so that answers come out short."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if model in tinyvlm.NAMES:
        logging.disable_progress_bar()
        loaded, processor = tinyvlm.load(model)
        return loaded.to(device), processor, ""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlprune.evals.runner import SHORT_ANSWER

    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto" if device != "cpu" else torch.float32)
        return loaded.to(device).eval(), AutoProcessor.from_pretrained(model), SHORT_ANSWER
    except (OSError, ValueError) as error:
        raise VLPruneError(f"cannot load {model!r}: {error}") from error


def _command() -> str:
    return shlex.join(["vlprune", *(argument for argument in sys.argv[1:] if argument != "--restart")])


def _print_refusals(console: Console, refused: dict[Any, VLPruneError]) -> None:
    """Of the default settings, those that this model cannot have; settings with the same reason in one line."""
    reasons: dict[str, list[str]] = {}
    for setting, error in refused.items():
        reasons.setdefault(" ".join(str(error).split()), []).append(setting.label)
    for reason, labels in reasons.items():
        console.print("[yellow]" + escape(f"Left out: {', '.join(labels)}: {reason}") + "[/yellow]")


def _print_plan(console: Console, settings: list[written.Setting], samples: int, out: Path, device: Any) -> None:
    by_method: dict[str, list[str]] = {}
    for setting in settings:
        by_method.setdefault(setting.method, []).append(str(setting.budget))
    console.print(f"Plan: {len(settings)} settings x {samples} samples on {device}, into {out}")
    width = max(map(len, by_method))
    for method, budgets in by_method.items():
        console.print(f"  {escape(f'{method:<{width}}')}  {', '.join(budgets)}")


def _say_what_is_kept(console: Console, out: Path) -> None:
    from vlprune.evals.runner import ROWS, read_rows

    kept = len(read_rows(out)) if (out / ROWS).exists() else 0
    console.print(f"\nInterrupted: {kept} rows are kept in {out / ROWS}. The same command goes on from there.")


def _finish(console: Console, rows: list[Any], out: Path) -> None:
    from vlprune.evals import plot, report, runner

    manifest = runner.read_manifest(out)
    summaries = report.summarise(rows)
    hardware = manifest["hardware"]["device"]
    paths = report.write(summaries, manifest, out)
    model, data = manifest["model"], manifest["data"]
    subtitle = f"{model['name']} on {data['name']}, {data['samples']} samples, bands: 95 % intervals"
    picture = plot.draw(summaries, out, subtitle)
    console.print()
    report.print_table(summaries, console)
    console.print(f"Measured on {hardware}.")
    _print_errors(console, rows)
    _print_staleness(console, manifest)
    for path in (out / runner.ROWS, *paths, picture):
        console.print(f"  {path}")


def _print_errors(console: Console, rows: list[Any]) -> None:
    failed = [row for row in rows if row["error"]]
    if failed:
        first = f"{failed[0]['method']} {failed[0]['budget']}, {failed[0]['id']}: {failed[0]['error']}"
        console.print(f"[red]{len(failed)} samples failed and count as wrong; the first: {escape(first)}[/red]")


def _print_staleness(console: Console, manifest: dict[str, Any]) -> None:
    from vlprune.evals.runner import git_commit

    if manifest["commit"] and manifest["commit"] != git_commit():
        console.print(f"[yellow]Rows were begun at commit {manifest['commit']}; --restart measures afresh.[/yellow]")


# ------------------------------------------------------------------ progress


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Any], None]]:
    """A bar with the remaining time, or a plain line every so often where no terminal would show it."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    columns = (
        bars.TextColumn("{task.description:<14}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda state: bar.update(task, completed=state.done, description=escape(state.setting.label))


class PlainProgress:
    """Prints a line every :data:`PLAIN_INTERVAL` seconds and at the end."""

    def __init__(self, console: Console):
        self.console = console
        self.started = self.said = time.monotonic()

    def __call__(self, state: Any) -> None:
        now = time.monotonic()
        if now - self.said < PLAIN_INTERVAL and state.done < state.total:
            return
        self.said = now
        left = (state.total - state.done) * (now - self.started) / max(1, state.done - state.resumed)
        self.console.print(
            f"{state.done}/{state.total} samples, {escape(state.setting.label)}, about {_minutes(left)} left", highlight=False
        )


def _minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


# ------------------------------------------------------------------ methods, models


@app.command("methods")
@clear_errors
def list_methods() -> None:
    """Lists the methods that are registered."""
    import vlprune

    table = Table("name", "summary", "stages", "count", "paper")
    for name, cls in vlprune.methods().items():
        method = cls()
        summary = (method.__doc__ or "").strip().partition("\n")[0].replace("``", "")
        count = "depends on content" if method.adaptive else "known"
        table.add_row(name, escape(summary), ", ".join(method.stages), count, escape(str(method.paper or "–")))
    Console(highlight=False).print(table)


@app.command("models")
@clear_errors
def list_models() -> None:
    """Lists the families of models that can be pruned."""
    import vlprune

    table = Table("family", "model types", "stages", "tested with transformers")
    for family in vlprune.supported_models():
        table.add_row(family.name, ", ".join(family.model_types), ", ".join(family.stages), ", ".join(family.tested) or "–")
    Console(highlight=False).print(table)
