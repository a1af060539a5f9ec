"""What the commands do: measures, and writes each row as it comes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlprune.bench import journal, kernel_rows, model
from vlprune.bench.conditions import conditions
from vlprune.bench.journal import Row
from vlprune.bench.kernels import Case, Shape
from vlprune.bench.load import Loaded
from vlprune.bench.rounds import Measured, Variant, measure
from vlprune.bench.workload import Workload

Say = Callable[[str], None]
SAME = ("device", "threads", "vlprune", "torch", "transformers", "triton", "commit")
"""What has to be equal for a row of an earlier run to be taken for one of this run."""


@dataclass(frozen=True)
class Plan:
    """How a model is measured: every variant, for each attention kernel and each batch size.

    ``minutes``: after which a group of variants begins no new round, None for no limit. ``image``: pixels (height, width).
    """

    variants: Sequence[Variant]
    attentions: Sequence[str] = ("sdpa",)
    batches: Sequence[int] = (1,)
    rounds: int = 15
    warmup: int = 1
    steps: int = 8
    words: int = 64
    image: tuple[int, int] | None = None
    minutes: float | None = None


@dataclass(eq=False)
class Sink:
    """Where rows go. ``resume``: what an earlier run of the same kind has measured is not measured again."""

    path: Path
    columns: Sequence[str]
    device: torch.device
    resume: bool = False
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.common = conditions(self.device)
        journal.check(self.path, self.columns)

    def add(self, row: Row) -> None:
        row = {**row, **{name: value for name, value in self.common.items() if name in self.columns}}
        journal.append(self.path, self.columns, row)
        self.rows.append(row)

    def done(self, keys: Callable[[Row], tuple[str, ...]]) -> set[tuple[str, ...]]:
        """The keys of rows that are there already, failed ones left out."""
        if not self.resume or not self.path.exists():
            return set()
        same = [row for row in journal.read(self.path) if not row.get("error") and self._same(row)]
        self.rows += [row for row in same if keys(row) not in {keys(mine) for mine in self.rows}]
        return {keys(row) for row in same}

    def _same(self, row: Row) -> bool:
        return all(str(row.get(name)) == str(self.common.get(name)) for name in SAME)


def kernels(
    cases: Sequence[Case],
    shapes: Sequence[Shape],
    sink: Sink,
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
    say: Say,
    minutes: float | None = None,
) -> None:
    """Rows of operations. After ``minutes`` no further one begins; ``resume`` measures what is missing."""
    start = time.monotonic()
    done = sink.done(kernel_rows.keys)
    for row in kernel_rows.measure(cases, shapes, sink.device, dtype, rounds=rounds, compiled=compiled, done=done):
        sink.add(row)
        say(f"{row['operation']}, {row['shape']}, {row['variant']}")
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            say(f"{minutes:g} minutes are over: what is missing is measured with --resume")
            break


def models(load: Callable[[], Loaded], name: str, plan: Plan, sink: Sink, say: Say) -> None:
    """Rows of one model. What cannot be loaded, or is too large, becomes rows with its error."""
    done = sink.done(model.keys)
    try:
        loaded = load()
    except (RuntimeError, MemoryError) as error:
        _fail(sink, plan.variants, {"model": name}, error)
        return
    for attention in plan.attentions:
        for batch in plan.batches:
            _group(loaded, attention, batch, plan, sink, done, say)


def _group(loaded: Loaded, attention: str, batch: int, plan: Plan, sink: Sink, done: set[tuple[str, ...]], say: Say) -> None:
    """One attention kernel, one batch size, all variants in turns."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    same: Row = {"model": loaded.name, "dtype": dtype, "attention": attention, "batch": batch}
    missing = [v for v in plan.variants if model.keys({**same, **model.setting_columns(v)}) not in done]
    if not missing:
        return
    # The first two are the unpruned model, which all others of the same rounds are compared with.
    wanted = [*plan.variants[:2], *(variant for variant in missing if variant not in plan.variants[:2])]
    try:
        loaded.model.set_attn_implementation(attention)
        workload = loaded.workload(batch, plan.words, plan.image, plan.steps)
        found = _measure(workload, wanted, plan, lambda text: say(f"{loaded.name}, {attention}, batch {batch}: {text}"))
    except (RuntimeError, MemoryError, ImportError, ValueError) as error:
        _fail(sink, wanted, same, error)
        return
    for row in model.rows_of(found, wanted):
        sink.add({**model.workload_columns(workload), **row})
    del workload, found
    gc.collect()


def _measure(workload: Workload, wanted: Sequence[Variant], plan: Plan, say: Say) -> Measured:
    seconds = None if plan.minutes is None else 60 * plan.minutes
    return measure(workload, wanted, rounds=plan.rounds, warmup=plan.warmup, seconds=seconds, progress=say)


def _fail(sink: Sink, wanted: Sequence[Variant], same: dict[str, Any], error: BaseException) -> None:
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    for variant in wanted:
        sink.add({**same, **model.setting_columns(variant), "error": told})
