"""Puts measurements into the documents, as docs/publish.py does for accuracy."""

from __future__ import annotations

from pathlib import Path

from vlprune.bench import journal, kernel_rows, model, plot, report
from vlprune.bench.journal import Row
from vlprune.errors import VLPruneError

IMAGES = "images/speed"


def publish(folder: Path, docs: Path) -> list[Path]:
    """Writes ``results/speed.md``, ``results/speed-kernels.md`` and pictures in ``docs`` from all CSV files in ``folder``."""
    models, kernels = _rows(folder)
    if not models and not kernels:
        raise VLPruneError(f"{folder} holds no rows of vlprune bench")
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if models:
        written += _models(models, docs)
    if kernels:
        page = docs / "results" / "speed-kernels.md"
        page.write_text(report.kernel_page(kernels), encoding="utf-8")
        written.append(page)
    return written


def _models(rows: list[Row], docs: Path) -> list[Path]:
    """The page, and pictures of each model and machine."""
    text, written = report.model_page(rows), []
    for number, (title, group) in enumerate(report.grouped(rows).items(), 1):
        pictures = plot.draw(group, docs / IMAGES / str(number))
        links = "\n".join(f"![{title}](../{path.relative_to(docs)})" for path in pictures)
        text = text.replace(f"## {title}\n", f"## {title}\n\n{links}\n") if links else text
        written += pictures
    page = docs / "results" / "speed.md"
    page.write_text(text, encoding="utf-8")
    return [page, *written]


def _rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of models and of kernels, told apart by their columns."""
    models: list[Row] = []
    kernels: list[Row] = []
    for path in sorted(folder.glob("**/*.csv")):
        with path.open(encoding="utf-8") as file:
            heading = file.readline().rstrip("\n").split(",")
        if heading == list(model.COLUMNS):
            models += journal.read(path)
        elif heading == list(kernel_rows.COLUMNS):
            kernels += journal.read(path)
    return models, kernels
