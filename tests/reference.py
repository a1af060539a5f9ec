"""The oracle of law 1: the unpatched model whose layers may not look at the dropped tokens. It masks and never removes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import vlprune
from tests.media import IMAGE, VIDEO

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Dropped:
    """Which tokens of a prompt are gone, layer by layer.

    ``reading[l] (B, L)`` bool: while the prompt is read; ``writing[l] (B, kv_heads or 1, L)``: while text is generated, and
    ``later[n][l]`` the same from the time on that the method was asked again, once ``every * (n + 1)`` tokens were new.
    """

    reading: list[Tensor]
    writing: list[Tensor]
    later: list[list[Tensor]] = field(default_factory=list)
    every: int = 1

    def at(self, layer: int, new: int) -> Tensor:
        """What is gone from the cache of a layer that holds ``new`` generated tokens."""
        turns = [self.writing, *self.later]
        return turns[min(max(new, 0) // self.every, len(turns) - 1)][layer]

    @property
    def entering(self) -> Tensor:
        return self.reading[0]

    def any(self) -> bool:
        return any(bool(layer.any()) for layer in self.writing)

    @classmethod
    def of(cls, hidden: Tensor, layers: int) -> Dropped:
        """The same tokens in all layers."""
        return cls([hidden] * layers, [hidden[:, None]] * layers)


def dropped(model: Any, inputs: dict[str, Tensor], report: vlprune.Report, every: int | None = None) -> Dropped:
    """What the report says that was dropped from the prompt, and, ``every`` so many new tokens, from the cache again."""
    layers = len(text_layers(model))
    images = _distinct(inputs, report)
    reading = [_scattered(inputs, [_gone(image, _kept_at(image, layer)) for image in images]) for layer in range(layers)]
    turns = max(
        (sum(s.name == "evict" and s.layer == layer for s in i.stages) for i in images for layer in range(layers)), default=0
    )
    writing, *later = [_written(inputs, images, layers, turn) for turn in range(max(turns, 1) if every else 1)]
    return Dropped(reading, writing, later, every or 1)


def _written(inputs: dict[str, Tensor], images: list[Any], layers: int, turn: int) -> list[Tensor]:
    """What is gone from the cache of each layer after the method was asked ``turn`` times more."""
    writing = []
    for layer in range(layers):
        answers = [[s.kept for s in image.stages if s.name == "evict" and s.layer == layer] for image in images]
        evicted = [kept[min(turn, len(kept) - 1)] if kept else None for kept in answers]
        heads = max([len(kept) for kept in evicted if kept and isinstance(kept[0], list)], default=1)
        chosen = [
            [
                _gone(image, _of_head(kept, head) if kept is not None else _kept_at(image, layer))
                for image, kept in zip(images, evicted, strict=True)
            ]
            for head in range(heads)
        ]
        writing.append(torch.stack([_scattered(inputs, head) for head in chosen], 1))
    return writing


def hidden_positions(inputs: dict[str, Tensor], report: vlprune.Report) -> Tensor:
    """Which tokens of the prompt did not enter the LLM: ``(B, L)`` bool."""
    return _scattered(inputs, [_gone(image, image.kept) for image in _distinct(inputs, report)])


def _distinct(inputs: dict[str, Tensor], report: vlprune.Report) -> list[Any]:
    """Each image once. Before transformers 5.18 the encoder sees the images of a prompt once a beam."""
    counts = ((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)).sum(1).tolist()
    copies = max(1, sum(image.total for image in report.images) // max(1, sum(counts)))
    remaining, distinct = list(report.images), []
    for count in counts:
        own: list[Any] = []
        while sum(image.total for image in own) < count:
            own.append(remaining.pop(0))
        del remaining[: len(own) * (copies - 1)]
        distinct += own
    return distinct


def _scattered(inputs: dict[str, Tensor], gone: list[Tensor]) -> Tensor:
    """The report lists a sequence's images before its videos."""
    ids = inputs["input_ids"]
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    flags = iter(torch.cat(gone).tolist() if gone else [])
    for sample in range(ids.shape[0]):
        for token in (IMAGE, VIDEO):
            for place in (ids[sample] == token).nonzero()[:, 0]:
                hidden[sample, place] = next(flags)
    return hidden


def _kept_at(image: Any, layer: int) -> list[int]:
    kept = image.kept
    for stage in image.stages:
        if stage.name == "prefill" and stage.layer <= layer:
            kept = stage.kept
    return kept


def _of_head(kept: list[Any], head: int) -> list[int]:
    return kept[head] if kept and isinstance(kept[0], list) else kept


def _gone(image: Any, kept: list[int]) -> Tensor:
    gone = torch.ones(image.total, dtype=torch.bool)
    gone[kept] = False
    return gone


def text_layers(model: Any) -> list[Any]:
    base = model.model
    return list((base.text_model if hasattr(base, "text_model") else base.language_model).layers)


@contextmanager
def masked(
    model: Any,
    inputs: dict[str, Tensor],
    hidden: Tensor | Dropped,
    features: Any = None,
    changed: dict[int, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[Any]:
    """Inside the block dropped tokens of the prompt are invisible to all others, in the layers where they are gone.

    ``features``: what the model is to take for its image features (and video features, in a tuple with them), where a method
    has changed some. ``changed``: layer -> what happens to the hidden states ``(B, L, D)`` of the prompt before it.
    """
    base, layers = model.model, text_layers(model)
    gone = hidden if isinstance(hidden, Dropped) else Dropped.of(hidden, len(layers))
    real = inputs["attention_mask"].bool()
    handles = [
        layer.register_forward_pre_hook(_Hide(model, index, real, gone, (changed or {}).get(index)), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    given = features if isinstance(features, dict) else {} if features is None else {"get_image_features": features}
    for name, value in given.items():
        base.__dict__[name] = _Given(base, name, value)
    try:
        yield model
    finally:
        for name in given:
            base.__dict__.pop(name, None)
        for handle in handles:
            handle.remove()


def pruned_and_masked(model: Any, inputs: dict[str, Tensor], run: Callable[[], T], **options: Any) -> tuple[T, T]:
    """What ``run()`` gives on the pruned ``model``, and on the unpruned one with the dropped tokens of ``inputs`` masked."""
    with vlprune.applied(model, **{"method": "hired", "budget": 0.4, **options}):
        pruned = run()
        gone = dropped(model, inputs, vlprune.report(model))
    assert gone.any()
    with masked(model, inputs, gone):
        return pruned, run()


class _Given:
    def __init__(self, base: Any, name: str, features: Any):
        self.base, self.name, self.features = base, name, features

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(getattr(type(self.base), self.name).__get__(self.base))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.features


class _Hide:
    """Replaces a layer's mask by the model's own one with more hidden columns, a mask a query head where heads differ."""

    def __init__(self, model: Any, index: int, real: Tensor, gone: Dropped, change: Callable[[Tensor], Tensor] | None = None):
        config = model.config.get_text_config()
        self.eager = config._attn_implementation == "eager"
        self.heads = config.num_attention_heads
        types = getattr(config, "layer_types", None)
        self.window = config.sliding_window if types and types[index] == "sliding_attention" else None
        self.index, self.real, self.gone, self.change = index, real, gone, change

    def __call__(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        batch, queries = hidden_states.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length(layer.self_attn.layer_idx)) if cache is not None else 0
        if kwargs.get("cache_position") is not None:
            past = int(kwargs["cache_position"][0])
        columns = past + queries
        if getattr(cache, "is_compileable", False):
            columns = cache.layers[0].max_cache_len
        mask = self._own(kwargs.get("attention_mask"), batch, past, queries, columns)
        start = self.real.shape[1]
        gone = self.gone.reading[self.index][:, None] if past == 0 else self.gone.at(self.index, past - start)
        seen = self.real[:, None] & ~gone
        prompt = min(seen.shape[2], columns)
        shown = torch.ones(*seen.shape[:2], columns, dtype=torch.bool)
        shown[:, :, :prompt] = seen[:, :, :prompt]
        shown = shown.repeat_interleave(batch // shown.shape[0], 0)[:, :, columns - mask.shape[3] :]
        mask = mask & (
            shown[:, :, None] if shown.shape[1] == 1 else shown.repeat_interleave(self.heads // shown.shape[1], 1)[:, :, None]
        )
        # A row that may look at nothing gives NaN; nobody looks at such rows.
        rows = torch.arange(queries)[:, None] + past
        mask = mask | (rows == torch.arange(columns - mask.shape[3], columns))
        if self.eager:
            floor = torch.finfo(hidden_states.dtype).min
            mask = torch.zeros(mask.shape, dtype=hidden_states.dtype).masked_fill(~mask, floor)
        kwargs = {**kwargs, "attention_mask": mask}
        if self.change is None or past:
            return args, kwargs
        changed = self.change(hidden_states)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def _own(self, mask: Any, batch: int, past: int, queries: int, columns: int) -> Tensor:
        """What the model itself lets see: ``(B, 1, queries, columns)`` bool, fewer columns where a window has moved on."""
        if mask is not None and mask.ndim == 4:
            mask = mask if mask.dtype == torch.bool else mask >= 0
            return mask.expand(batch, 1, queries, mask.shape[3]).clone()
        rows, every = torch.arange(queries)[:, None] + past, torch.arange(columns)
        causal = rows >= every
        if self.window is not None:
            causal = causal & (rows - every < self.window)
            causal = causal[:, -min(columns, self.window - 1 + queries) :]
        return causal.expand(batch, 1, queries, -1).clone()
