"""What the benchmarks whose data come from the hub have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from vlprune.evals.benchmarks.base import Benchmark, Example
from vlprune.evals.benchmarks.source import Record, Source, Table, open_table

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
"""Instructions as lmms-eval has them by default, and LLaVA was trained with."""


@dataclass(frozen=True, kw_only=True)
class Loaded(Benchmark):
    """``path``: a local copy, as a folder or a parquet file. ``revision``: of the repository, the newest by default."""

    repository: ClassVar[str]
    config: ClassVar[str | None] = None
    split: str
    path: str | None = None
    revision: str | None = None

    @property
    def version(self) -> str:
        return self.table.origin

    @cached_property
    def table(self) -> Table:
        return open_table(self.source(self.config))

    def source(self, config: str | None) -> Source:
        return Source(self.repository, config, self.split, self.path, self.revision)

    def examples(self, limit: int | None = None) -> list[Example]:
        return list(distinct_ids(self.example(record) for record in self.records(limit)))

    def records(self, limit: int | None) -> Iterator[Record]:
        return self.table.records(limit)

    @abstractmethod
    def example(self, record: Record) -> Example:
        """Raises :class:`DataError` where the row is not what the benchmark needs."""


def distinct_ids(examples: Iterable[Example]) -> Iterator[Example]:
    """Ids that come again get the number of their turn, in order: ``x``, ``x#2``."""
    turns: Counter[str] = Counter()
    for example in examples:
        turns[example.id] += 1
        turn = turns[example.id]
        yield example if turn == 1 else dataclasses.replace(example, id=f"{example.id}#{turn}")
