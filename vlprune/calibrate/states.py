"""How far a pruned model is from the unpruned one: by the hidden states from which its answers are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList

import vlprune
from vlprune.method import Method


@dataclass(frozen=True, eq=False)
class Answered:
    """A batch as the unpruned model answered it.

    ``inputs``: the model's, padded on the left. ``answer (samples, steps)`` int64: what it said. ``states (steps, samples,
    width)`` float32: the last token's hidden states behind the last layer, from which each of these was read.
    ``counts (steps, samples)`` bool: false where a sample's answer had ended.
    """

    inputs: Any
    answer: Tensor
    states: Tensor
    counts: Tensor


class _Dictated(LogitsProcessor):
    """Has ``generate`` say ``answer``, whatever the model would say."""

    def __init__(self, answer: Tensor):
        self.answer, self.step = answer, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = self.answer[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, said, 0.0)


@contextmanager
def _noted(model: Any) -> Iterator[list[Tensor]]:
    """The last token's hidden states ``(samples, width)`` of each forward inside the block."""
    states: list[Tensor] = []

    def note(_: Any, given: tuple[Tensor, ...]) -> None:
        states.append(given[0][:, -1].float())

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield states
    finally:
        handle.remove()


def answered(model: Any, inputs: Any, steps: int) -> Answered:
    """What the unpruned model says to a batch in at most ``steps`` tokens, and its states at each of them."""
    with vlprune.applied(model, "uniform", budget=1.0):  # in place of what may be applied; it changes nothing
        answer, states = _generated(model, inputs, steps)
    ends = model.generation_config.eos_token_id
    ended = torch.isin(answer, torch.tensor([] if ends is None else ends, dtype=answer.dtype, device=answer.device)).long()
    return Answered(inputs, answer, states, (ended.cumsum(1) - ended == 0).T)


def distance(model: Any, method: Method, batch: Answered) -> Tensor:
    """1 - cosine between states with and without ``method``, as a mean over the answer: ``(samples,)`` float32.

    The model is shown the unpruned model's answer, so that states belong to the same texts. With an answer of one token this
    is the objective of VFlowOpt, which looks at the prompt's last token; more of them see what has left the cache.
    """
    with vlprune.applied(model, method):
        _, states = _generated(model, batch.inputs, batch.answer.shape[1], LogitsProcessorList([_Dictated(batch.answer)]))
    apart = 1.0 - functional.cosine_similarity(states, batch.states, dim=-1)
    return (apart * batch.counts).sum(0) / batch.counts.sum(0)


def _generated(model: Any, inputs: Any, steps: int, processors: Any = None) -> tuple[Tensor, Tensor]:
    """New tokens ``(samples, steps)``, and the states they were read from ``(steps, samples, width)``."""
    with torch.inference_mode(), _noted(model) as states:
        said = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=steps, logits_processor=processors)
    return said[:, inputs["input_ids"].shape[1] :], torch.stack(states)
