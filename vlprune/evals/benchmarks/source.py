"""Rows of a data set through ``datasets``: of the hub, of its offline cache, or of a local copy; images stay encoded.

The first rows of a split are streamed. A whole split is prepared as a memory-mapped file, and pictures are read from it one
by one, so a split that is larger than memory can be run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vlprune.evals.benchmarks.base import DataError, ImageError, Picture

OWNERS = ("lmms-lab-encoder", "lmms-lab")
"""Who keeps the field's benchmarks in one form; the second is where they were before, and where many caches have them."""
COMMIT = re.compile(r"@([0-9a-f]{40})/")
"""The revision in the addresses of a data set's files."""


@dataclass(frozen=True)
class Source:
    """A split of a data set: ``repository`` of :data:`OWNERS`, or a local copy at ``path``, a folder or a parquet file."""

    repository: str
    config: str | None
    split: str
    path: str | None = None
    revision: str | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return ", ".join(filter(None, (self.path or self.repository, self.config, self.split)))


@dataclass(frozen=True)
class Record:
    """A row, with what is wrong about it said clearly; ``place`` counts from 0."""

    values: dict[str, Any]
    place: int
    where: str
    picture: Picture = field(repr=False, default=b"")

    def text(self, column: str) -> str:
        value = self[column]
        if not isinstance(value, (str, int, float)):
            raise self.refusal(column, "a text")
        return str(value)

    def texts(self, column: str, empty: bool = False) -> tuple[str, ...]:
        """Of a column with a list of texts, or with one text; ``empty``: the list may be."""
        value = [self[column]] if isinstance(self[column], str) else self[column]
        if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value) or not (value or empty):
            raise self.refusal(column, "a list of texts" if empty else "at least one text")
        return tuple(value)

    def number(self, column: str) -> int:
        try:
            return int(self[column])
        except (TypeError, ValueError):
            raise self.refusal(column, "an integer") from None

    def one_of(self, column: str, allowed: Sequence[str]) -> str:
        """The text, without case and surrounding space, where it is one of those allowed."""
        value = self.text(column).strip().lower()
        if value not in allowed:
            raise self.refusal(column, " or ".join(allowed))
        return value

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            raise DataError(f"{self.where}: no column {column!r}; there are {', '.join(self.values)}")
        return self.values[column]

    def refusal(self, column: str, allowed: str) -> DataError:
        shown = repr(self.values[column])
        shown = shown if len(shown) < 80 else f"{shown[:80]}..."
        return DataError(f"{self.where}, row {self.place}: column {column!r} must hold {allowed}, and holds {shown}")


@dataclass(frozen=True)
class Table:
    """An opened split. ``origin`` names what it holds, with the revision where that is known."""

    builder: Any
    source: Source
    origin: str

    def records(self, limit: int | None = None, image: str | None = "image") -> Iterator[Record]:
        """The rows, or the first ``limit`` of them, with the column ``image`` as pictures, if any."""
        streamed = limit is not None and can_stream(self.builder)
        pairs = self._streamed(limit, image) if streamed else self._prepared(limit, image)
        place = -1
        for place, (values, picture) in enumerate(pairs):
            yield Record(values, place, self.source.where, picture)
        if place < 0 and limit != 0:
            raise DataError(f"{self.source.where}: there are no rows")

    def _streamed(self, limit: int | None, image: str | None) -> Iterator[tuple[dict[str, Any], Picture]]:
        data = encoded(self._load(self.builder.as_streaming_dataset), image)
        for values in data.take(limit):
            if image is None:
                yield values, b""
                continue
            self._check_column(image, values)
            rest = {name: value for name, value in values.items() if name != image}
            yield rest, _picture(values[image], self.source)

    def _prepared(self, limit: int | None, image: str | None) -> Iterator[tuple[dict[str, Any], Picture]]:
        data = encoded(self._load(self._prepare), image)
        if limit is not None:
            data = data.select(range(min(limit, len(data))))
        if image is None:
            yield from ((values, b"") for values in data)
            return
        self._check_column(image, data.column_names)
        for place, values in enumerate(data.remove_columns([image])):
            yield values, partial(_picture_at, data, place, image, self.source)

    def _check_column(self, column: str, names: Iterable[str]) -> None:
        if column not in names:
            raise DataError(f"{self.source.where}: no column {column!r}; there are {', '.join(names)}")

    def _prepare(self, split: str) -> Any:
        self.builder.download_and_prepare()
        return self.builder.as_dataset(split=split)

    def _load(self, load: Callable[..., Any]) -> Any:
        try:
            return load(split=self.source.split)
        except ValueError as error:
            raise DataError(f"{self.source.where}: {error}") from error


def open_table(source: Source) -> Table:
    """Finds the data set without reading its rows. Raises :class:`DataError` that says where it was looked for."""
    if source.path is not None:
        name = Path(source.path).name
        return Table(_local(Path(source.path), source), source, ", ".join(filter(None, (name, source.config, source.split))))
    failures = []
    for owner in OWNERS:
        try:
            builder = _builder(f"{owner}/{source.repository}", source.config, revision=source.revision)
        except (OSError, ValueError) as error:
            failures.append(f"{owner}/{source.repository} ({' '.join(str(error).split())[:200]})")
            continue
        return Table(builder, source, origin_of(f"{owner}/{source.repository}", builder, source))
    raise DataError(
        f"cannot load {source.where}: tried {'; '.join(failures)}. A local copy is used by path=FOLDER, the offline cache by "
        "HF_HUB_OFFLINE=1"
    )


def _builder(name: str, config: str | None, **options: Any) -> Any:
    from datasets import load_dataset_builder

    return load_dataset_builder(name, config, **options)


def _local(path: Path, source: Source) -> Any:
    """A copy of the repository, of one of its configurations, or a single parquet file."""
    try:
        if path.is_file():
            return _builder("parquet", None, data_files={source.split: str(path)})
        if not path.is_dir():
            raise DataError(f"{path}: there is no such file or folder")
        if (path / "README.md").exists():
            # Its head tells which files belong to which configuration and split.
            return _builder(str(path), source.config)
        inner = path / (source.config or "")
        inner = inner if inner.is_dir() else path
        # By their names alone, files of "dev" would be taken for a split "validation".
        files = sorted(map(str, inner.rglob(f"{source.split}-*.parquet")))
        return _builder("parquet", None, data_files={source.split: files}) if files else _builder(str(inner), None)
    except (OSError, ValueError) as error:
        raise DataError(f"{source.where}: {error}") from error


def origin_of(repository: str, builder: Any, source: Source) -> str:
    """What a builder reads, with its revision where that is known."""
    found = COMMIT.search(str(builder.config.data_files or ""))
    revision = found.group(1) if found else builder.hash or source.revision
    return ", ".join(filter(None, (f"{repository}@{revision}" if revision else repository, source.config, source.split)))


def can_stream(builder: Any) -> bool:
    """What is in the offline cache is prepared already, and cannot be streamed."""
    return type(builder).__name__ != "Cache"


# ------------------------------------------------------------------ pictures


def encoded(data: Any, image: str | None) -> Any:
    """``data`` with its images as they were stored."""
    from datasets import Image

    if data.features and isinstance(data.features.get(image), Image):
        return data.cast_column(image, Image(decode=False))
    return data


def _picture_at(data: Any, place: int, image: str, source: Source) -> Any:
    picture = _picture(data[place][image], source)
    return picture() if callable(picture) else picture


def _picture(value: Any, source: Source) -> Picture:
    """Of what a column of images may hold: bytes, a path from where the data are, or both in a dictionary."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        place = Path(source.path or ".")
        return ((place if place.is_dir() else place.parent) / value).read_bytes
    return partial(_no_picture, source.where)


def _no_picture(where: str) -> bytes:
    raise ImageError(f"{where}: this row has no image")
