"""``vlprune demo`` and ``vlprune explain``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vlprune.errors import VLPruneError
from vlprune.terminal import AsJson, clear_errors, print_json

LONGEST_ANSWER = 64
"""New tokens of an answer by models other than TinyVLM."""

Model = Annotated[str, typer.Option(help="'tinyvlm', 'tinyvlm-qwen', or a model's hub id or folder.")]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto': a GPU if there is one.")]


@clear_errors
def demo(
    model: Model = "tinyvlm",
    host: Annotated[str, typer.Option(help="Address to serve on; others than this machine reach '0.0.0.0'.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")] = None,
    device: Device = "auto",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """A local page that shows, for an image and a question, what methods keep and what that saves.

    Example: vlprune demo
    """
    if importlib.util.find_spec("gradio") is None:
        raise VLPruneError('the demo needs gradio: pip install "vlprune[demo]"')
    console = Console(highlight=False)
    console.print(f"Loading {escape(model)}.")
    answerer = _answerer(model, device)
    from vlprune.demos.app import build, launch
    from vlprune.demos.examples import samples

    answerer.warm_up(samples()[0].image)
    try:
        _, url, _ = launch(build(answerer), host, port, prevent_thread_lock=True, quiet=True, inbrowser=open_browser)
    except OSError as error:
        raise VLPruneError(f"cannot serve on {host}: {error}; name another port with --port") from error
    console.print(f"The demo is at [bold]{escape(str(url))}[/bold]. Ctrl-C ends it.")
    _wait()


def _wait() -> None:
    """Until Ctrl-C."""
    import threading

    threading.Event().wait()


@clear_errors
def explain(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    method: Annotated[str, typer.Option(help="A method, see 'vlprune methods'.")] = "hired",
    budget: Annotated[str, typer.Option(help="A fraction (0.2) or a count (64) of visual tokens.")] = "0.4",
    model: Model = "tinyvlm",
    out: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("explain.png"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answers with and without a method, prints the report, and saves a picture of what each stage keeps.

    Example: vlprune explain docs/images/form.png "What is the total?" --method hired --budget 0.3
    """
    from vlprune.demos import requests
    from vlprune.demos.answers import Question
    from vlprune.demos.compare import pictures
    from vlprune.evals.settings import Setting, budget_of

    if not image.is_file():
        raise VLPruneError(f"there is no file {image}")
    chosen = Setting(method, budget_of(budget)).make()
    asked = Question(requests.image(str(image)), requests.question(question))
    answerer = _answerer(model, device)
    full, pruned = answerer.answer(asked, None), answerer.answer(asked, chosen)
    report: Any = pruned.report
    _save(pictures(answerer.loaded.processor, asked.image, pruned), out)
    if as_json:
        answers = {"question": asked.question, "unpruned": full.text, "pruned": pruned.text}
        times = {"unpruned": full.costs["prefill_ms"], "pruned": pruned.costs["prefill_ms"]}
        print_json({"model": answerer.loaded.name, **answers, "prefill_ms": times, "picture": str(out), **report.to_dict()})
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"unpruned: [bold]{escape(full.text)}[/bold]\npruned:   [bold]{escape(pruned.text)}[/bold]\n")
    console.print(escape(str(report)))
    before, after = full.costs["prefill_ms"], pruned.costs["prefill_ms"]
    console.print(f"prefill: {after:.1f} of {before:.1f} ms\nThe picture is in {escape(str(out))}")


def _save(drawn: Any, out: Path) -> None:
    """The stages, and below them merged groups and scores."""
    from PIL import Image

    from vlprune.visualize import drawing

    extra = [("merged groups", drawn.groups)] if drawn.groups else []
    extra += list(drawn.scores.items())
    sheets = [drawn.stages]
    if extra:
        sheets.append(drawing.sheet([(name, drawing.enlarged(picture, 260)[0]) for name, picture in extra], across=4))
    made = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), drawing.PAPER)
    top = 0
    for sheet in sheets:
        made.paste(sheet, (0, top))
        top += sheet.height
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made.save(out)
    except (OSError, ValueError) as error:
        raise VLPruneError(f"cannot save {out}: {error}") from error


def _answerer(model: str, device: str) -> Any:
    import torch

    from vlprune.demos.answers import Answerer
    from vlprune.evals import loading, tinyvlm

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = loading.model(model, torch.device(device))
    return Answerer(loaded, loading.TINYVLM_TOKENS if model in tinyvlm.NAMES else LONGEST_ANSWER)
