"""Peak memory: as the allocator of a GPU counts it, or on a CPU as the tensors that were alive together."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATOR, TENSORS = "allocator", "tensors"
"""What a peak was counted by: by the allocator weights are included; of tensors, what a forward made, and no workspaces of
libraries."""


class PeakTensors(TorchDispatchMode):
    """Adds up the bytes of tensors that operations make while the mode is on; ``peak`` is the most that were alive at once.

    ``known``: tensors from before, which do not count.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self.known or place in self.alive:
            return
        self.alive[place] = weakref.ref(storage, lambda _: self._free(place, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, place: int, size: int) -> None:
        self.now -= size
        self.alive.pop(place, None)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes that the GPU's allocator had given out at most since :func:`reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
