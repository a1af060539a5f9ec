"""A run that takes seconds: TinyVLM's architecture with random weights, few questions, batches of four.

As a script, ``python small.py FOLDER`` makes that run, slowly, so that it can be interrupted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from vlprune.evals import runner, synthvqa
from vlprune.evals.runner import Progress, Row
from vlprune.evals.settings import Setting
from vlprune.evals.tinyvlm import build

SETTINGS = [Setting("none"), Setting("uniform", 0.1), Setting("hired", 24)]
EXAMPLES = list(synthvqa.examples("test", 18))
BATCHES = 5


def parts() -> tuple[Any, Any]:
    return build.model(0).eval(), build.processor()


def run(
    out: Path, *, settings: list[Setting] = SETTINGS, model: Any = None, processor: Any = None, **options: Any
) -> list[Row]:
    if model is None:
        model, processor = parts()
    options = {"batch_size": 4, "max_new_tokens": 3} | options
    return runner.run(model, processor, EXAMPLES, settings, out, **options)


def measured_anew(row: Row) -> dict[str, Any]:
    """A row without its times, which no two runs share."""
    return {key: value for key, value in row.items() if "seconds" not in key}


def _slowly(_: Progress) -> None:
    time.sleep(0.4)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    run(Path(sys.argv[1]), progress=_slowly)
