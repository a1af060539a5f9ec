"""What stands in every row: on what, with what and how it was measured."""

from __future__ import annotations

import datetime
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

import vlprune
from vlprune.evals.runner import git_commit, hardware

COLUMNS = (
    "date",
    "device",
    "cores",
    "threads",
    "vlprune",
    "torch",
    "transformers",
    "triton",
    "commit",
    "command",
)


def conditions(device: torch.device) -> dict[str, Any]:
    """:data:`COLUMNS`. ``cores`` and ``threads`` are a CPU's; ``commit`` ends in "+" if the tree has changes."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **hardware(device),
        "vlprune": vlprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "commit": git_commit(),
        "command": shlex.join(["vlprune", *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
