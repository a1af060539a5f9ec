"""What a stage did to an image, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Time on the device between ``start`` and ``stop``, read when somebody asks, so that nothing waits for it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = [self._mark()]

    def stop(self) -> Clock:
        self.marks.append(self._mark())
        return self

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __getstate__(self) -> dict[str, Any]:
        # Events of a device can neither be copied nor pickled.
        return {"cuda": False, "marks": [0.0, self.seconds]}

    @property
    def seconds(self) -> float:
        start, end = self.marks
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


@dataclass(eq=False)
class Step:
    """A stage at one layer.

    ``before``: how many tokens there were, or the step that left them. ``places``: which of the image's placeholders had a
    token afterwards, ``(T,)`` or ``(kv_heads, T)``; negative ones stand for patches that have none. How many these are the
    device knows, so they are left out when somebody asks. ``rows``: in the vision encoder, rows of a tile afterwards,
    [CLS] not counted.
    """

    stage: str
    layer: int | None
    before: int | Step
    places: Tensor
    clock: Clock
    rows: int | None = None

    @property
    def kept(self) -> Tensor:
        """Ascending places ``(T,)`` or ``(kv_heads, T)`` of the tokens that were left."""
        return self.places if self.places.ndim == 2 else self.places[self.places >= 0]

    @property
    def tokens_in(self) -> int:
        return self.before.tokens_out if isinstance(self.before, Step) else self.before

    @property
    def tokens_out(self) -> int:
        return self.kept.shape[-1]
