"""The oracle of law 1: the unpatched model whose layers may not look at the dropped tokens. It masks and never removes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

import vlprune
from tests.zoo import IMAGE

T = TypeVar("T")


def hidden_positions(inputs: dict[str, Tensor], report: vlprune.Report) -> Tensor:
    """Which tokens of the prompt the report's choice dropped: ``(B, L)`` bool."""
    visual = inputs["input_ids"] == IMAGE
    # Before transformers 5.18 the encoder sees every image once a beam.
    copies = max(1, sum(image.total for image in report.images) // max(1, int(visual.sum())))
    images = report.images[::copies]
    flat = torch.cat([_dropped(image) for image in images]) if images else torch.zeros(0, dtype=torch.bool)
    return torch.zeros_like(visual).masked_scatter(visual, flat)


def _dropped(image: Any) -> Tensor:
    dropped = torch.ones(image.total, dtype=torch.bool)
    dropped[image.kept] = False
    return dropped


@contextmanager
def masked(model: Any, inputs: dict[str, Tensor], hidden: Tensor, features: Any = None) -> Iterator[Any]:
    """Inside the block the tokens ``hidden (B, L)`` of the prompt are invisible to all others in every decoder layer.

    ``features``: what the model is to take for its image features, where a method has merged some.
    """
    base = model.model
    handles = [
        layer.register_forward_pre_hook(_Hide(model, inputs["attention_mask"].bool(), hidden), with_kwargs=True)
        for layer in base.language_model.layers
    ]
    if features is not None:
        base.__dict__["get_image_features"] = _Given(base, features)
    try:
        yield model
    finally:
        base.__dict__.pop("get_image_features", None)
        for handle in handles:
            handle.remove()


def pruned_and_masked(model: Any, inputs: dict[str, Tensor], run: Callable[[], T], **options: Any) -> tuple[T, T]:
    """What ``run()`` gives on the pruned ``model``, and on the unpruned one with the dropped tokens of ``inputs`` masked."""
    with vlprune.applied(model, **{"method": "hired", "budget": 0.4, **options}):
        pruned = run()
        hidden = hidden_positions(inputs, vlprune.report(model))
    assert hidden.any()
    with masked(model, inputs, hidden):
        return pruned, run()


class _Given:
    def __init__(self, base: Any, features: Any):
        self.base, self.features = base, features

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(type(self.base).get_image_features.__get__(self.base))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.features


class _Hide:
    def __init__(self, model: Any, real: Tensor, hidden: Tensor):
        self.eager = model.config._attn_implementation == "eager"
        self.real, self.hidden = real, hidden

    def __call__(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        batch, queries = hidden_states.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length(layer.self_attn.layer_idx)) if cache is not None else 0
        if kwargs.get("cache_position") is not None:
            past = int(kwargs["cache_position"][0])
        copies = batch // self.real.shape[0]
        columns = past + queries
        if getattr(cache, "is_compileable", False):
            columns = cache.layers[0].max_cache_len
        seen = torch.ones(batch, columns, dtype=torch.bool)
        prompt = min(self.real.shape[1], columns)
        seen[:, :prompt] = (self.real & ~self.hidden).repeat_interleave(copies, 0)[:, :prompt]
        rows = torch.arange(queries)[:, None] + past
        mask = (rows >= torch.arange(columns)) & seen[:, None]
        # A row that may look at nothing gives NaN; nobody looks at such rows.
        mask = mask | (rows == torch.arange(columns))
        mask = mask[:, None]
        if self.eager:
            floor = torch.finfo(hidden_states.dtype).min
            mask = torch.zeros(mask.shape, dtype=hidden_states.dtype).masked_fill(~mask, floor)
        return args, {**kwargs, "attention_mask": mask}
