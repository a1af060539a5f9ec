"""What the host knows goes to the device without anybody waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``.

    A plain copy from the host waits until the GPU has done all that it was given before. From pinned memory it takes its
    place behind that, and the host goes on; the memory is held until it has been read.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
