"""What ``vlprune bench all`` measures, on a GPU, on a CPU, and with tiny sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlprune.bench import jobs, journal, kernel_rows, kernels, load, model, plot, report
from vlprune.bench.rounds import variants
from vlprune.bench.sizes import Size, size_of
from vlprune.errors import VLPruneError
from vlprune.evals import settings as written

if TYPE_CHECKING:
    from rich.console import Console

METHODS = "uniform:1.0:0.4:0.2:0.1,hired,flowcut,mustdrop,fastv,snapkv,random,pool,resize"
FEW = "uniform:1.0:0.4,hired:0.4,snapkv:0.4"
WHOLE = "uniform:1.0"
KINDS = ("kernels", "model")


@dataclass(frozen=True)
class Suite:
    """``models``: sizes, each with how it is measured. ``rounds`` of the kernels."""

    device: torch.device
    dtype: torch.dtype
    shapes: Sequence[kernels.Shape]
    rounds: int
    compiled: bool
    models: Sequence[tuple[Size, jobs.Plan]]


def plan(device: torch.device, smoke: bool = False) -> Suite:
    """The suite of a device."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if smoke:
        tiny = jobs.Plan(_variants(FEW), batches=(1, 2), rounds=3, steps=2, words=16)
        return Suite(device, dtype, [kernels.SHAPES["tiny"]], 3, False, [(size_of("llava-next-tiny"), tiny)])
    if not on_gpu:
        shapes = [kernels.SHAPES[name] for name in kernels.ON_CPU]
        every = jobs.Plan(_variants(METHODS), rounds=15, minutes=45)
        return Suite(device, dtype, shapes, 30, False, [(size_of("llava-next-small"), every)])
    # Small batches wait for the host, large ones compute: more rounds where one takes less.
    attentions = ("sdpa", "flash_attention_2") if importlib.util.find_spec("flash_attn") else ("sdpa",)
    each = 10 / (2 * len(attentions))
    plans = [
        jobs.Plan(_variants(METHODS), attentions, (batch,), rounds, warmup=2, minutes=each)
        for batch, rounds in ((1, 40), (8, 20))
    ]
    shapes = [kernels.SHAPES[name] for name in kernels.ON_GPU]
    return Suite(device, dtype, shapes, 50, True, [(size_of("llava-next-7b"), one) for one in plans])


def _variants(methods: str) -> Any:
    return variants(written.parse(methods, written.BUDGETS))


def run(suite: Suite, kinds: Sequence[str], out: Path, resume: bool, console: Console) -> None:
    """Measures, prints tables, draws; the CSV files are in ``out``."""
    for kind in kinds:
        if kind not in KINDS:
            raise VLPruneError(f"--only: unknown {kind!r}; known are {', '.join(KINDS)}")
    if "kernels" in kinds:
        sink = jobs.Sink(out / "kernels.csv", kernel_rows.COLUMNS, suite.device, resume)
        cases = list(kernels.CASES.values())
        jobs.kernels(cases, suite.shapes, sink, suite.dtype, suite.rounds, suite.compiled, console.print)
        report.print_kernels(sink.rows, console)
    if "model" in kinds:
        sink = jobs.Sink(out / "model.csv", model.COLUMNS, suite.device, resume)
        for size, each in suite.models:
            made = partial(load.of_size, size, suite.device, suite.dtype)
            jobs.models(made, size.name, each, sink, console.print)
        report.print_models(sink.rows, console)
        for path in plot.draw(journal.read(sink.path), out):
            console.print(f"  {path}")
