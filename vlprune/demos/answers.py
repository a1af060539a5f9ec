"""One model answers many users: one request at a time, its text as it comes, then what was kept and what it cost."""

from __future__ import annotations

import queue
import statistics
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import vlprune
from vlprune.evals.answering import StepClock, costs_of, make_inputs, now, unpruned_costs
from vlprune.evals.loading import Loaded
from vlprune.visualize import Watched, watched

REPEATS, REPEAT_SECONDS = 5, 0.25
"""A prefill is measured so often, unless the time is up before: single runs of a small model say little."""


@dataclass(frozen=True)
class Question:
    image: Image.Image
    question: str


@dataclass(frozen=True, eq=False)
class Answer:
    """``costs``: those of :func:`vlprune.evals.answering.unpruned_costs` and times in ms; None where nothing was measured.

    ``report`` and ``seen`` are None without a method.
    """

    text: str
    costs: dict[str, float | None]
    report: vlprune.Report | None = None
    seen: Watched | None = None


class Answerer:
    """Answers questions with and without methods. The model runs one request at a time, whoever asks."""

    def __init__(self, loaded: Loaded, max_new_tokens: int):
        self.loaded, self.max_new_tokens = loaded, max_new_tokens
        self.turn = threading.Lock()

    def warm_up(self, image: Image.Image) -> None:
        """The first run of a model takes longer than others; nobody should wait for it."""
        self.answer(Question(image, "?"), None)

    def answer(self, asked: Question, method: vlprune.Method | None) -> Answer:
        *_, last = self.stream(asked, method)
        assert isinstance(last, Answer)
        return last

    def stream(self, asked: Question, method: vlprune.Method | None) -> Iterator[str | Answer]:
        """The text so far, again and again, and at last the answer.

        The work is done by a thread of its own, so the model is free again even where nobody reads on.
        """
        told: queue.SimpleQueue[str | Answer | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(asked, method, told), daemon=True).start()
        while True:
            piece = told.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if isinstance(piece, Answer):
                return

    def _work(self, asked: Question, method: vlprune.Method | None, told: queue.SimpleQueue[Any]) -> None:
        try:
            with self.turn:
                told.put(self._answer(asked, method, told))
        except Exception as error:
            told.put(error)

    def _answer(self, asked: Question, method: vlprune.Method | None, told: queue.SimpleQueue[Any]) -> Answer:
        model, processor = self.loaded.model, self.loaded.processor
        inputs = make_inputs(model, processor, [asked])
        streamer = _Text(processor, told)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            seen = None
            if method is not None:
                stack.enter_context(vlprune.applied(model, method))
                with watched(model) as seen:
                    text, times = self._generate(inputs, streamer)
                report = cast(vlprune.Report, vlprune.report(model))
            else:
                text, times = self._generate(inputs, streamer)
                report = None
            times["prefill_ms"] = self._prefill_ms(inputs, cast(float, times["prefill_ms"]))
        costs = unpruned_costs(model, inputs) if report is None else costs_of(report)
        return Answer(text, {**costs, **times}, report, seen)

    def _generate(self, inputs: Any, streamer: _Text) -> tuple[str, dict[str, float | None]]:
        device = self.loaded.model.device
        clock, memory = StepClock(device), None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = now(device)
        options: Any = {"do_sample": False, "num_beams": 1, "logits_processor": LogitsProcessorList([clock])}
        output = self.loaded.model.generate(**inputs, **options, streamer=streamer, max_new_tokens=self.max_new_tokens)
        if device.type == "cuda":
            memory = float(torch.cuda.max_memory_allocated(device))
        new = output[:, inputs["input_ids"].shape[1] :]
        steps = len(clock.ends) - 1
        times = {
            "prefill_ms": 1000 * (clock.ends[0] - start),
            "decode_ms": 1000 * (clock.ends[-1] - clock.ends[0]) / steps if steps else None,
            "peak_bytes": memory,
        }
        return self.loaded.processor.batch_decode(new, skip_special_tokens=True)[0].strip(), times

    def _prefill_ms(self, inputs: Any, first: float) -> float:
        """The median of a few prefills; that of the answer alone where they take long."""
        device, measured = self.loaded.model.device, []
        while len(measured) < REPEATS and sum(measured) + first < 1000 * REPEAT_SECONDS:
            clock, start = StepClock(device), now(device)
            options: Any = {"do_sample": False, "num_beams": 1, "logits_processor": LogitsProcessorList([clock])}
            self.loaded.model.generate(**inputs, **options, max_new_tokens=1)
            measured.append(1000 * (clock.ends[0] - start))
        return statistics.median(measured) if measured else first


class _Text(BaseStreamer):
    """Tells the text so far with each token; the prompt, which comes first, is no part of it."""

    def __init__(self, processor: Any, told: queue.SimpleQueue[Any]):
        self.processor, self.told = processor, told
        self.tokens: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.told.put(self.processor.batch_decode([self.tokens], skip_special_tokens=True)[0].strip())

    def end(self) -> None:
        pass
