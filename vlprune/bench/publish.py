"""Puts measurements into the documents, as docs/publish.py does for accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vlprune.bench import journal, kernel_rows, model, plot, report, serving, serving_report, vit, vit_report
from vlprune.bench.journal import Row
from vlprune.errors import VLPruneError

IMAGES = "images/speed"
BEGIN, END = "<!-- measured:speed -->", "<!-- end of measured:speed -->"
OVERVIEWS = {"model": report.overview, "vit": vit_report.overview, "kernels": report.kernel_overview}
"""What stands between these marks."""


def publish(folder: Path, docs: Path) -> list[Path]:
    """From all CSV files in ``folder``: ``results/speed.md``, ``speed-kernels.md``, ``speed-vit.md`` and ``serving.md`` beside
    it, pictures in ``docs``, and the tables between the marks of ``speed.md``."""
    rows = _rows(sorted(folder.glob("**/*.csv")))
    if not any(rows.values()):
        raise VLPruneError(f"{folder} holds no rows of vlprune bench")
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if rows["model"]:
        written += _models(rows["model"], docs)
    if rows["kernels"]:
        page = docs / "results" / "speed-kernels.md"
        page.write_text(report.kernel_page(rows["kernels"]), encoding="utf-8")
        written.append(page)
    if rows["vit"]:
        page = docs / "results" / "speed-vit.md"
        pictures = vit_report.draw(rows["vit"], docs / IMAGES)
        links = "".join(f"![Speed-up against patches kept](../{path.relative_to(docs)})\n\n" for path in pictures)
        page.write_text(vit_report.page(rows["vit"]).replace("\n\n## ", f"\n\n{links}## ", 1), encoding="utf-8")
        written += [page, *pictures]
    if rows["serving"]:
        page = docs / "results" / "serving.md"
        pictures = serving_report.draw(rows["serving"], docs / IMAGES)
        links = [f"../{path.relative_to(docs)}" for path in pictures]
        page.write_text(serving_report.page(rows["serving"], links), encoding="utf-8")
        written += [page, *pictures]
    return written + _filled(docs / "speed.md", rows)


def pictures(files: Sequence[Path]) -> list[tuple[Callable[[Sequence[Row], Path], list[Path]], list[Row]]]:
    """For each kind of rows in ``files`` what draws them, and the rows."""
    rows = _rows(files)
    drawing = {"model": plot.draw, "vit": vit_report.draw, "serving": serving_report.draw}
    return [(draw, rows[kind]) for kind, draw in drawing.items() if rows[kind]]


def _filled(page: Path, rows: dict[str, list[Row]]) -> list[Path]:
    """Puts the tables between the marks of ``page``, if there is such a page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end or not any(rows[kind] for kind in OVERVIEWS):
        return []
    found = [overview(rows[kind]) for kind, overview in OVERVIEWS.items() if rows[kind]]
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


KINDS = {"model": model.COLUMNS, "kernels": kernel_rows.COLUMNS, "vit": vit.COLUMNS, "serving": serving.COLUMNS}


def _rows(files: Iterable[Path]) -> dict[str, list[Row]]:
    """Rows of each kind, told apart by their columns."""
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for path in files:
        heading = journal.heading(path)
        for kind, columns in KINDS.items():
            if heading == list(columns):
                found[kind] += journal.read(path)
    return found
