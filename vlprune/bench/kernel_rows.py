"""Runs the cases of :mod:`vlprune.bench.kernels` and makes rows of them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from vlprune.bench import conditions
from vlprune.bench.journal import Row
from vlprune.bench.kernels import Case, Shape, Work, size
from vlprune.bench.stats import paired, spread
from vlprune.kernels import using

REFERENCE, COMPILED, TRITON = "reference", "compiled", "triton"
COLUMNS = (
    "operation",
    "shape",
    "batch",
    "tokens",
    "keep",
    "dtype",
    "variant",
    "error",
    "rounds",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "ratio",
    "ratio_low",
    "ratio_high",
    "gb_per_s",
    "tflop_per_s",
    "ceiling",
    "share_of_ceiling",
    "copy_ms",
    "share_of_copy",
    "beside",
    "beside_ms",
    "times_beside",
    *conditions.COLUMNS,
)
"""Of a row.

- ``variant``: the reference as it is, the reference by torch.compile, or the Triton kernel. ``ratio``: the reference's time
  by this one's, of the same round, with its 95 % interval.
- ``gb_per_s`` and ``tflop_per_s``: the bytes and operations that are needed at least, by the median time. ``ceiling``: the
  machine's bandwidth of copying (GB/s) or its matrix product (TFLOP/s), whichever limits the operation, measured in the same
  run; a share above 1 means that the chip's caches were faster than its memory.
- ``copy_ms``: a copy that moves as many bytes; ``share_of_copy``: its time by this one's.
- ``beside_ms``: what ``beside`` says; ``times_beside``: this one's time by that.
"""
GIGA, TERA, MILLI = 1e9, 1e12, 1e3
FLUSH = 2**28
"""Bytes that are written between two runs on a GPU, so that nothing is found in its caches."""
MOST_SECONDS = 1.0
"""After so long a case is not run again, once it has run :data:`LEAST` times."""
LEAST = 3


def keys(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("operation", "shape", "dtype", "variant"))


class Clock:
    """Seconds of single calls."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the GPU writes this the host gets ahead, so what it takes to launch one kernel is not counted.
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / MILLI

    def rounds(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Seconds of all calls, in turns."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
            call()
        start = time.monotonic()
        gc.collect()
        for index in range(rounds):
            if index >= LEAST and time.monotonic() - start > MOST_SECONDS * len(calls):
                break
            for name, call in calls.items():
                found[name].append(self.seconds(call))
        return found


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock, rounds: int) -> dict[str, float]:
    """``bytes``: read and written in a second by a copy too large for caches; ``flops`` of a large matrix product."""
    on_gpu = device.type == "cuda"
    source = torch.ones(2**29 if on_gpu else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls = {"bytes": lambda: target.copy_(source), "flops": lambda: left @ right}
    amount = {"bytes": 2 * size(source), "flops": 2 * side**3}
    return {name: amount[name] / statistics.median(times) for name, times in clock.rounds(calls, rounds).items()}


def measure(
    cases: Sequence[Case],
    shapes: Sequence[Shape],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
    compiled: bool,
    done: set[tuple[str, ...]] = frozenset(),  # pyright: ignore[reportArgumentType]
) -> Iterator[Row]:
    """A row for each operation, shape and variant, as they come; what belongs to the machine is not in them."""
    clock = Clock(device)
    limits = ceilings(device, dtype, clock, rounds)
    # Shape by shape, so that the first ones are complete where there is not time for all.
    for shape in shapes:
        for case in cases:
            rows = _rows(case, shape, device, dtype, clock, limits, rounds, compiled, done)
            yield from rows
            torch.compiler.reset()


def _rows(
    case: Case,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
    limits: dict[str, float],
    rounds: int,
    compiled: bool,
    done: set[tuple[str, ...]],
) -> list[Row]:
    name = str(dtype).removeprefix("torch.")
    same = {"operation": case.name, "shape": shape.name, "batch": shape.batch, "tokens": shape.tokens, "keep": shape.keep}
    wanted = variants(device, compiled)
    if {keys({**same, "dtype": name, "variant": variant}) for variant in wanted} <= done:
        return []
    try:
        with torch.inference_mode():
            work = case.make(shape, device, dtype)
            calls, errors = _calls(case, work, wanted)
            extra = {"copy": _copy(work.bytes, device)} | ({"beside": work.beside} if work.beside else {})
            times = clock.rounds(calls | extra, rounds)
    except Exception as error:  # too little memory, a kernel that is not there: the others go on
        calls, times, work, errors = {}, {}, None, dict.fromkeys(wanted, _told(error))
    rows = []
    for variant in wanted:
        row = {**same, "dtype": name, "variant": variant}
        if variant in calls and work is not None:
            rows.append(row | _numbers(case, work, variant, times, limits))
        elif variant in errors:
            rows.append(row | {"error": errors[variant]})
    return rows


def variants(device: torch.device, compiled: bool) -> list[str]:
    """On a CPU there is no Triton but its interpreter, whose time says nothing: it shows that the kernels run."""
    interpreter = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    triton = device.type == "cuda" or interpreter
    return [REFERENCE, *([COMPILED] if compiled else []), *([TRITON] if triton else [])]


def _calls(case: Case, work: Work, wanted: Sequence[str]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What can be run, each tried once, and why the rest cannot."""
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, str] = {}
    for variant in wanted:
        if variant == COMPILED and work.plain is None:
            continue
        call = torch.compile(work.plain) if variant == COMPILED and work.plain else _on(variant, work.run)
        try:
            if variant == TRITON:
                _check_kernel(case, call)
            else:
                call()
            calls[variant] = call
        except Exception as error:
            errors[variant] = _told(error)
    return calls, errors


def _check_kernel(case: Case, call: Callable[[], Any]) -> None:
    """Calls an operation, and raises where its reference stepped in for the kernel: a row must not bear a wrong name."""
    kernel = importlib.import_module(f"vlprune.kernels.{case.name.split()[0]}.triton")
    taken: list[bool] = []

    def supports(*given: Any, ask: Callable[..., bool] = kernel.supports) -> bool:
        taken.append(ask(*given))
        return taken[-1]

    with mock.patch.object(kernel, "supports", supports):
        call()
    if not any(taken):
        raise NotImplementedError("the kernel does not take such arguments")


def _on(backend: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with using(backend):
            return run()

    return call


def _copy(amount: int, device: torch.device) -> Callable[[], Any]:
    """A copy that reads and writes ``amount`` bytes together."""
    source = torch.ones(max(1, amount // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _numbers(case: Case, work: Work, variant: str, times: dict[str, list[float]], limits: dict[str, float]) -> Row:
    own = times[variant]
    middle, copy = statistics.median(own), statistics.median(times["copy"])
    rates = {"bytes": work.bytes / middle, "flops": work.flops / middle}
    unit = GIGA if case.limit == "bytes" else TERA
    row: Row = {
        "rounds": len(own),
        **spread(own, "ms", MILLI),
        "gb_per_s": rates["bytes"] / GIGA,
        "tflop_per_s": rates["flops"] / TERA if work.flops else None,
        "ceiling": limits[case.limit] / unit,
        "share_of_ceiling": rates[case.limit] / limits[case.limit],
        "copy_ms": MILLI * copy,
        "share_of_copy": copy / middle,
    }
    if REFERENCE in times:
        row |= paired([old / new for old, new in zip(times[REFERENCE], own, strict=True)], "ratio")
    if work.beside:
        beside = statistics.median(times["beside"])
        row |= {"beside": case.beside, "beside_ms": MILLI * beside, "times_beside": middle / beside}
    return row
