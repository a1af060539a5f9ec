"""From the rows of a run to summaries: what each method at each budget scored on a benchmark, cost, and changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlprune.errors import VLPruneError
from vlprune.evals import benchmarks, compare
from vlprune.evals.answering import TIMES
from vlprune.evals.benchmarks.base import Benchmark
from vlprune.evals.journal import Row, label_of, read_manifest, read_rows
from vlprune.evals.settings import UNPRUNED, Setting

SMALLER_IMAGE = "resize"
"""The baseline whose wrong answers tell which samples need a full image."""

Summary = dict[str, Any]
"""A benchmark under one method at one budget, see :func:`summarise`."""


@dataclass(frozen=True)
class Run:
    """The folder of a run: its manifest, and its rows by benchmark."""

    out: Path
    manifest: Row
    rows: dict[str, list[Row]]

    @classmethod
    def read(cls, out: Path) -> Run:
        manifest = read_manifest(out)
        if not manifest:
            raise VLPruneError(f"{out} holds no run: vlprune eval --out {out} would make one")
        rows: dict[str, list[Row]] = {name: [] for name in manifest.get("benchmarks", {})}
        for row in read_rows(out):
            rows[row["benchmark"]].append(row)
        return cls(out, manifest, {name: found for name, found in rows.items() if found})

    @property
    def model(self) -> str:
        return self.manifest["model"]["name"]

    def benchmark(self, name: str) -> Benchmark:
        data = self.manifest["benchmarks"][name]
        return benchmarks.find(data["name"], **data["options"])

    def summaries(self) -> dict[str, list[Summary]]:
        """Of each benchmark, one for each setting."""
        return {name: summarise(rows, self.benchmark(name)) for name, rows in self.rows.items()}

    def to_dict(self, summaries: dict[str, list[Summary]]) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        data = self.manifest["benchmarks"]
        return {"run": self.manifest, "benchmarks": {name: data[name] | {"settings": s} for name, s in summaries.items()}}


# ------------------------------------------------------------------ one benchmark


def summarise(rows: Iterable[Row], benchmark: Benchmark) -> list[Summary]:
    """One summary for each method and budget, in order of appearance.

    - ``headline`` names the first of ``numbers``, which are the benchmark's scores of all samples; ``score`` is that one,
      ``categories`` are its counterparts for each category; all with 95 % intervals, bootstrapped over samples.
    - ``difference`` to the unpruned model, sample by sample: see :mod:`vlprune.evals.compare`; ``agreement``: share of
      samples with the same answer; ``small_image_fails``: mean score of the samples that a smaller image of as many visual
      tokens gets wrong, unless that baseline was not measured at this budget. None where there is nothing to compare with.
    - ``tokens``: visual tokens of an image that enter the LLM, of ``visual_tokens`` that it has; ``layer_tokens``: mean over
      the LLM's layers; ``cached_tokens``: left in the cache after the prompt, mean over layers. Means over samples.
    - ``prefill_ms``: from the call of ``generate`` to the end of the first forward, vision encoder and selection included,
      divided by the batch size; median over batches. ``speedup``: unpruned by pruned time of the same batch; median.
    - ``selection_ms``: what the method itself took of it, of one sample; median over batches.
    - ``decode_ms``: one further token for the whole batch; median over batches.
    - ``gflops`` of the prefill and ``cache_kib`` (1024 bytes) of the cache after it, of one sample; means.
    """
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(label_of(row), []).append(row)
    return [_summary(group, by_setting, benchmark) for group in by_setting.values()]


def _summary(rows: list[Row], by_setting: dict[str, list[Row]], benchmark: Benchmark) -> Summary:
    method, budget = rows[0]["method"], rows[0]["budget"]
    unpruned = by_setting.get(Setting(UNPRUNED).label, [])
    smaller = by_setting.get(Setting(SMALLER_IMAGE, budget).label, [])
    found = benchmark.summary(rows)
    return {
        "method": method,
        "budget": budget,
        "samples": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "headline": found.headline,
        "score": asdict(found.main),
        "numbers": {name: asdict(number) for name, number in found.numbers.items()},
        "categories": {name: asdict(number) for name, number in found.categories.items()},
        "difference": _difference(rows, unpruned) if method != UNPRUNED else None,
        "agreement": _agreement(rows, unpruned),
        "small_image_fails": _on_failures(rows, smaller),
        **_costs(rows, unpruned),
    }


def _difference(rows: list[Row], unpruned: list[Row]) -> Summary | None:
    mine, theirs = _common(rows, unpruned)
    return asdict(compare.difference(mine, theirs)) if mine else None


def _agreement(rows: list[Row], unpruned: list[Row]) -> float | None:
    mine, theirs = _common(rows, [row for row in unpruned if row["prediction"] is not None])
    return compare.agreement(mine, theirs) if mine else None


def _on_failures(rows: list[Row], smaller: list[Row]) -> Summary | None:
    mine, theirs = _common(rows, smaller)
    found = compare.on_failures(mine, theirs) if mine else None
    return asdict(found) if found is not None else None


def _common(rows: list[Row], others: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the samples that both have, in the same order; a run that goes on may have more of one."""
    theirs = {row["id"]: row for row in others}
    mine = [row for row in rows if row["id"] in theirs]
    return mine, [theirs[row["id"]] for row in mine]


# ------------------------------------------------------------------ costs


def _costs(rows: list[Row], unpruned: list[Row]) -> Summary:
    measured = [row for row in rows if TIMES in row]
    prefill, reference = _prefill(measured), _prefill([row for row in unpruned if TIMES in row])
    return {
        "tokens": _mean(row["tokens"] for row in measured),
        "layer_tokens": _mean(row["layer_tokens"] for row in measured),
        "cached_tokens": _mean(row["cached_tokens"] for row in measured),
        "visual_tokens": _mean(row["visual_tokens"] for row in measured),
        "batch_size": max((row["batch_size"] for row in measured), default=None),
        "prefill_ms": _median(1000 * seconds for seconds in prefill.values()),
        "speedup": _median(reference[batch] / prefill[batch] for batch in prefill if batch in reference),
        "selection_ms": _median(1000 * seconds for seconds in _by_batch(measured, _selection_seconds).values()),
        "decode_ms": _median(1000 * seconds for seconds in _by_batch(measured, _decode_seconds).values()),
        "gflops": _mean(row["flops"] / 1e9 for row in measured),
        "cache_kib": _mean(row["cache_bytes"] / 1024 for row in measured),
    }


def _prefill(rows: list[Row]) -> dict[int, float]:
    return _by_batch(rows, lambda row: row[TIMES]["prefill_seconds"] / row["batch_size"])


def _selection_seconds(row: Row) -> float | None:
    seconds = row[TIMES]["selection_seconds"]
    return None if seconds is None else seconds / row["batch_size"]


def _decode_seconds(row: Row) -> float | None:
    return row[TIMES]["decode_seconds_per_token"]


def _by_batch(rows: list[Row], seconds: Callable[[Row], float | None]) -> dict[int, float]:
    """One value for each batch that ran at full size: a rest, or a batch that was taken apart, has other times."""
    full = max((row["batch_size"] for row in rows), default=0)
    found = {row["batch"]: seconds(row) for row in rows if row["batch_size"] == full}
    return {batch: value for batch, value in found.items() if value is not None}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


# ------------------------------------------------------------------ several benchmarks


def overview(summaries: dict[str, list[Summary]]) -> list[Summary]:
    """Settings that all benchmarks have: the headline of each, and how much of the unpruned score is left on average.

    ``scores``: by benchmark; ``relative``: mean over benchmarks of the score by the unpruned one, None without that.
    """
    common = [{Setting(s["method"], s["budget"]).label: s for s in of_benchmark} for of_benchmark in summaries.values()]
    labels = [label for label in common[0] if all(label in found for found in common)] if common else []
    unpruned = [found.get(Setting(UNPRUNED).label) for found in common]
    return [_across(list(summaries), [found[label] for found in common], unpruned) for label in labels]


def _across(names: Sequence[str], found: Sequence[Summary], unpruned: Sequence[Summary | None]) -> Summary:
    ratios = [
        mine["score"]["value"] / whole["score"]["value"]
        for mine, whole in zip(found, unpruned, strict=True)
        if whole is not None and whole["score"]["value"]
    ]
    return {
        "method": found[0]["method"],
        "budget": found[0]["budget"],
        "layer_tokens": _mean(s["layer_tokens"] for s in found if s["layer_tokens"] is not None),
        "scores": {name: s["score"] for name, s in zip(names, found, strict=True)},
        "relative": statistics.fmean(ratios) if len(ratios) == len(found) else None,
    }
