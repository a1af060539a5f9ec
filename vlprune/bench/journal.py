"""CSV files that only grow: a row that was measured stays, whatever happens afterwards."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import vlprune
from vlprune.errors import VLPruneError

RESULTS = Path("benchmarks/results")
"""Where rows go in the repository."""
ELSEWHERE = Path("vlprune-bench.csv")

Row = dict[str, Any]
"""A value for each column; None, an empty cell, is what was not measured."""


class JournalError(VLPruneError):
    """The file is no journal of such rows."""


def default_path(kind: str) -> Path:
    """``benchmarks/results/<kind>.csv`` where the command runs in the repository, a file in the working folder elsewhere."""
    at_root = Path.cwd().resolve() == Path(vlprune.__file__).resolve().parent.parent
    return RESULTS / f"{kind}.csv" if at_root else ELSEWHERE.with_stem(f"{ELSEWHERE.stem}-{kind}")


def append(path: Path, columns: Sequence[str], row: Row) -> None:
    """Adds ``row`` to the file, and a heading to a new one; the row has reached the disk afterwards."""
    unknown = row.keys() - set(columns)
    assert not unknown, f"no such columns: {unknown}"
    check(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow({name: _cell(row.get(name)) for name in columns})
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def check(path: Path, columns: Sequence[str]) -> None:
    """Raises :class:`JournalError` where the file has other columns."""
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8", newline="") as file:
            found = next(csv.reader(file), [])
        if found != list(columns):
            raise JournalError(f"{path} has other columns than this version writes; give another file with --out")


def read(path: Path) -> list[Row]:
    """All rows, numbers as numbers and empty cells as None."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _value(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror or error}") from error


def read_all(paths: Iterable[Path]) -> list[Row]:
    return [row for path in paths for row in read(path)]


def _cell(value: Any) -> Any:
    # Six digits are more than any clock here can tell, and keep the files readable.
    return f"{value:.6g}" if isinstance(value, float) else value


TEXT = {"date", "device", "vlprune", "torch", "transformers", "triton", "commit", "command", "budget"}
"""Columns that may look like numbers and are none; of budgets, 1 and 1.0 differ."""


def _value(name: str, cell: str | None) -> Any:
    if cell is None or cell == "":
        return None
    if name in TEXT:
        return cell
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
