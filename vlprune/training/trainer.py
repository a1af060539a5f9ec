"""Trains the module of an objective on batches, the model frozen; resumes where it was cut off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlprune
from vlprune.errors import VLPruneError
from vlprune.training.objectives import Objective

Batch = Tensor | Mapping[str, Any] | tuple[Any, Any] | list[Any]
"""Pixels, or the model's arguments by name (``labels`` among them or not), or a pair of one of these and labels."""
INPUT = "pixel_values"


class Trainer:
    """``out``: where the module is saved in the end, and beside it, as ``.part``, the state from which training goes on.

    ``steps`` of AdamW at ``rate``, which falls to zero by a cosine. ``progress`` is told the step and its statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        out: str | Path,
        *,
        steps: int = 500,
        rate: float = 1e-3,
        seed: int = 0,
        save_every: int = 50,
        progress: Callable[[int, dict[str, float]], None] = lambda step, statistics: None,
    ):
        self.model, self.objective, self.out, self.steps = model, objective, Path(out), steps
        self.seed, self.save_every, self.progress = seed, save_every, progress
        self.device = next(model.parameters()).device
        objective.module.to(self.device).train()
        self.optimizer = torch.optim.AdamW(objective.parameters(), lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps))
        self.step = 0

    @property
    def part(self) -> Path:
        return self.out.with_name(f"{self.out.name}.part")

    def run(self, batches: Iterable[Batch]) -> None:
        """Goes through ``batches`` as often as the steps need. Resumed, it passes over those that were seen."""
        self.restore()
        with self._frozen():
            for batch in itertools.islice(_endless(batches), self.step, self.steps):
                statistics = self.learn(batch)
                self.step += 1
                self.progress(self.step, statistics)
                if self.step % self.save_every == 0 and self.step < self.steps:
                    self.save()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.objective.module.eval().save(self.out)
        self.part.unlink(missing_ok=True)

    def learn(self, batch: Batch) -> dict[str, float]:
        """One step; the loss and what the objective tells."""
        inputs, labels = inputs_of(batch, self.device)
        self.objective.generator.manual_seed(self.seed * 1_000_003 + self.step)
        self.objective.active = False
        with torch.no_grad():
            taught = answer_of(self.model, inputs)
        self.objective.active = True
        loss = self.objective.loss(answer_of(self.model, inputs), taught, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return {"loss": loss.item(), **self.objective.statistics()}

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside the block the model is in eval mode, has no gradients, and hides rows; it is as before afterwards."""
        training = {module: module.training for module in self.model.modules()}
        wanted = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            self.model.eval().requires_grad_(False)
            with vlprune.applied(self.model, self.objective):
                yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)

    def save(self) -> None:
        state = {
            "module": self.objective.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }
        self.part.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.part.with_name(f"{self.part.name}.new")
        torch.save(state, fresh)
        fresh.replace(self.part)

    def restore(self) -> None:
        if not self.part.exists():
            return
        state = torch.load(self.part, map_location=self.device, weights_only=True)
        self.objective.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def inputs_of(batch: Batch, device: torch.device) -> tuple[dict[str, Any], Tensor | None]:
    """The model's arguments, and the labels if there are any."""
    inputs, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
    inputs = dict(inputs) if isinstance(inputs, Mapping) else {INPUT: inputs}
    labels = inputs.pop("labels", labels)
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    if not inputs or not any(map(torch.is_tensor, inputs.values())):
        raise VLPruneError(
            "a batch is pixels, a mapping of the model's arguments, or a pair of one of these and labels, not "
            f"{type(batch).__name__}"
        )
    return inputs, None if labels is None else torch.as_tensor(labels).to(device)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        seen = False
        for batch in batches:
            seen = True
            yield batch
        if not seen:
            raise VLPruneError("there are no batches to learn from, or they can be gone through only once")


def answer_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits ``(B, classes)``, or what a model without a classifier gives for the whole image, ``(B, C)``."""
    positional = INPUT in inputs and not hasattr(model, "config")
    rest = {name: value for name, value in inputs.items() if name != INPUT}
    out: Any = model(inputs[INPUT], **rest) if positional else model(**inputs)
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        value = getattr(out, name, None)
        if torch.is_tensor(value):
            out = value
            break
    if not torch.is_tensor(out):
        raise VLPruneError(f"{type(model).__name__} gives neither logits nor features that could be learned from")
    return out.mean(1) if out.ndim == 3 else out
