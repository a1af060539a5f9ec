"""The commands ``vlprune eval`` and ``vlprune report``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vlprune.errors import VLPruneError
from vlprune.evals import progress
from vlprune.evals import settings as written
from vlprune.terminal import INTERRUPTED, AsJson, clear_errors, print_json

if TYPE_CHECKING:
    from vlprune.evals.batches import Task
    from vlprune.evals.report import Run

app = typer.Typer(
    help="Visual-token pruning for Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
CHANGES = 40
"""Samples of a benchmark on the page of changed answers."""


# ------------------------------------------------------------------ eval


@app.command("eval")
@clear_errors
def evaluate(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, with commas between; 'none' is the unpruned model, 'all' is it and every method, where possible. "
            "Options stand in brackets, budgets of a method's own behind colons: 'none,hired,fastv\\[layer=1]:0.8:0.6'.",
            show_default=written.METHODS,
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Fractions (0.2) or counts (64) of an image's visual tokens, for methods that name none.")
    ] = written.BUDGETS,
    benchmarks: Annotated[
        str, typer.Option(help="Benchmarks, with commas between, options in brackets; or paths of your own data.")
    ] = "synthvqa",
    model: Annotated[str, typer.Option(help="'tinyvlm', 'tinyvlm-qwen', or a model's hub id or folder.")] = "tinyvlm",
    limit: Annotated[
        int | None, typer.Option("--limit", "--samples", min=1, help="Questions of each benchmark; all by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; the benchmark's own by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rows, tables and pictures; by default one for each model in results/.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run left in the folder.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Answer batches with failed samples again.")] = False,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto': a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16'.")] = "auto",
    attention: Annotated[str | None, typer.Option(help="The model's attention: 'sdpa', 'eager', 'flash_attention_2'.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model of the hub.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")] = None,
) -> None:
    """Measures accuracy, time and memory of methods at budgets on benchmarks.

    Interrupted, it goes on where it was when it is started again. Several processes share the work:
    'accelerate launch --multi_gpu --num_processes 4 -m vlprune.evals eval ...', also on CPUs.

    Example: vlprune eval --methods none,hired,uniform --budgets 0.2 --limit 12
    """
    settings = _settings(methods, budgets, model)
    from vlprune.evals import loading, runner
    from vlprune.evals.processes import Processes

    chosen = loading.find_all(benchmarks, model)
    processes = Processes.join(device)
    console = Console(highlight=False, quiet=not processes.first)
    out = out or loading.folder(model)
    _use_threads(threads)
    console.print(f"Loading {escape(model)} and questions of {escape(', '.join(chosen))}.")
    loaded = loading.model(model, processes.device, dtype, attention, revision)
    tasks = loading.tasks(chosen, model, batch_size, limit, max_new_tokens)
    refused = {}
    if not written.names_each(methods):
        refused = runner.refusals(loaded.model, loaded.processor, tasks, settings)
        _print_refusals(console, refused)
        settings = [setting for setting in settings if setting not in refused]
    _print_plan(console, settings, tasks, out, processes)
    try:
        with progress.shown(console, len(settings) * sum(len(task.examples) for task in tasks)) as show:
            runner.run(
                loaded.model,
                loaded.processor,
                tasks,
                settings,
                out,
                batch_size=batch_size,
                name=loaded.name,
                command=_command(processes.count),
                refused=refused,
                restart=restart,
                retry_errors=retry_errors,
                processes=processes,
                progress=show,
            )
    except KeyboardInterrupt:
        _say_what_is_kept(console, out)
        raise typer.Exit(INTERRUPTED) from None
    if processes.first:
        _finish(console, out, tasks)
    processes.leave()


def _settings(methods: str | None, budgets: str, model: str) -> list[written.Setting]:
    settings = written.parse(written.METHODS if methods is None else methods, budgets, model)
    if not settings:
        raise VLPruneError("nothing to do: --methods and --budgets name no setting")
    for setting in settings:
        if setting.method != written.UNPRUNED:
            setting.make()
    return settings


def _use_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _command(processes: int) -> str:
    """How to go on with the run, or to repeat it elsewhere."""
    shared = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes), "-m", "vlprune.evals"]
    arguments = (argument for argument in sys.argv[1:] if argument != "--restart")
    return shlex.join([*(["vlprune"] if processes == 1 else shared), *arguments])


def _print_refusals(console: Console, refused: dict[Any, VLPruneError]) -> None:
    """Of settings that nobody named one by one, those that this model cannot have, by their reasons."""
    reasons: dict[str, list[str]] = {}
    for setting, error in refused.items():
        reasons.setdefault(" ".join(str(error).split()), []).append(setting.label)
    for reason, labels in reasons.items():
        console.print("[yellow]" + escape(f"Left out: {', '.join(labels)}: {reason}") + "[/yellow]")


def _print_plan(
    console: Console, settings: Sequence[written.Setting], tasks: Sequence[Task], out: Path, processes: Any
) -> None:
    samples = sum(len(task.examples) for task in tasks)
    shared = f", shared by {processes.count} processes" if processes.count > 1 else ""
    console.print(f"Plan: {len(settings)} settings x {samples} samples on {processes.device}{shared}, into {out}")
    by_method: dict[str, list[str]] = {}
    for setting in settings:
        by_method.setdefault(setting.method, []).append(str(setting.budget))
    width = max(map(len, [*by_method, *(task.key for task in tasks)]))
    for task in tasks:
        batches = f"{len(task.examples)} samples in {len(task.batches)} batches, {task.max_new_tokens} new tokens at most"
        console.print(f"  {escape(f'{task.key:<{width}}  {task.benchmark.version}: {batches}')}")
    for method, budgets in by_method.items():
        console.print(f"  {escape(f'{method:<{width}}')}  {', '.join(budgets)}")


def _say_what_is_kept(console: Console, out: Path) -> None:
    from vlprune.evals.journal import raw_rows

    console.print(f"\nInterrupted: {len(list(raw_rows(out)))} rows are kept in {out}. The same command goes on from there.")


def _finish(console: Console, out: Path, tasks: Sequence[Task]) -> None:
    from vlprune.evals.report import Run

    run = Run.read(out)
    console.print()
    _show(console, run, {task.key: {example.id: example for example in task.examples} for task in tasks}, CHANGES)
    console.print(f"Measured on {run.manifest['hardware']['device']}.")
    _print_staleness(console, run)


def _print_staleness(console: Console, run: Run) -> None:
    from vlprune.evals.provenance import git_commit

    commit = run.manifest["commit"]
    if commit and commit != git_commit():
        console.print(f"[yellow]Rows were begun at commit {commit}; --restart measures afresh.[/yellow]")


# ------------------------------------------------------------------ report


@app.command("report")
@clear_errors
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, as 'vlprune eval --out' made them.")],
    out: Annotated[
        Path, typer.Option(help="Folder for what several runs have in common: one table and one picture of all.")
    ] = Path("results/report"),
    changes: Annotated[
        int, typer.Option(min=0, help="Samples of each benchmark on the page of changed answers; 0: no page.")
    ] = CHANGES,
    as_json: AsJson = False,
) -> None:
    """Makes tables, pictures and the page of changed answers from the rows of runs, also of one that is not yet complete.

    They are written into the folder of each run; of several runs there is one more table (markdown and CSV) and picture.

    Example: vlprune report results/eval --json
    """
    from vlprune.evals import outputs
    from vlprune.evals.report import Run

    console = Console(highlight=False, quiet=as_json)
    runs = [Run.read(folder) for folder in folders]
    for run in runs:
        console.print(f"[bold]{escape(run.model)}[/bold] in {escape(str(run.out))}")
        _show(console, run, None, changes)
    if len(runs) > 1:
        for path in outputs.write_together(runs, out):
            console.print(f"  {path}")
    if as_json:
        print_json([run.to_dict(run.summaries()) for run in runs])


def _show(console: Console, run: Run, examples: Mapping[str, Mapping[str, Any]] | None, changes: int) -> None:
    """Prints the tables of a run and writes its files."""
    from vlprune.evals import outputs, tables

    summaries = run.summaries()
    for name, found in summaries.items():
        if len(summaries) > 1:
            console.print(f"[bold]{escape(name)}[/bold]")
        tables.print_table(found, console)
    tables.print_overview(summaries, console)
    _print_errors(console, run)
    for path in outputs.write(run, summaries, examples, changes):
        console.print(f"  {path}")


def _print_errors(console: Console, run: Run) -> None:
    failed = [row for rows in run.rows.values() for row in rows if row["error"]]
    if failed:
        first = f"{failed[0]['method']} {failed[0]['budget']}, {failed[0]['id']}: {failed[0]['error']}"
        console.print(f"[red]{len(failed)} samples failed and count as wrong; the first: {escape(first)}[/red]")
