"""Faults that were found in the stages once, each with what showed it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vlprune
from tests import zoo
from vlprune.image import CacheTokens, ImageLayout, LayerTokens, ModelShape, centres
from vlprune.method import Method, Plan, Selection
from vlprune.signals import Hidden, QueryAttention, Signal, Values

VOTES = QueryAttention(1, mean_heads=True)


@cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    return zoo.build(family, attention)


@dataclass(kw_only=True)
class Falling(Method):
    """After the prompt and after every second token two entries leave in layer 1, other ones in each head if ``by_head``."""

    adaptive = True
    needs = (VOTES,)
    seen: ClassVar[list[tuple[int, dict[Signal, Tensor]]]] = []
    by_head: bool = True

    @property
    def every(self) -> int:
        return 2

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(layout.total, cached={1: layout.total})

    def evict(self, tokens: CacheTokens) -> Selection:
        self.seen.append((tokens.new_tokens, dict(tokens.signals)))
        index = torch.arange(tokens.keys.shape[1] - 2)
        return Selection(torch.stack([index, index + 2]) if self.by_head else index)


@dataclass(kw_only=True)
class Watching(Falling):
    needs = (QueryAttention(1), Values(1, tower="text"), Hidden(1, tower="text"))


@pytest.fixture(autouse=True)
def forget():
    Falling.seen.clear()


def signals_of(method: Method, attention: str = "sdpa") -> list[tuple[int, dict[Signal, Tensor]]]:
    """What :class:`Falling` saw while six tokens were generated."""
    model = model_of("llava", attention)
    Falling.seen.clear()
    with vlprune.applied(model, method):
        zoo.generate(model, zoo.prompt("llava"), 6)
    assert [new for new, _ in Falling.seen] == [0, 2, 4]
    return list(Falling.seen)


def test_a_mean_over_heads_of_which_each_has_its_own_entries():
    """The attention is one row, the entries are a row a head."""
    assert [tuple(signals[VOTES].shape) for _, signals in signals_of(Falling())] == [(1, 1, 16), (2, 1, 14), (2, 1, 12)]


@pytest.mark.parametrize("by_head", [False, True])
def test_attention_of_generated_tokens(by_head):
    """A single query without a mask sees all keys, not the first one only. Of its rows an image has none."""
    method = Watching(by_head=by_head)
    for (_, mine), (_, eager) in zip(signals_of(method), signals_of(method, "eager"), strict=True):
        assert mine.keys() == eager.keys()
        for signal, value in mine.items():
            torch.testing.assert_close(value, eager[signal], atol=1e-4, rtol=0)
    assert [len(signals) for _, signals in Falling.seen] == [3, 1, 1]


def test_rows_of_a_new_image_behind_entries_that_differ_between_heads():
    """In a second turn the cache has a row map a head; what the turn adds has one row in all heads."""
    model, method = model_of("llava"), Watching()
    first, second = zoo.prompt("llava"), zoo.prompt("llava", seed=1)
    with vlprune.applied(model, method), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.long)
        model(**{**second, "attention_mask": mask}, past_key_values=cache)
    assert [signals[Values(1, tower="text")].shape[1] for _, signals in Falling.seen] == [16, 16]
    with vlprune.applied(model, Watching(by_head=False)), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        model(**{**second, "attention_mask": mask}, past_key_values=cache)
    for signal in (Values(1, tower="text"), Hidden(1, tower="text")):
        assert Falling.seen[1][1][signal].shape == Falling.seen[3][1][signal].shape


@dataclass(kw_only=True)
class Counting(Method):
    """Notes how often it has been asked about an image."""

    asked: ClassVar[list[int]] = []

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(layout.total, {1: 8, 2: 4})

    def prefill(self, tokens: LayerTokens) -> Selection:
        tokens.notes["asked"] = tokens.notes.get("asked", torch.zeros(())) + 1
        self.asked.append(int(tokens.notes["asked"]))
        return Selection(torch.arange(tokens.count))


def test_beams_have_notes_of_their_own():
    """They share an image, not what becomes of it inside the LLM."""
    model, inputs = model_of("llava"), zoo.prompt("llava")
    with vlprune.applied(model, Counting()), torch.no_grad():
        Counting.asked.clear()
        zoo.generate(model, inputs, 2, num_beams=3)
        assert Counting.asked == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("family", "method"), [("llava", "resize"), ("llava_next", "pool"), ("qwen2_vl", "mustdrop")])
def test_training_after_inference_mode(family, method):
    """What is remembered of an image's layout can be part of a graph."""
    model, inputs = zoo.build(family), zoo.prompt(family)
    with vlprune.applied(model, method, budget=zoo.budget(method, 0.31)):
        with torch.inference_mode():
            assert not centres((97, 3), (5, 2)).is_inference()
            model(**inputs)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.lm_head.parameters())
