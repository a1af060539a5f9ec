"""The folder of a run: what is kept on disk, so that a run can be stopped by whatever means and goes on where it was.

=========================  ==============================================================================================
``run.json``               what the rows are measurements of
``samples/NAME.jsonl``     each sample of a benchmark once: id, category, question, answers, details
``rows-PROCESS.jsonl``     one line for each sample under each setting, a file for each process that took part
=========================  ==============================================================================================

Rows are added a batch at a time, each in one write that has reached the disk before the next begins. A batch that is not
whole is removed when the run goes on, and answered again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprune.errors import VLPruneError
from vlprune.evals.settings import Setting, distinct

MANIFEST = "run.json"
LOCK = "run.lock"
SAMPLES = "samples"
FORMAT = 3
"""Changes with what a row holds, so that rows of older versions are not taken for complete ones."""
ODD = "backslashreplace"
"""Half of a surrogate pair cannot be written as UTF-8, but as the JSON escape that this makes of it."""

Row = dict[str, Any]
Cell = tuple[str, str, int]
"""What is answered in one go: a benchmark, a setting (its label), and the number of a batch."""


class RunMismatchError(VLPruneError):
    """The folder holds rows of another run, and the two cannot stand in one table."""


@dataclass(frozen=True)
class Journal:
    """Where one of the processes of a run writes its rows."""

    out: Path
    process: int = 0

    def append(self, rows: Sequence[Row]) -> None:
        with (self.out / f"rows-{self.process:05d}.jsonl").open("a", encoding="utf-8", errors=ODD) as file:
            file.write("".join(line_of(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())


# ------------------------------------------------------------------ reading


def row_files(out: Path) -> list[Path]:
    return sorted(out.glob("rows*.jsonl"))


def read_rows(out: Path) -> list[Row]:
    """All rows of a run with their samples, in order of benchmarks, settings and samples, whoever wrote them and when."""
    manifest = read_manifest(out)
    samples = {name: read_samples(out, name) for name in manifest.get("benchmarks", {})}
    places = {(name, key): place for name, found in samples.items() for place, key in enumerate(found)}
    benchmarks = {name: place for place, name in enumerate(samples)}
    settings = {setting.label: place for place, setting in enumerate(settings_in(manifest))}

    def place(row: Row) -> tuple[int, int, int]:
        return benchmarks[row["benchmark"]], settings[label_of(row)], places[row["benchmark"], row["id"]]

    known = (row for row in raw_rows(out) if (row["benchmark"], row["id"]) in places and label_of(row) in settings)
    return [samples[row["benchmark"]][row["id"]] | row for row in sorted(known, key=place)]


def raw_rows(out: Path) -> Iterator[Row]:
    """Rows as they stand in the files."""
    for path in row_files(out):
        yield from _whole_lines(path.read_text(encoding="utf-8", errors="replace"))


def label_of(row: Row) -> str:
    return Setting(row["method"], row["budget"]).label


def read_samples(out: Path, benchmark: str) -> dict[str, Row]:
    """Samples by id; none where the benchmark has not been begun."""
    path = _samples_path(out, benchmark)
    if not path.exists():
        return {}
    return {sample["id"]: sample for sample in _whole_lines(path.read_text(encoding="utf-8", errors="replace"))}


def settings_in(manifest: Row) -> list[Setting]:
    return [Setting(one["method"], one["budget"]) for one in manifest.get("settings", ())]


def read_manifest(out: Path) -> Row:
    """The manifest in the folder of a run; empty where there is no run."""
    path = out / MANIFEST
    if not path.exists():
        if row_files(out):
            raise RunMismatchError(f"{out} holds rows of which nothing is known, since {MANIFEST} is missing: {_way_out()}")
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunMismatchError(f"{path} cannot be read ({error}): {_way_out()}") from error


# ------------------------------------------------------------------ beginning and going on


def begin(out: Path, wanted: Row, session: Row, restart: bool) -> Row:
    """Writes the manifest and returns it: ``wanted``, with what an earlier run of the same kind has measured and when.

    Raises :class:`RunMismatchError` where rows in the folder are measurements of something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    previous = {} if restart else read_manifest(out)
    check_same_run(out, previous, wanted)
    if not previous:
        for path in row_files(out):
            path.unlink()
    new = {label_of(one): one for one in [*previous.get("settings", ()), *wanted["settings"]]}
    merged = wanted | {
        "benchmarks": previous.get("benchmarks", {}) | wanted["benchmarks"],
        "settings": [new[setting.label] for setting in distinct(settings_in({"settings": list(new.values())}))],
        "sessions": [*previous.get("sessions", ()), session],
    }
    started = {key: previous.get(key, session[key]) for key in ("date", "commit", "command")}
    merged |= started | {"hardware": previous.get("hardware", session["hardware"])}
    write_json(out / MANIFEST, merged)
    return merged


def check_same_run(out: Path, previous: Row, wanted: Row) -> None:
    """Benchmarks and settings may be added; what is there already must be of the same model, data, versions and device."""
    if not previous:
        return
    wanted = json.loads(json.dumps({key: value for key, value in wanted.items() if key != "settings"}, default=str))
    known = previous.get("benchmarks", {})
    if "benchmarks" in wanted:
        wanted["benchmarks"] = {name: value for name, value in wanted["benchmarks"].items() if name in known}
    differences = list(_differences(wanted, previous))
    if differences:
        raise RunMismatchError(f"{out} holds rows of another run ({'; '.join(differences)}): {_way_out()}")


def _differences(wanted: Any, previous: Any, where: str = "") -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(previous, dict):
        for key, value in wanted.items():
            yield from _differences(value, previous.get(key), f"{where} {key}".strip())
    elif wanted != previous:
        yield f"{where} there {_short(previous)}, now {_short(wanted)}"


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _way_out() -> str:
    return "give another folder with --out, or --restart to measure afresh"


def write_samples(out: Path, benchmark: str, samples: Iterable[Row]) -> None:
    path = _samples_path(out, benchmark)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(line_of(sample) for sample in samples))


def _samples_path(out: Path, benchmark: str) -> Path:
    return out / SAMPLES / f"{benchmark}.jsonl"


def tidy(out: Path, batches: Mapping[str, Sequence[Sequence[str]]], without_errors: bool = False) -> set[Cell]:
    """Leaves whole batches in the files, a torn last line and doubles going, and returns which are there.

    ``batches``: ids of the samples of each batch, by benchmark; rows of other benchmarks stay as they are.
    ``without_errors``: batches with a sample that failed go, too.
    """
    complete: set[Cell] = set()
    for path in row_files(out):
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = {
            cell: rows
            for cell, rows in _cells(text).items()
            if cell not in complete
            and _is_whole(cell, rows, batches)
            and not (without_errors and cell[0] in batches and any(row["error"] for row in rows))
        }
        clean = "".join(line_of(row) for rows in whole.values() for row in rows)
        if clean != text:
            write_whole(path, clean)
        complete |= whole.keys()
    return complete


def _cells(text: str) -> dict[Cell, list[Row]]:
    found: dict[Cell, list[Row]] = {}
    for row in _whole_lines(text):
        found.setdefault((row["benchmark"], label_of(row), row["batch"]), []).append(row)
    return found


def _is_whole(cell: Cell, rows: list[Row], batches: Mapping[str, Sequence[Sequence[str]]]) -> bool:
    benchmark, _, batch = cell
    if benchmark not in batches:
        return True
    known = batches[benchmark]
    return batch < len(known) and [row["id"] for row in rows] == list(known[batch])


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one run at a time writes into a folder; a lock of a run that was killed is gone with it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VLPruneError(f"another run is writing into {out}: wait for it, or give another folder with --out") from None
        except (ImportError, OSError):
            # Some systems and some network drives have no such locks; then whoever starts two runs must know.
            pass
        yield


# ------------------------------------------------------------------ files


def line_of(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(text: str) -> Iterator[Row]:
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file is either the old or the new one, never half of it."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8", errors=ODD) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
