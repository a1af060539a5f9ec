"""What ``vlprune bench all`` measures, on a GPU, on a CPU, and with tiny sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import vlprune
from vlprune.bench import (
    METHODS,
    jobs,
    journal,
    kernel_rows,
    kernels,
    load,
    model,
    plot,
    report,
    vit,
    vit_names,
    vit_report,
)
from vlprune.bench.rounds import Variant, variants
from vlprune.bench.sizes import Size, size_of
from vlprune.errors import VLPruneError
from vlprune.evals import settings as written

if TYPE_CHECKING:
    from rich.console import Console

FEW = "uniform:1.0:0.4,hired:0.4,snapkv:0.4"
KINDS = ("kernels", "model", "vit")
MINUTES = 8.0
"""Each, at most, on a GPU: for all kernels, and for all models beside loading and warming up."""


@dataclass(frozen=True)
class Suite:
    """``models``: sizes, each with how it is measured. ``rounds`` and ``minutes`` of the kernels. ``vits`` share a plan."""

    device: torch.device
    dtype: torch.dtype
    shapes: Sequence[kernels.Shape]
    rounds: int
    compiled: bool
    minutes: float | None
    models: Sequence[tuple[Size, jobs.Plan]]
    vits: Sequence[vit.VitSize]
    vit_plan: vit.VitPlan


def plan(device: torch.device, smoke: bool = False) -> Suite:
    """The suite of a device."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if smoke:
        tiny = jobs.Plan(variants_of(FEW), batches=(1, 2), rounds=2, steps=2, words=16)
        few = vit.VitPlan(variants_of("tome", "0.5"), batch=2, rounds=2)
        models = [(size_of("llava-next-tiny"), tiny)]
        return Suite(device, dtype, [kernels.SHAPES["tiny"]], 2, on_gpu, None, models, [vit.SIZES["tiny"]], few)
    vits = [vit.SIZES[name] for name in vit_names.MODELS.split(",")]
    merging = vit.VitPlan(variants_of(vit_names.METHODS, vit_names.BUDGETS), minutes=2 if on_gpu else 12)
    if not on_gpu:
        shapes = [kernels.SHAPES[name] for name in kernels.ON_CPU]
        every = jobs.Plan(variants_of(methods()), rounds=15, minutes=10)
        return Suite(device, dtype, shapes, 30, False, None, [(size_of("llava-next-small"), every)], vits, merging)
    # Small batches wait for the host, large ones compute: more rounds where one takes less.
    attentions = ("sdpa", "flash_attention_2") if importlib.util.find_spec("flash_attn") else ("sdpa",)
    each = MINUTES / (2 * len(attentions))
    plans = [
        jobs.Plan(variants_of(methods()), attentions, (batch,), rounds, warmup=3, minutes=each)
        for batch, rounds in ((1, 40), (8, 20))
    ]
    shapes = [kernels.SHAPES[name] for name in kernels.ON_GPU]
    models = [(size_of("llava-next-7b"), one) for one in plans]
    return Suite(device, dtype, shapes, 50, True, MINUTES, models, vits, merging)


def methods() -> str:
    """Those that are measured by default."""
    return METHODS + (",divprune" if "divprune" in vlprune.methods() else "")


def variants_of(methods: str, budgets: str = written.BUDGETS) -> list[Variant]:
    """What is written, checked: a method or option that does not exist fails here."""
    settings = written.parse(methods, budgets)
    for setting in settings:
        if setting.method != written.UNPRUNED:
            setting.make()
    return variants(settings)


def run(suite: Suite, kinds: Sequence[str], out: Path, resume: bool, console: Console) -> None:
    """Measures, prints tables, draws; the CSV files are in ``out``."""
    for kind in kinds:
        if kind not in KINDS:
            raise VLPruneError(f"--only: unknown {kind!r}; known are {', '.join(KINDS)}")
    if "kernels" in kinds:
        sink = jobs.Sink(out / "kernels.csv", kernel_rows.COLUMNS, suite.device, resume)
        cases = list(kernels.CASES.values())
        jobs.kernels(cases, suite.shapes, sink, suite.dtype, suite.rounds, suite.compiled, console.print, suite.minutes)
        report.print_kernels(sink.rows, console)
    if "model" in kinds:
        sink = jobs.Sink(out / "model.csv", model.COLUMNS, suite.device, resume)
        for size, each in suite.models:
            made = partial(load.of_size, size, suite.device, suite.dtype)
            jobs.models(made, size.name, each, sink, console.print)
        report.print_models(sink.rows, console)
        for path in plot.draw(journal.read(sink.path), out):
            console.print(f"  {path}")
    if "vit" in kinds:
        sink = jobs.Sink(out / "vit.csv", vit.COLUMNS, suite.device, resume)
        for one in suite.vits:
            vit.measure(one, suite.vit_plan, sink, suite.dtype, console.print)
        vit_report.show(sink.rows, console)
        for path in vit_report.draw(journal.read(sink.path), out):
            console.print(f"  {path}")
