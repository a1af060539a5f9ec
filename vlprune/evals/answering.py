"""A model answers a batch: what it says, what it costs, and what becomes of samples that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import vlprune
import vlprune.integrations  # registers the families of models
from vlprune import flops
from vlprune.engine.family import IMAGE, TOKENS, family_of
from vlprune.errors import VLPruneError
from vlprune.evals.batches import Task
from vlprune.evals.benchmarks.base import Example
from vlprune.evals.journal import Row
from vlprune.evals.kept import Kept, by_sample, kept_of
from vlprune.evals.settings import UNPRUNED, Setting

TIMES = "times"
"""Where a row has what no two runs share."""
LONGEST_MESSAGE = 600
"""Characters of an error that are kept."""
LOST = ("device-side assert", "illegal memory access", "unspecified launch failure", "misaligned address")
"""What CUDA says when nothing more can be computed in this process."""


class DeviceLostError(VLPruneError):
    """The GPU refuses all further work of this process."""


class StepClock(LogitsProcessor):
    """Notes when each forward of ``generate`` has ended; leaves the scores alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ends.append(now(self.device))
        return scores


def now(device: torch.device) -> float:
    """Seconds, once everything that was launched on ``device`` has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def patched(model: Any, setting: Setting) -> contextlib.AbstractContextManager[Any]:
    if setting.method == UNPRUNED:
        return contextlib.nullcontext()
    return vlprune.applied(model, setting.make())


def make_inputs(model: Any, processor: Any, batch: Sequence[Any], instruction: str = "") -> Any:
    """What the processor makes of the prompts of a batch, padded on the left, on the model's device.

    Examples have an ``image`` and a ``question``, to which ``instruction`` is appended on a line of its own.
    """
    prompts = []
    for example in batch:
        question = f"{example.question}\n{instruction}" if instruction else example.question
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    images = [example.image for example in batch]
    # LLaVA takes no token types, yet with transformers 4 a tokenizer returns them unless it was saved without.
    options = {"padding": True, "padding_side": "left", "return_token_type_ids": False, "return_tensors": "pt"}
    return processor(images=images, text=prompts, **options).to(model.device, dtype=model.dtype)


@dataclass
class Answering:
    """Answers batches under settings by greedy decoding; ``session`` is noted with the times."""

    model: Any
    processor: Any
    session: int = 0
    warm: set[str] = field(default_factory=set)
    _prepared: dict[tuple[str, ...], Any] = field(default_factory=dict)
    _images: dict[str, Example | str] = field(default_factory=dict)
    _at: tuple[str, int] | None = None

    def answer(self, setting: Setting, task: Task, index: int) -> list[Row]:
        """The rows of batch ``index`` under a setting, which on its first turn answers the batch once unrecorded."""
        self._turn_to(task, index)
        batch = task.batches[index]
        readable = [shown for one in batch if isinstance(shown := self._images[one.id], Example)]
        with patched(self.model, setting):
            if readable and setting.label not in self.warm:
                self.warm.add(setting.label)
                # A batch that fails is recorded below.
                with contextlib.suppress(Exception):
                    self._generate(readable, task.max_new_tokens)
            measured = dict(zip((one.id for one in readable), self._answer(setting, task, readable), strict=True))
        return [self._row(setting, task, index, one, measured) for one in batch]

    def _turn_to(self, task: Task, index: int) -> None:
        """Decodes the images of a batch, once for all settings that take their turn on it."""
        if self._at == (task.key, index):
            return
        self._at = (task.key, index)
        self._prepared.clear()
        self._images.clear()
        for example in task.batches[index]:
            try:
                self._images[example.id] = dataclasses.replace(example, picture=example.image)
            except Exception as error:
                self._images[example.id] = _message(error)

    def _row(self, setting: Setting, task: Task, index: int, example: Example, measured: dict[str, Row]) -> Row:
        row: Row = {"benchmark": task.key, "method": setting.method, "budget": setting.budget}
        row |= {"batch": index, "id": example.id, "prediction": None, "score": 0.0, "error": None}
        unreadable = self._images[example.id]
        row |= {"error": unreadable} if isinstance(unreadable, str) else measured[example.id]
        try:
            return row | {"score": float(task.benchmark.score(example, row["prediction"]))}
        except Exception as error:
            return row | {"error": row["error"] or f"no score: {_message(error)}"}

    def _answer(self, setting: Setting, task: Task, batch: list[Example]) -> list[Row]:
        """Where a batch fails, for want of memory or whatever else, each half of it is tried; a single sample is recorded."""
        if not batch:
            return []
        try:
            return self._measure(setting, task, batch)
        except Exception as error:
            _raise_if_lost(error, task, batch)
            message = _message(error)
        # Not before the exception is gone: it holds the tensors of all that it went through.
        _release_memory()
        if len(batch) == 1:
            return [{"error": message}]
        middle = (len(batch) + 1) // 2
        return self._answer(setting, task, batch[:middle]) + self._answer(setting, task, batch[middle:])

    def _measure(self, setting: Setting, task: Task, batch: list[Example]) -> list[Row]:
        inputs, answers, steps, times = self._generate(batch, task.max_new_tokens)
        if setting.method == UNPRUNED:
            costs, kept = unpruned_costs(self.model, inputs), None
        else:
            report = cast(vlprune.Report, vlprune.report(self.model))
            costs, kept = costs_of(report), _kept(self.model, report, inputs)
            times["selection_seconds"] = report.selection_seconds
        shares = {name: value / len(batch) for name, value in costs.items()}
        same = {"batch_size": len(batch), **shares, "steps": steps}
        return [
            {"prediction": answer, **same, "kept": kept[place] if kept else None, TIMES: dict(times)}
            for place, answer in enumerate(answers)
        ]

    def _generate(self, batch: list[Example], max_new_tokens: int) -> tuple[Any, list[str], int, dict[str, Any]]:
        """Inputs, answers, forwards after the first, and seconds of the batch."""
        key = tuple(example.id for example in batch)
        if key not in self._prepared:
            self._prepared[key] = make_inputs(self.model, self.processor, batch)
        inputs = self._prepared[key]
        clock = StepClock(self.model.device)
        start = now(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList([clock]),
            )
        steps = len(clock.ends) - 1
        times = {
            "session": self.session,
            "prefill_seconds": clock.ends[0] - start,
            "selection_seconds": None,
            "decode_seconds_per_token": (clock.ends[-1] - clock.ends[0]) / steps if steps else None,
        }
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return inputs, [answer.strip() for answer in answers], steps, times


# ------------------------------------------------------------------ costs


def costs_of(report: vlprune.Report) -> dict[str, float]:
    """Tokens, operations and bytes of a pruned pass, by the names that rows have them under."""
    return {
        "visual_tokens": report.total,
        "tokens": report.entering,
        "layer_tokens": report.layer_mean,
        "cached_tokens": report.cached,
        "flops": report.flops,
        "cache_bytes": report.kv_bytes,
    }


def unpruned_costs(model: Any, inputs: Any) -> dict[str, float]:
    """What a report of a patch that does nothing would say of a batch, without running one."""
    family = family_of(model)
    parts = family.parts(model)
    config, layers = parts.text.config, len(parts.text_layers)
    layouts = family.seams[IMAGE](model, dict(inputs))
    total = sum(layout.total for layout in layouts)
    batch, length = inputs["input_ids"].shape
    per_token = 2 * layers * config.num_key_value_heads * flops.head_width(config) * torch.finfo(parts.text.dtype).bits // 8
    text = batch * flops.text(parts, [length] * layers, [0] * layers)
    return {
        "visual_tokens": total,
        "tokens": total,
        "layer_tokens": float(total),
        "cached_tokens": float(total),
        "flops": text + sum(flops.vision(parts, layout, layout.grid) for layout in layouts),
        "cache_bytes": per_token * batch * length,
    }


def _kept(model: Any, report: vlprune.Report, inputs: Any) -> list[list[Kept]] | None:
    """Kept tokens of the images of each sample; None where it is not known which image is whose."""
    family = family_of(model)
    layouts = family.seams[IMAGE](model, dict(inputs))
    if len(layouts) != len(report.images):
        return None
    config = model.config
    tokens = [token for name in TOKENS[IMAGE] if (token := getattr(config, name, None)) is not None]
    placeholders = (inputs["input_ids"] == tokens[0]).sum(1).tolist() if tokens else []
    return by_sample(kept_of(report, layouts, len(family.parts(model).text_layers)), placeholders)


# ------------------------------------------------------------------ failures


def _message(error: Exception) -> str:
    """Without addresses in memory, which no two runs share."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")[:LONGEST_MESSAGE]


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _raise_if_lost(error: Exception, task: Task, batch: list[Example]) -> None:
    """Everything after such an error fails as well, and must not be recorded as if the samples were to blame."""
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
        raise DeviceLostError(
            f"the GPU gave up at {task.key}, samples {batch[0].id} to {batch[-1].id} ({_message(error)}): all batches before "
            "are kept; the same command goes on from there, with CUDA_LAUNCH_BLOCKING=1 it tells the place"
        ) from error
