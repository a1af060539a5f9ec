"""What tables of measurements are made of: cells, rows, the line that says how it was measured, and their place in a page."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BENCHMARK = "synthvqa"
MEAN, READING = "mean over kinds", "text, form, chart"
"""Numbers of SynthVQA."""

Summary = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text, the others numbers."""
    return "\n".join(map(table_row, [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]))


def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def settings_of(summary: Summary) -> list[Summary]:
    return summary["benchmarks"][BENCHMARK]["settings"]


def name_of(row: Summary) -> str:
    """The method without its options."""
    return row["method"].partition("[")[0]


def budget_of(row: Summary) -> str:
    return "–" if row["method"] == "none" else str(row["budget"])


def tokens_of(row: Summary) -> list[str]:
    """Visual tokens of an image that enter the LLM, as a mean over its layers, and left in the cache."""
    return [f"{row[key]:.0f}" for key in ("tokens", "layer_tokens", "cached_tokens")]


def score_of(row: Summary | None, name: str) -> str:
    """With half of its interval, in percent."""
    if row is None:
        return "–"
    number = row["numbers"][name]
    return f"{100 * number['value']:.1f} % ± {50 * (number['high'] - number['low']):.1f}"


def speed_of(row: Summary) -> list[str]:
    return [f"{row['prefill_ms']:.1f} ms", f"{row['speedup']:.2f}x"]


def conditions(run: Summary) -> str:
    """Model, data, hardware, versions, commit and command."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    hardware, data = run["hardware"], run["benchmarks"][BENCHMARK]
    cores = f", {hardware['cores']} cores" if "cores" in hardware else ""
    return (
        f"{run['model']['name']} on {data['version']}, {data['samples']} questions; {hardware['device']}{cores}; "
        f"{versions}, commit {run['commit']}; `{run['command']}`."
    )


def without_folder(text: str) -> str:
    """Commands do not tell where the rows went."""
    return re.sub(r" --out [^\s`\"]+", "", text)


def fill(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the two marks of ``name``; the first time there is only one."""
    start, end = f"<!-- measured:{name} -->", f"<!-- end of measured:{name} -->"
    old = page.read_text()
    if start not in old:
        sys.exit(f"{page} has no place for its measurement: {start}")
    if end not in old:
        old = old.replace(start, f"{start}\n{end}")
    page.write_text(re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}\n{text}\n{end}", old, flags=re.DOTALL))
