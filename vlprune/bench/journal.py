"""CSV files that only grow: a row that was measured stays, whatever happens afterwards."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
    with path.open("a+b") as file:
        text = _line(columns) if file.tell() == 0 else _end_of_line(file)
        text += _line([_cell(row.get(name)) for name in columns])
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _end_of_line(file: BinaryIO) -> str:
    """What a row needs in front of it, where the one before was cut off by an interruption."""
    file.seek(-1, os.SEEK_END)
    return "" if file.read(1) == b"\n" else "\n"


def check(path: Path, columns: Sequence[str]) -> None:
    """Raises :class:`JournalError` where the file has other columns."""
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8", newline="") as file:
            found = next(csv.reader(file), [])
        if found != list(columns):
            raise JournalError(f"{path} has other columns than this version writes; give another file with --out")


def heading(path: Path) -> list[str]:
    """The columns of a file."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().rstrip("\n").split(",")
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror or error}") from error


def read(path: Path) -> list[Row]:
    """All rows, numbers as numbers and empty cells as None. A row that was cut off is none."""
    try:
        # A row is a line, so that one which was cut off inside of quotes does not swallow those behind it.
        lines = [next(csv.reader([line]), []) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror or error}") from error
    columns = lines[0] if lines else []
    rows = [dict(zip(columns, cells, strict=True)) for cells in lines[1:] if len(cells) == len(columns)]
    return [{name: _value(name, cell) for name, cell in row.items()} for row in rows]


def read_all(paths: Iterable[Path]) -> list[Row]:
    return [row for path in paths for row in read(path)]


def _cell(value: Any) -> Any:
    # Six digits are more than any clock here can tell, and keep the files readable.
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(value.split()) if isinstance(value, str) else value


TEXT = {"date", "device", "vlprune", "torch", "transformers", "triton", "vllm", "commit", "command", "budget"}
"""Columns that may look like numbers and are none; of budgets, 1 and 1.0 differ."""


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    if name in TEXT:
        return cell
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
