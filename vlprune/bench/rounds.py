"""Measures variants of one workload in turns: in every round each of them runs once, so that drift of the machine hits all
alike, and ratios are taken between runs of the same round."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import vlprune
from vlprune.bench import floor
from vlprune.bench.floor import Schedule
from vlprune.bench.timing import settled
from vlprune.bench.workload import Sample, Workload
from vlprune.evals.settings import UNPRUNED, Setting

LEAST = 3
"""Rounds that are run however long they take."""


@dataclass(frozen=True)
class Variant:
    """A setting; ``repeat``: the unpruned model once more, whose distance from the first tells what can be told apart."""

    setting: Setting
    repeat: bool = False

    @property
    def label(self) -> str:
        return f"{self.setting.label} again" if self.repeat else self.setting.label

    @property
    def method(self) -> Any:
        return None if self.setting.method == UNPRUNED else self.setting.make()


@dataclass(eq=False)
class Measured:
    """What the rounds gave. ``samples``: of each variant, one a round. ``texts`` and ``decodes``: of the unpatched model by
    length, one a round, fewer where it failed. ``errors``: why a variant could not be measured."""

    schedules: dict[Variant, Schedule] = field(default_factory=dict)
    samples: dict[Variant, list[Sample]] = field(default_factory=dict)
    peaks: dict[Variant, int | None] = field(default_factory=dict)
    texts: dict[int, list[dict[int, float]]] = field(default_factory=dict)
    decodes: dict[int, list[list[float]]] = field(default_factory=dict)
    errors: dict[Variant, str] = field(default_factory=dict)
    preprocess: list[float] = field(default_factory=list)


def variants(settings: Sequence[Setting]) -> list[Variant]:
    """The unpruned model comes first and once more, next to it what keeps all, whose ratio has to be the most exact."""
    whole = [setting for setting in settings if setting.method != UNPRUNED and str(setting.budget) == "1.0"]
    others = [setting for setting in settings if setting.method != UNPRUNED and setting not in whole]
    unpruned = Setting(UNPRUNED)
    return [Variant(unpruned), Variant(unpruned, repeat=True), *map(Variant, whole + others)]


def measure(
    workload: Workload,
    wanted: Sequence[Variant],
    *,
    rounds: int,
    warmup: int,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Runs all variants in turns, ``rounds`` times or until ``seconds`` are over.

    A variant that fails is left out from then on, and its error is kept.
    """
    found = Measured()
    with settled():
        for variant in wanted:
            progress(f"warming up {variant.label}")
            _try(found, variant, partial(_warm_up, workload, found, variant, warmup))
        found.preprocess = workload.preprocess_seconds()
        turns = _turns(workload, found)
        start = time.monotonic()
        for index in range(rounds):
            if seconds is not None and index >= LEAST and time.monotonic() - start > seconds:
                break
            progress(f"round {index + 1} of {rounds}")
            for turn in in_turn(turns, index):
                turn()
    return found


def in_turn(turns: Sequence[Any], index: int) -> list[Any]:
    """Another one begins in each round, and every other round goes backwards: no turn profits from its place."""
    first = index // 2 % max(1, len(turns))
    order = [*turns[first:], *turns[:first]]
    return order[::-1] if index % 2 else order


def _turns(workload: Workload, found: Measured) -> list[Callable[[], None]]:
    """What is done once a round: each variant, and the unpatched model's parts that the floors are made of."""

    def run(variant: Variant) -> None:
        if variant not in found.errors:
            _try(found, variant, lambda: found.samples.setdefault(variant, []).append(workload.run(variant.method)))

    def decode(length: int) -> None:
        found.decodes.setdefault(length, []).append(floor.decode_seconds(workload, length))

    schedules = list(found.schedules.values())
    lengths = sorted({schedule.cache_length for schedule in schedules})
    turns: list[Callable[[], None]] = [partial(run, variant) for variant in found.schedules]
    turns += _text_turns(workload, found, schedules)
    return turns + [partial(_unless_failing, partial(decode, length)) for length in lengths]


def _text_turns(workload: Workload, found: Measured, schedules: list[Schedule]) -> list[Callable[[], None]]:
    """Runs of the unpatched language model. Where it cannot run, too large a batch for example, there is no floor."""
    made: list[floor.TextRuns] = []
    _unless_failing(lambda: made.append(floor.TextRuns(workload)))

    def text(length: int, bounds: list[int]) -> None:
        found.texts.setdefault(length, []).append(made[0].run(length, bounds))

    bounds = made[0].bounds(schedules) if made else {}
    for length, marked in bounds.items():
        _unless_failing(partial(made[0].run, length, marked))
    return [partial(_unless_failing, partial(text, length, marked)) for length, marked in bounds.items()]


def _unless_failing(action: Callable[[], Any]) -> None:
    with contextlib.suppress(RuntimeError):
        action()


def _warm_up(workload: Workload, found: Measured, variant: Variant, times: int) -> None:
    """Runs a variant unmeasured; finds out what it leaves, and on a CPU its peak of memory."""
    found.peaks[variant] = workload.peak(variant.method)
    # The unpatched model cannot tell what it leaves, so a patch that does nothing does.
    with vlprune.applied(workload.model, variant.method or vlprune.Uniform(budget=1.0)), torch.inference_mode():
        workload.prefill()
        found.schedules[variant] = floor.schedule_of(workload)
    for _ in range(times - 1):
        workload.run(variant.method)


def _try(found: Measured, variant: Variant, action: Callable[[], Any]) -> None:
    try:
        action()
    except Exception as error:  # whatever it is, the others are still to be measured
        found.errors[variant] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        found.schedules.pop(variant, None)
        found.samples.pop(variant, None)
    if variant in found.errors:
        # After the exception is gone, since its traceback holds tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
