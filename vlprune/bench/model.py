"""``vlprune bench model``: rows of a model under methods and budgets, next to the unpruned model and to the floor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from vlprune.bench import conditions, floor, memory
from vlprune.bench.floor import Schedule
from vlprune.bench.journal import Row
from vlprune.bench.rounds import Measured, Variant
from vlprune.bench.stats import paired, spread
from vlprune.bench.workload import PARTS, Sample, Workload
from vlprune.evals.settings import UNPRUNED

MILLI, MEBI = 1000, 1 / 2**20
LEAST_SAVING = 0.01
"""Of the unpruned prefill: a floor that saves less saves nothing that could be told from noise."""


def _spread_names(name: str) -> tuple[str, ...]:
    return f"{name}_p20", f"{name}_p50", f"{name}_p80"


def _paired_names(name: str) -> tuple[str, ...]:
    return name, f"{name}_low", f"{name}_high"


WORKLOAD = ("model", "parameters", "dtype", "attention", "batch", "prompt_tokens", "visual_tokens")
SETTING = ("method", "budget", "repeat")
COLUMNS = (
    *WORKLOAD,
    *SETTING,
    "error",
    "rounds",
    "entering",
    "layer_mean",
    "cached",
    *_spread_names("prefill_ms"),
    *_paired_names("speedup"),
    "floor_ms",
    *_paired_names("floor_speedup"),
    *_paired_names("share_of_floor"),
    "share_of_saving",
    "preprocess_ms",
    *(f"{part}_ms" for part in PARTS),
    "selection_share",
    *_spread_names("decode_ms"),
    *_paired_names("decode_speedup"),
    "decode_reference_ms",
    *_paired_names("decode_overhead"),
    "cache_mib",
    "peak_mib",
    "peak_of",
    "gflops",
    "layer_rows",
    *conditions.COLUMNS,
)
"""Of a row.

- ``parameters`` of the whole model. ``prompt_tokens`` and ``visual_tokens`` of one prompt, unpruned. ``repeat`` is 1 for the
  unpruned model's second turn in a round.
- ``entering``, ``layer_mean``, ``cached``: visual tokens of one prompt that enter the LLM, as a mean over its layers, and left
  in the cache, as a mean over them. ``layer_rows``: rows of a sequence, layer by layer, as ``first layer:rows``.
- ``prefill_ms`` of the whole batch, quantiles over rounds; ``vision_ms`` to ``rest_ms``: medians of its parts.
- ``speedup``: unpruned by pruned prefill of the same round, the median and its 95 % interval; ``floor_speedup``: unpruned
  prefill by the floor; ``share_of_floor``: the one by the other; ``share_of_saving``: time saved by time that the floor saves.
- ``selection_share``: selection by the unpruned prefill of the same round.
- ``decode_ms``: each further token of the batch. ``decode_reference_ms``: of the unpatched model whose cache has as many
  entries; ``decode_overhead``: by how much more than that, as a share of it.
- ``cache_mib`` of the batch after the prompt. ``peak_mib``: see :mod:`vlprune.bench.memory`. ``gflops`` of the prefill.
"""


def keys(row: Row) -> tuple[str, ...]:
    """What names a row among those of one machine and version."""
    return tuple(str(row.get(name)) for name in ("model", "dtype", "attention", "batch", "method", "budget", "repeat"))


def workload_columns(workload: Workload) -> Row:
    config = workload.model.config
    return {
        "model": workload.name,
        "parameters": sum(p.numel() for p in workload.model.parameters()),
        "dtype": str(workload.model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
        "batch": workload.batch,
        "prompt_tokens": workload.length,
    }


def setting_columns(variant: Variant) -> Row:
    return {"method": variant.setting.method, "budget": str(variant.setting.budget), "repeat": int(variant.repeat)}


def rows_of(measured: Measured, wanted: Sequence[Variant]) -> list[Row]:
    """A row for each variant, those that failed included; what is the workload's or the machine's is not in them."""
    reference = next((v for v in measured.samples if v.setting.method == UNPRUNED and not v.repeat), None)
    unpruned = measured.samples[reference] if reference else None
    return [setting_columns(variant) | _row(measured, variant, unpruned) for variant in wanted]


def _row(measured: Measured, variant: Variant, unpruned: list[Sample] | None) -> Row:
    samples, schedule = measured.samples.get(variant), measured.schedules.get(variant)
    if variant in measured.errors or not samples or schedule is None:
        return {"error": measured.errors.get(variant, "not measured")}
    row: Row = {"rounds": len(samples), **_tokens(schedule), **_times(samples), **_memory(measured, variant, samples)}
    row["preprocess_ms"] = MILLI * statistics.median(measured.preprocess)
    decodes = measured.decodes.get(schedule.cache_length)
    if decodes and len(decodes) == len(samples):
        row |= _decode(samples, decodes)
    if unpruned and len(unpruned) == len(samples):
        row |= _against(samples, unpruned, _floors(measured, schedule, unpruned))
    return row


def _tokens(schedule: Schedule) -> Row:
    return {
        "visual_tokens": schedule.visual,
        "entering": schedule.entering,
        "layer_mean": schedule.layer_mean,
        "cached": schedule.cached,
        "gflops": schedule.flops / 1e9,
        "layer_rows": " ".join(f"{start}:{length}" for start, _, length in schedule.segments),
    }


def _times(samples: list[Sample]) -> Row:
    parts = {f"{part}_ms": MILLI * statistics.median(s.parts[part] for s in samples) for part in PARTS}
    decode = [statistics.median(sample.decode) for sample in samples]
    return {**spread([s.prefill for s in samples], "prefill_ms", MILLI), **parts, **spread(decode, "decode_ms", MILLI)}


def _memory(measured: Measured, variant: Variant, samples: list[Sample]) -> Row:
    allocated, tensors = samples[-1].peak, measured.peaks.get(variant)
    peak, of = (tensors, memory.TENSORS) if allocated is None else (max(s.peak or 0 for s in samples), memory.ALLOCATOR)
    return {"cache_mib": MEBI * samples[-1].cache, "peak_mib": None if peak is None else MEBI * peak, "peak_of": of}


def _decode(samples: list[Sample], references: list[list[float]]) -> Row:
    ours, theirs = ([statistics.median(each) for each in times] for times in ([s.decode for s in samples], references))
    overheads = [mine / other - 1 for mine, other in zip(ours, theirs, strict=True)]
    return {"decode_reference_ms": MILLI * statistics.median(theirs), **paired(overheads, "decode_overhead")}


def _floors(measured: Measured, schedule: Schedule, unpruned: list[Sample]) -> list[float] | None:
    """Seconds of the floor in each round; None where a part of it could not be measured."""
    if set(schedule.rows) == {max(schedule.rows)} == {_whole(measured)} and schedule.encoder == 1:
        return [sample.prefill for sample in unpruned]
    texts = {length: measured.texts.get(length, []) for length in schedule.rows}
    if any(len(runs) != len(unpruned) for runs in texts.values()):
        return None
    return [
        sample.parts["rest"]
        + schedule.encoder * (sample.parts["vision"] + sample.parts["projector"])
        + floor.llm_seconds(schedule.segments, {length: runs[index] for length, runs in texts.items()})
        for index, sample in enumerate(unpruned)
    ]


def _whole(measured: Measured) -> int:
    """Tokens of an unpruned prompt."""
    return max(max(schedule.rows) for schedule in measured.schedules.values())


def _against(samples: list[Sample], unpruned: list[Sample], floors: list[float] | None) -> Row:
    before, after = ([sample.prefill for sample in listed] for listed in (unpruned, samples))
    decode = [_step(old) / _step(new) for old, new in zip(unpruned, samples, strict=True)]
    shares = [sample.parts["selection"] / whole for sample, whole in zip(samples, before, strict=True)]
    row = {
        **paired([old / new for old, new in zip(before, after, strict=True)], "speedup"),
        **paired(decode, "decode_speedup"),
        "selection_share": statistics.median(shares),
    }
    return row | (_against_floor(before, after, floors) if floors else {})


def _saved(before: list[float], after: list[float]) -> float:
    return statistics.median(old - new for old, new in zip(before, after, strict=True))


def _step(sample: Sample) -> float:
    return statistics.median(sample.decode)


def _against_floor(before: list[float], after: list[float], floors: list[float]) -> Row:
    saves = statistics.median(before) - statistics.median(floors)
    return {
        "floor_ms": MILLI * statistics.median(floors),
        **paired([old / low for old, low in zip(before, floors, strict=True)], "floor_speedup"),
        **paired([low / new for low, new in zip(floors, after, strict=True)], "share_of_floor"),
        # What keeps all tokens saves nothing, of which there is no share.
        "share_of_saving": _saved(before, after) / saves if saves > LEAST_SAVING * statistics.median(before) else None,
    }
