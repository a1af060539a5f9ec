"""Rows are appended, read back as they were, and never lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlprune.bench import journal
from vlprune.bench.conditions import COLUMNS as CONDITIONS
from vlprune.bench.jobs import Sink

COLUMNS = ("operation", "budget", "ms", "rounds", "error", *CONDITIONS)


def test_rows_are_appended_below_one_heading(tmp_path: Path):
    path = tmp_path / "new" / "rows.csv"
    for number in range(3):
        journal.append(path, COLUMNS, {"operation": "gather", "rounds": number})
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert [row["rounds"] for row in journal.read(path)] == [0, 1, 2]


def test_a_row_comes_back_as_it_was(tmp_path: Path):
    row = {"operation": 'a, "b"', "budget": "1.0", "ms": 0.25, "rounds": 3, "device": "x", "commit": "123"}
    journal.append(tmp_path / "rows.csv", COLUMNS, row | {"command": "over\nlines"})
    assert journal.read(tmp_path / "rows.csv") == [dict.fromkeys(COLUMNS) | row | {"command": "over lines"}]


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("somebody,else\n1,2\n")
    with pytest.raises(journal.JournalError, match="other columns"):
        journal.append(path, COLUMNS, {"operation": "gather"})
    with pytest.raises(journal.JournalError, match="other columns"):
        Sink(path, COLUMNS, torch.device("cpu"))
    assert path.read_text() == "somebody,else\n1,2\n"


@pytest.mark.parametrize("rest", ["second,0.2,0.", 'second,0.2,0.1,3,"Error: '])
def test_a_row_that_an_interruption_cut_off_swallows_no_other(tmp_path: Path, rest: str):
    path = tmp_path / "rows.csv"
    journal.append(path, COLUMNS, {"operation": "first", "rounds": 1})
    path.write_text(path.read_text() + rest)
    journal.append(path, COLUMNS, {"operation": "third", "rounds": 3})
    assert [row["operation"] for row in journal.read(path)] == ["first", "third"]


def test_a_file_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(journal.JournalError, match="cannot read"):
        journal.read(tmp_path / "none.csv")


def key(row: journal.Row) -> tuple[str, ...]:
    return (str(row["operation"]),)


def test_resume_leaves_out_what_is_there_and_repeats_what_failed(tmp_path: Path):
    path = tmp_path / "rows.csv"
    first = Sink(path, COLUMNS, torch.device("cpu"))
    first.add({"operation": "gather", "ms": 1.0})
    first.add({"operation": "compact", "error": "OutOfMemoryError"})
    again = Sink(path, COLUMNS, torch.device("cpu"), resume=True)
    assert again.done(key) == {("gather",)}
    assert [row["operation"] for row in again.rows] == ["gather"]
    assert Sink(path, COLUMNS, torch.device("cpu")).done(key) == set()
    assert len(journal.read(path)) == 2


def test_resume_takes_no_row_of_another_machine_or_commit(tmp_path: Path):
    path = tmp_path / "rows.csv"
    mine = Sink(path, COLUMNS, torch.device("cpu"))
    for changed in ({"device": "another"}, {"commit": "0123456789ab"}):
        other = Sink(path, COLUMNS, torch.device("cpu"))
        other.common |= changed
        other.add({"operation": "gather", "ms": 1.0})
    again = Sink(path, COLUMNS, mine.device, resume=True)
    assert again.done(key) == set()
