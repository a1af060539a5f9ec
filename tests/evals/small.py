"""A run that takes seconds: TinyVLM's architecture with random weights, few questions, batches of four.

As a script, ``python small.py FOLDER`` makes that run; ``--slowly``, so that it can be interrupted. ``accelerate launch``
starts several of it that share the work.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from vlprune.evals import benchmarks, journal, runner
from vlprune.evals.answering import TIMES
from vlprune.evals.batches import Task
from vlprune.evals.journal import Row
from vlprune.evals.processes import Processes
from vlprune.evals.runner import Progress
from vlprune.evals.settings import Setting
from vlprune.evals.tinyvlm import build

SETTINGS = [Setting("none"), Setting("uniform", 0.1), Setting("hired", 24)]
SAMPLES, BATCH_SIZE, NEW_TOKENS = 18, 4, 3
BATCHES = 5


def task(batch_size: int = BATCH_SIZE, **options: Any) -> Task:
    return Task.of("synthvqa", benchmarks.find("synthvqa", **options), batch_size, SAMPLES, NEW_TOKENS)


TASK = task()
EXAMPLES = list(TASK.examples)


def parts() -> tuple[Any, Any]:
    return build.model(0).eval(), build.processor()


def run(
    out: Path,
    *,
    settings: list[Setting] = SETTINGS,
    tasks: list[Task] | None = None,
    model: Any = None,
    processor: Any = None,
    **options: Any,
) -> list[Row]:
    """Rows of a run, in order of settings and samples."""
    if model is None:
        model, processor = parts()
    runner.run(model, processor, tasks or [TASK], settings, out, **{"batch_size": BATCH_SIZE} | options)
    return journal.read_rows(out)


def measured_anew(row: Row) -> dict[str, Any]:
    """A row without its times, which no two runs share."""
    return {key: value for key, value in row.items() if key != TIMES}


def _slowly(_: Progress) -> None:
    time.sleep(0.3)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    together = Processes.join("cpu")
    run(Path(sys.argv[1]), progress=_slowly if "--slowly" in sys.argv else None, processes=together)
    together.leave()
