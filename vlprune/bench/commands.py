"""The command ``vlprune bench``: ``kernels``, ``model``, ``vit``, ``serve``, ``plot``, ``report``, ``all``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vlprune.bench import METHODS, vit_names, written
from vlprune.errors import VLPruneError
from vlprune.evals import settings
from vlprune.terminal import clear_errors

app = typer.Typer(
    help="Measures speed: of operations, of models under methods and budgets.", no_args_is_help=True, add_completion=False
)

LIKE = "llava-next-small"
INTERVAL = 20.0
"""Seconds between two lines of progress where no terminal shows a status."""

Out = Annotated[
    Path | None, typer.Option(help="CSV file that rows are added to; by default one in benchmarks/results of the repository.")
]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto': a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")]
Resume = Annotated[bool, typer.Option("--resume", help="Leave out what the file has of this commit, machine and versions.")]
Dtype = Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16', or 'auto': bfloat16 on a GPU, else float32.")]


@app.command("kernels")
@clear_errors
def bench_kernels(
    operations: Annotated[str | None, typer.Option(help="Names, with commas between; all by default.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Names, with commas between; those of this device by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, fewer where they take long.")] = 50,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Also the reference by torch.compile; on a GPU by default.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    out: Out = None,
) -> None:
    """Operations against their references, a copy of as many bytes, and what the machine can do at best.

    Example: vlprune bench kernels --operations gather_rows --shapes tiny --rounds 2 --out kernels.csv
    """
    from vlprune.bench import jobs, journal, kernel_rows, report
    from vlprune.bench import kernels as cases

    console, where = Console(highlight=False), written.device(device, threads)
    default = cases.ON_GPU if where.type == "cuda" else cases.ON_CPU
    chosen = written.named(cases.CASES, operations, "--operations")
    sink = jobs.Sink(out or journal.default_path("kernels"), kernel_rows.COLUMNS, where, resume)
    of = written.named(cases.SHAPES, shapes or ",".join(default), "--shapes")
    also = where.type == "cuda" if compiled is None else compiled
    console.print(f"{len(chosen)} operations at {len(of)} shapes on {escape(_name(sink))}, into {sink.path}")
    jobs.kernels(chosen, of, sink, written.dtype(dtype, where), rounds, also, _say(console))
    report.print_kernels(sink.rows, console)


@app.command("model")
@clear_errors
def bench_model(
    model: Annotated[str | None, typer.Option(help="'tinyvlm', 'tinyvlm-qwen', or a model's hub id or folder.")] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Random weights, the size of a known model: llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b and others; "
            "llava-next-small has the same layers and visual tokens and is narrower and shallower.",
            show_default=LIKE,
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="With --like: full, small, tiny, or divisors of width and depth, as in 8x4.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="As for eval: with commas between, options in brackets, a method's own budgets behind colons.",
            show_default=METHODS,
        ),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Of methods that name none.")] = settings.BUDGETS,
    batch: Annotated[str, typer.Option(help="Prompts at a time; several sizes with commas between.")] = "1",
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2; several with commas between.")] = "sdpa",
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs, in turns with all others.")] = 15,
    warmup: Annotated[int, typer.Option(min=1, help="Runs of each before, which do not count.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded after each prefill.")] = 8,
    words: Annotated[int, typer.Option(min=2, help="Tokens of text in a prompt, with --like.")] = 64,
    image: Annotated[
        str | None, typer.Option(help="Height and width in pixels, as in 672x672; the model's own default.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="After so many, no new round of a batch size begins (from the fourth round on).")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    out: Out = None,
) -> None:
    """A model under methods and budgets: its parts, decoding, memory, next to the unpruned one and to the floor.

    Example: vlprune bench model --model tinyvlm --methods hired --budgets 0.2 --rounds 3 --out model.csv
    """
    from vlprune.bench import jobs, journal, report, suite
    from vlprune.bench import model as rows

    if model and like:
        raise VLPruneError("--model and --like: give one of them")
    console, where = Console(highlight=False), written.device(device, threads)
    sizes = written.counts(batch, "--batch")
    plan = jobs.Plan(
        suite.variants_of(methods or suite.methods(), budgets),
        written.parts(attention),
        sizes,
        rounds,
        warmup,
        new_tokens,
        words,
        written.pixels(image),
        minutes,
    )
    load, name = _loader(model, like, scale, where, written.dtype(dtype, where))
    sink = jobs.Sink(out or journal.default_path("model"), rows.COLUMNS, where, resume)
    console.print(f"{name}: {len(plan.variants)} variants in up to {rounds} rounds on {escape(_name(sink))}, into {sink.path}")
    jobs.models(load, name, plan, sink, _say(console))
    report.print_models(sink.rows, console)


@app.command("vit")
@clear_errors
def bench_vit(
    models: Annotated[str, typer.Option(help="vit-b/16, vit-l/14-336, tiny; several with commas between.")] = vit_names.MODELS,
    methods: Annotated[str, typer.Option(help="As for eval: with commas between, options in brackets.")] = vit_names.METHODS,
    budgets: Annotated[str, typer.Option(help="Shares of token-layers that are left.")] = vit_names.BUDGETS,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs, in turns with all others.")] = 10,
    minutes: Annotated[
        float | None, typer.Option(help="After so many, no new round of a model begins (from the fourth round on).")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    out: Out = None,
) -> None:
    """Vision transformers on their own, random weights, under methods that merge or drop in their blocks.

    Example: vlprune bench vit --models tiny --budgets 0.5 --rounds 2 --out vit.csv
    """
    from vlprune.bench import jobs, journal, suite, vit, vit_report

    console, where = Console(highlight=False), written.device(device, threads)
    sizes = written.named(vit.SIZES, models, "--models")
    plan = vit.VitPlan(suite.variants_of(methods, budgets), batch, rounds, minutes)
    sink = jobs.Sink(out or journal.default_path("vit"), vit.COLUMNS, where, resume)
    console.print(f"{len(sizes)} models, {len(plan.variants)} variants on {escape(_name(sink))}, into {sink.path}")
    for size in sizes:
        vit.measure(size, plan, sink, written.dtype(dtype, where), _say(console))
    vit_report.show(sink.rows, console)


@app.command("serve")
@clear_errors
def bench_serve(
    model: Annotated[str | None, typer.Option(help="A model's hub id or folder, as vLLM takes it.")] = None,
    like: Annotated[
        str | None,
        typer.Option(help="Random weights, the size of a LLaVA-NeXT: llava-next-7b and others.", show_default=LIKE),
    ] = None,
    scale: Annotated[str | None, typer.Option(help="With --like: full, small, tiny, or divisors of width and depth.")] = None,
    methods: Annotated[str, typer.Option(help="As for eval: with commas between, options in brackets.")] = "uniform,hired",
    budgets: Annotated[str, typer.Option(help="Of methods that name none.")] = "0.2",
    concurrency: Annotated[str, typer.Option(help="Requests under way at a time.")] = "1,2,4,8,16,32",
    requests: Annotated[int, typer.Option(min=1, help="At each concurrency, or twice the concurrency if that is more.")] = 8,
    image: Annotated[
        str | None, typer.Option(help="Height and width in pixels; the size's own, or 672x672 with --model.")
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="Tokens of text in a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    again: Annotated[bool, typer.Option(help="Serve unpruned once more at the end, to see how much times vary.")] = True,
    options: Annotated[str, typer.Option(help="Options for vLLM's servers, as they are written there.")] = "",
    logs: Annotated[Path | None, typer.Option(help="Folder for what the servers write.")] = None,
    resume: Resume = False,
    out: Out = None,
) -> None:
    """Servers of vLLM with and without pruning: time to first token and throughput by requests under way. Needs vLLM.

    Example: vlprune bench serve --like llava-next-tiny --concurrency 1,4 --out serving.csv
    """
    from tempfile import TemporaryDirectory

    from vlprune.bench import jobs, journal, load, serving, serving_report, sizes, suite

    if model and like:
        raise VLPruneError("--model and --like: give one of them")
    variants = serving.in_turn(suite.variants_of(methods, budgets), again)
    levels, size = written.counts(concurrency, "--concurrency"), None if model else sizes.size_of(like or LIKE, scale)
    pixels = written.pixels(image) or (size.image if size else sizes.SQUARE)
    console, where = Console(highlight=False), written.device("auto")
    sink = jobs.Sink(out or journal.default_path("serving"), serving.COLUMNS, where, resume)
    with TemporaryDirectory() as folder:
        given = model or str(Path(folder) / "model")
        plan = serving.ServingPlan(
            given, size.name if size else given, variants, levels, requests, pixels, words, new_tokens, shlex.split(options)
        )
        serving.version()
        if size:
            load.save(size, Path(given))
        console.print(f"{plan.name}: {len(variants)} servers on {escape(_name(sink))}, into {sink.path}")
        serving.measure(plan, sink, logs or Path(folder), console.print)
    serving_report.show(sink.rows, console)


@app.command("plot")
@clear_errors
def bench_plot(
    files: Annotated[
        list[Path] | None, typer.Argument(help="CSV files of 'vlprune bench model', or of 'vlprune bench vit'.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; by default that of the first file.")] = None,
) -> None:
    """Draws speed-up against budget with the floor's line, and the parts of each prefill stacked.

    Example: vlprune bench plot model.csv
    """
    from vlprune.bench import journal, publish

    files = files or [journal.default_path("model")]
    drawn = [path for draw, rows in publish.pictures(files) for path in draw(rows, out or files[0].parent)]
    if not drawn:
        raise VLPruneError(f"{', '.join(map(str, files))}: no rows to draw")
    for path in drawn:
        Console(highlight=False).print(f"  {path}")


@app.command("report")
@clear_errors
def bench_report(
    folder: Annotated[Path, typer.Argument(help="Folder with CSV files of all kinds.")] = Path("benchmarks/results"),
    docs: Annotated[Path, typer.Option(help="Folder of the documents.")] = Path("docs"),
) -> None:
    """Writes docs/results/speed.md, speed-kernels.md, speed-vit.md, serving.md and pictures from CSV files.

    Example: vlprune bench report . --docs pages
    """
    from vlprune.bench import publish

    for path in publish.publish(folder, docs):
        Console(highlight=False).print(f"  {path}")


@app.command("all")
@clear_errors
def bench_all(
    out: Annotated[Path, typer.Option(help="Folder for the CSV files and pictures.")] = Path("benchmarks/results"),
    only: Annotated[str, typer.Option(help="kernels, model, vit; several with commas between.")] = "kernels,model,vit",
    smoke: Annotated[bool, typer.Option("--smoke", help="The same with tiny sizes, to see that it runs.")] = False,
    device: Device = "auto",
    resume: Resume = False,
) -> None:
    """Everything that the documents show of this machine, in one call of at most 20 minutes on a GPU.

    Example: vlprune bench all --smoke --only model --out smoke
    """
    from vlprune.bench import suite

    where = written.device(device, None)
    suite.run(suite.plan(where, smoke), written.parts(only), out, resume, Console(highlight=False))


def _loader(model: str | None, like: str | None, scale: str | None, device: Any, dtype: Any) -> tuple[Callable[[], Any], str]:
    """What loads the model, and its name."""
    from vlprune.bench import load, sizes

    if model:
        return lambda: load.by_name(model, device, dtype), model
    size = sizes.size_of(like or LIKE, scale)
    return lambda: load.of_size(size, device, dtype), size.name


# ------------------------------------------------------------------ progress


def _name(sink: Any) -> str:
    return str(sink.common["device"])


def _say(console: Console) -> Callable[[str], None]:
    """Says what is being done: at most every so often, since there are many rounds."""
    said = time.monotonic() - INTERVAL

    def say(text: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= (2.0 if console.is_terminal else INTERVAL):
            said = now
            console.print(f"[dim]{escape(text)}[/dim]")

    return say
