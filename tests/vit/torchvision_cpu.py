"""torchvision as its public wheel holds it, a build for CUDA, beside a torch for the CPU."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

_kept: list[Any] = []
"""Libraries of operators: what they declare goes when they go."""


def importable() -> bool:
    """Imports torchvision if it is installed.

    Beside a torch for the CPU its binary part does not load, and its Python part then misses two operators at import. They
    are declared here, without an implementation, once it has failed: beside a fitting torch they are there already.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError as problem:
        if "torchvision::" not in str(problem):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        importlib.import_module("torchvision")
    return True
