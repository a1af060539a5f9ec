"""Puts measurements into the documents, as docs/publish.py does for accuracy."""

from __future__ import annotations

from pathlib import Path

from vlprune.bench import journal, kernel_rows, model, plot, report
from vlprune.bench.journal import Row
from vlprune.errors import VLPruneError

IMAGES = "images/speed"
BEGIN, END = "<!-- measured:speed -->", "<!-- end of measured:speed -->"


def publish(folder: Path, docs: Path) -> list[Path]:
    """From all CSV files in ``folder``: ``results/speed.md``, ``results/speed-kernels.md`` and pictures in ``docs``, and the
    tables between the marks of ``speed.md``."""
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
    return written + _filled(docs / "speed.md", models, kernels)


def _filled(page: Path, models: list[Row], kernels: list[Row]) -> list[Path]:
    """Puts the tables between the marks of ``page``, if there is such a page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        return []
    found = [report.overview(models)] if models else []
    found += [report.kernel_overview(kernels)] if kernels else []
    page.write_text("\n".join([before + mark, *found, end + after]), encoding="utf-8")
    return [page]


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
