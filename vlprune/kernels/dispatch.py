"""Chooses what an operation runs on: its Triton kernel, or its reference in PyTorch.

A GPU gets the kernel if Triton works there, everything else the reference. ``VLPRUNE_KERNELS=reference`` in the environment
turns the kernels off; :func:`using` chooses within a block, which is how tests run them in Triton's interpreter.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["reference", "triton"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute with; float64 is the reference's."""

_chosen: Backend | None = None


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Inside the block the operations run on ``backend`` wherever it supports what they are given."""
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def on_triton(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` is to run as a Triton kernel, if it has one for such arguments."""
    if _chosen is not None:
        return _chosen == "triton"
    return tensor.is_cuda and unavailable(tensor.device.index) is None


@functools.cache
def unavailable(device: int | None = None) -> str | None:
    """Why Triton's kernels cannot be used on a GPU, None if they can. Found out once, by running a small one."""
    if os.environ.get("VLPRUNE_KERNELS", "") == "reference":
        return "VLPRUNE_KERNELS=reference is set"
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        from vlprune.kernels.probe import add_one

        add_one(torch.zeros(1, device=f"cuda:{device or 0}"))
    except ImportError:
        return "Triton is not installed"
    except Exception as problem:  # Triton needs a compiler for C and headers of Python, and has many ways to say so
        warnings.warn(f"vlprune runs without its Triton kernels, which do not work here: {problem}", stacklevel=2)
        return str(problem)
    return None
