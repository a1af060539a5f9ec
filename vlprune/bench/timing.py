"""Time on the device, in spans that may lie inside each other, read once everything has run so that nothing waits."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from vlprune.engine.probes import Probe
from vlprune.engine.text_signals import TextSignals

Interval = tuple[float, float]
"""Seconds since the recorder's start."""
SELECTION = "selection"


class Recorder:
    """Notes when spans began and ended: on a GPU by events in the stream, on a CPU by the clock.

    A mark is taken by :meth:`mark`; :meth:`seconds` tells the time between two of them. ``spans``: name -> pairs of marks.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = {}
        self.start = self.mark()

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Waits for ``end``."""
        if not self.cuda:
            return end - begin
        begin.synchronize()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def add(self, name: str, begin: Any, end: Any) -> None:
        self.spans.setdefault(name, []).append((begin, end))

    def intervals(self, *names: str) -> list[Interval]:
        """The spans of these names."""
        pairs = [pair for name in names for pair in self.spans.get(name, ())]
        return [(self.seconds(self.start, begin), self.seconds(self.start, end)) for begin, end in pairs]

    @contextmanager
    def watch(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Inside the block each call of a module is a span. Enter it after a method was applied: spans hold its hooks."""
        with ExitStack() as stack:
            for name, module in modules.items():
                open_spans: list[Any] = []

                def begin(*_: Any, open_spans: list[Any] = open_spans) -> None:
                    open_spans.append(self.mark())

                def end(*_: Any, name: str = name, open_spans: list[Any] = open_spans) -> None:
                    self.add(name, open_spans.pop(), self.mark())

                stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
                stack.callback(module.register_forward_hook(end).remove)
            yield

    @contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Inside the block what is measured for a method, beside the model, is a span of :data:`SELECTION`."""
        with ExitStack() as stack:
            for owner, name in SIGNALS:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(SELECTION, begin, self.mark())

        return timed


SIGNALS = ((Probe, "measure"), (TextSignals, "_measure"))
"""What computes signals in the vision encoder, and in the LLM."""


def covered(intervals: Iterable[Interval]) -> float:
    """Seconds that lie in at least one of the intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def beyond(intervals: list[Interval], others: list[Interval]) -> float:
    """Seconds that lie in ``intervals`` and in none of the ``others``."""
    return covered([*intervals, *others]) - covered(others)


@contextmanager
def settled() -> Iterator[None]:
    """Inside the block collecting garbage does not look at what was there before: a library's objects take long to see."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Inside the block Python collects no garbage; the device has nothing left to do when it begins."""
    gc.collect()
    synchronise(device)
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
