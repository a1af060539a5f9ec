"""``vlprune bench vit``: vision transformers on their own under methods and budgets, next to the unpatched model."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlprune
from vlprune.bench import conditions
from vlprune.bench.jobs import Sink
from vlprune.bench.journal import Row
from vlprune.bench.rounds import LEAST, Variant, in_turn
from vlprune.bench.stats import paired, spread
from vlprune.bench.timing import quiet, settled, synchronise
from vlprune.blocks import BlockMethod
from vlprune.errors import VLPruneError
from vlprune.report import Report

MILLI = 1000
COLUMNS = (
    *("model", "parameters", "dtype", "attention", "batch", "tokens"),
    *("method", "budget", "repeat", "error", "rounds", "layer_mean"),
    *("forward_ms_p20", "forward_ms_p50", "forward_ms_p80"),
    *("speedup", "speedup_low", "speedup_high"),
    *("arithmetic_speedup", "images_per_s", "reduction_ms", "gflops"),
    *conditions.COLUMNS,
)
"""Of a row.

- ``tokens`` of an image, protected ones not counted; ``layer_mean``: what is left, as a mean over the blocks.
- ``forward_ms`` of the whole batch; ``speedup``: unpatched by patched forward of the same round, the median and its 95 %
  interval. ``arithmetic_speedup``: what the arithmetic in the blocks that is left would allow, attention and linear layers.
- ``reduction_ms``: what choosing and merging took of the forward, median; on a CPU alone, since on a GPU a clock around it
  would make the host wait.
"""


@dataclass(frozen=True)
class VitSize:
    """A published vision transformer, to be built with random weights; ``kind`` is its class in transformers."""

    name: str
    kind: str
    width: int
    blocks: int
    heads: int
    image: int
    patch: int

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(
            hidden_size=self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            image_size=self.image,
            patch_size=self.patch,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.kind}Model")._from_config(config, attn_implementation="sdpa")
        return model.to(device=device, dtype=dtype).eval()


SIZES = {
    size.name: size
    for size in (
        VitSize("vit-b/16", "ViT", 768, 12, 12, 224, 16),
        VitSize("vit-l/14-336", "CLIPVision", 1024, 24, 16, 336, 14),
        VitSize("tiny", "ViT", 64, 4, 4, 64, 8),
    )
}


@dataclass(frozen=True)
class VitPlan:
    """``minutes``: after which no new round of a model begins, once there were some; None for no limit."""

    variants: Sequence[Variant]
    batch: int = 8
    rounds: int = 10
    minutes: float | None = None


def keys(row: Row) -> tuple[str, ...]:
    """What names a row among those of one machine and version."""
    return tuple(str(row.get(name)) for name in ("model", "dtype", "batch", "method", "budget", "repeat"))


def measure(size: VitSize, plan: VitPlan, sink: Sink, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """Rows of one model, each variant once in every round. One that fails becomes a row with its error."""
    name = str(dtype).removeprefix("torch.")
    same: Row = {"model": size.name, "dtype": name, "attention": "sdpa", "batch": plan.batch}
    done = sink.done(keys)
    missing = [variant for variant in plan.variants if keys({**same, **_setting(variant)}) not in done]
    if not missing:
        return
    # The first two are the unpatched model, which the others of the same rounds are compared with.
    wanted = [*plan.variants[:2], *(variant for variant in missing if variant not in plan.variants[:2])]
    model = size.build(sink.device, dtype)
    same["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    pixels = torch.randn(plan.batch, 3, size.image, size.image, generator=torch.Generator().manual_seed(0))
    forward = Forward(model, pixels.to(sink.device, dtype))
    seconds = _rounds(forward, wanted, plan, lambda text: say(f"{size.name}, batch {plan.batch}: {text}"))
    unpatched = seconds[wanted[0]]
    for variant in wanted:
        sink.add({**same, **_setting(variant), **forward.facts.get(variant, {}), **_times(variant, seconds, unpatched, plan)})
    del forward, model
    gc.collect()


class Forward:
    """One forward of a batch under a variant, in seconds, and what is known of each variant."""

    def __init__(self, model: Any, pixels: Tensor):
        self.model, self.pixels = model, pixels
        self.facts: dict[Variant, Row] = {}
        self.reductions: dict[Variant, list[float]] = {}

    @torch.inference_mode()
    def run(self, variant: Variant) -> float:
        """Seconds. The method is put in and taken out outside of the clock."""
        method = variant.method
        with vlprune.applied(self.model, method) if method else contextlib.nullcontext(), quiet(self.pixels.device):
            clock = Clock(method) if method and not self.pixels.is_cuda else None
            start = time.perf_counter()
            self.model(pixel_values=self.pixels)
            synchronise(self.pixels.device)
            taken = time.perf_counter() - start
            if clock:
                self.reductions.setdefault(variant, []).append(clock.seconds)
            return taken

    @torch.inference_mode()
    def warm_up(self, variant: Variant) -> None:
        """An unmeasured run, which tells what is left."""
        # The unpatched model cannot tell what it computes, so a patch that does nothing does.
        method = variant.method or vlprune.ToMe(r=0)
        with vlprune.applied(self.model, method):
            self.model(pixel_values=self.pixels)
            report = vlprune.report(self.model)
        assert not isinstance(report, Report)
        self.facts[variant] = {
            "tokens": report.total,
            "layer_mean": report.layer_mean,
            "arithmetic_speedup": report.flops_unpruned / report.flops,
            "gflops": report.flops / 1e9,
        }
        self.reductions.pop(variant, None)


class Clock:
    """Adds up what a method's choosing and merging takes, on a CPU."""

    def __init__(self, method: BlockMethod):
        self.seconds = 0.0
        for name in ("reduce", "merge"):
            setattr(method, name, self._timed(getattr(method, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _rounds(
    forward: Forward, wanted: Sequence[Variant], plan: VitPlan, say: Callable[[str], None]
) -> dict[Variant, list[float]]:
    """Seconds of each variant, one a round; a variant that failed has none."""
    seconds: dict[Variant, list[float]] = {}
    with settled():
        for variant in wanted:
            say(f"warming up {variant.label}")
            try:
                forward.warm_up(variant)
                seconds[variant] = []
            except (VLPruneError, RuntimeError, MemoryError) as error:
                forward.facts[variant] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        start = time.monotonic()
        for index in range(plan.rounds):
            if plan.minutes is not None and index >= LEAST and time.monotonic() - start > 60 * plan.minutes:
                break
            say(f"round {index + 1} of {plan.rounds}")
            for variant in in_turn(list(seconds), index):
                seconds[variant].append(forward.run(variant))
    for variant in seconds:
        forward.facts[variant] |= _reduction(forward, variant)
    return seconds


def _reduction(forward: Forward, variant: Variant) -> Row:
    taken = forward.reductions.get(variant)
    return {"reduction_ms": MILLI * statistics.median(taken)} if taken else {}


def _setting(variant: Variant) -> Row:
    return {"method": variant.setting.method, "budget": str(variant.setting.budget), "repeat": int(variant.repeat)}


def _times(variant: Variant, seconds: dict[Variant, list[float]], unpatched: list[float], plan: VitPlan) -> Row:
    if variant not in seconds:
        return {}
    taken = seconds[variant]
    return {
        "rounds": len(taken),
        **spread(taken, "forward_ms", MILLI),
        **paired([before / after for before, after in zip(unpatched, taken, strict=True)], "speedup"),
        "images_per_s": plan.batch / statistics.median(taken),
    }
