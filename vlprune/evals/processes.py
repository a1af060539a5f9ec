"""Several processes that share a run, as ``accelerate launch`` or ``torchrun`` starts them; usually there is one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)
"""How long a process that has finished its share waits for the others."""


@dataclass(frozen=True)
class Processes:
    """Which of ``count`` processes this is, and where it computes."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Meets the other processes, by NCCL on GPUs and by gloo on CPUs. ``device``: ``auto``, ``cpu``, ``cuda``, ..."""
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            chosen = "cpu" if on_cpu else "cuda" if device == "auto" else device
            return cls(0, 1, torch.device(chosen))
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, torch.device(state.device or "cpu"))

    @property
    def first(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, in all of them. An exception there is raised in all of them, too."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def same(self, value: Any) -> bool:
        """Whether all processes have an equal ``value``."""
        if self.count == 1:
            return True
        from accelerate.utils import gather_object

        return len(set(gather_object([value]))) == 1

    def leave(self) -> None:
        """Says goodbye to the others, so that none is told off at its end."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


ALONE = Processes(0, 1, torch.device("cpu"))
