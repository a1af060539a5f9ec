"""Puts the measurement in a results folder into the documents: README, docs/results, one table for each method.

Usage: ``python docs/publish.py results/eval``
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def main(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    (DOCS / "images").mkdir(exist_ok=True)
    shutil.copy(results / "accuracy.png", DOCS / "images" / "accuracy.png")
    shutil.copy(results / "summary.json", DOCS / "results" / "summary.json")
    table = (results / "table.md").read_text()
    (DOCS / "results" / "README.md").write_text(
        f"# Measured\n\n{table}\n![Accuracy against visual tokens](../images/accuracy.png)\n"
    )
    settings = summary["settings"]
    by_method = {s["method"]: [t for t in settings if t["method"] == s["method"]] for s in settings}
    unpruned = by_method.pop("none")
    for method, rows in by_method.items():
        text = f"{_conditions(summary['run'])}\n\n{_table(unpruned + rows)}\n"
        text += "\nAll methods in one table and picture: [results](../results/README.md)."
        _fill(DOCS / "methods" / f"{method}.md", method, text)
    best = [row for rows in by_method.values() for row in rows if row["budget"] in (0.4, 0.2)]
    _fill(DOCS.parent / "README.md", "readme", f"{_conditions(summary['run'])}\n\n{_table(unpruned + best)}")


def _conditions(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    hardware = run["hardware"]
    cores = f", {hardware['cores']} cores" if "cores" in hardware else ""
    return (
        f"{run['model']['name']} on {run['data']['name']}, {run['data']['samples']} questions; {hardware['device']}{cores}; "
        f"{versions}, commit {run['commit']}; `{run['command']}`."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    head = "| method | budget | visual tokens | mean accuracy | text, form, chart | agreement | prefill | speed-up |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        scores = [f"{100 * row[k]['value']:.1f} % ± {50 * (row[k]['high'] - row[k]['low']):.1f}" for k in ("mean", "reading")]
        budget = "–" if row["method"] == "none" else row["budget"]
        cells = [row["method"], budget, f"{row['tokens']:.0f}", *scores, f"{100 * row['agreement']:.1f} %"]
        cells += [f"{row['prefill_ms']:.1f} ms", f"{row['speedup']:.2f}x"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _fill(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the two marks of ``name``; the first time there is only one."""
    start, end = f"<!-- measured:{name} -->", f"<!-- end of measured:{name} -->"
    old = page.read_text()
    if end not in old:
        old = old.replace(start, f"{start}\n{end}")
    page.write_text(re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}\n{text}\n{end}", old, flags=re.DOTALL))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
