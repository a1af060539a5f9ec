"""Around the language model: logical outside of its decoder layers, physical inside.

Hooks on the base model learn which tokens are visual, hooks on the text model turn the chosen tokens into rows, and a hook
on each decoder layer translates what enters it: hidden states, rotary tables, positions, masks. Everything else, generate()
included, goes on in lengths that count every token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlprune.engine import cache as caches
from vlprune.engine import masks
from vlprune.engine.encoder import Chosen, EncoderHooks
from vlprune.engine.family import Parts
from vlprune.engine.rows import RowMap, put, right_align, take
from vlprune.errors import VLPruneError

CONTEXT = "vlprune_context"


@dataclass(eq=False)
class Prefill:
    """What the last forward with images was like; :mod:`vlprune.report` reads it.

    Rows of a sequence, new ones and those that were in the cache before, counted logically and physically.
    """

    chosen: list[Chosen]
    batch: int
    logical: int
    physical: int
    past_logical: int
    past_physical: int


@dataclass(eq=False)
class Forward:
    """One pass through the text model. ``rows (B, n)``: logical rows kept of this pass, None for all of them."""

    batch: int
    length: int
    past: int
    row_map: RowMap
    rows: Tensor | None
    cache: Any
    flash: bool
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def slots(self) -> int | None:
        """Size of a static cache, None for one that grows."""
        return caches.slots(self.cache) if self.cache is not None and caches.is_static(self.cache) else None

    def once(self, name: str, make: Any) -> Any:
        """All layers share what the first one computed."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]


class LayerHook:
    """Pre-hook of one decoder layer; an object, so that it can be copied and pickled with the model."""

    def __init__(self, hooks: DecoderHooks, first: bool):
        self.hooks, self.first = hooks, first

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.hooks.enter_layer(self.first, args, kwargs)


class DecoderHooks:
    """The language model's side of a patch. One forward at a time, like the model's own state."""

    def __init__(self, model: nn.Module, parts: Parts, encoder: EncoderHooks):
        self.model, self.parts, self.encoder = model, parts, encoder
        self.visual: Tensor | None = None
        self.forward: Forward | None = None
        self.prefill: Prefill | None = None

    def install(self) -> list[Any]:
        base, text = self.parts.base, self.parts.text
        handles = [
            base.register_forward_pre_hook(self.enter_base, with_kwargs=True),
            base.register_forward_hook(self.leave_base, always_call=True),
            text.register_forward_pre_hook(self.enter_text, with_kwargs=True),
            text.register_forward_hook(self.leave_text, always_call=True),
        ]
        for index, layer in enumerate(self.parts.text_layers):
            handles.append(layer.register_forward_pre_hook(LayerHook(self, index == 0), with_kwargs=True))
        return handles

    # ------------------------------------------------------------------ base model

    def enter_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        encoded = kwargs.get("mm_encoder_outputs")
        self.visual = None
        self.encoder.expect(encoded)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        embeddings = kwargs.get("inputs_embeds")
        if input_ids is not None:
            prompt = input_ids.shape[1] > 1
        else:
            prompt = embeddings is not None and bool(encoded or kwargs.get("pixel_values") is not None)
        if prompt:
            self.visual = self.parts.family.placeholders(self.model, input_ids, embeddings)

    def leave_base(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.visual = None

    # ------------------------------------------------------------------ text model

    def enter_text(self, text: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.forward = None
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            return None
        visual = self.visual
        chosen = self.encoder.chosen if visual is not None else None
        pruning = chosen is not None and any(choice.keep is not None for choice in chosen)
        cache = kwargs.get("past_key_values")
        old = caches.row_map(cache)
        if pruning:
            caches.check(cache)
        if chosen is None and old is None:
            return None
        if pruning and cache is None and self._caches(text, kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=text.config)
        batch, length = embeddings.shape[:2]
        past = self._past(cache, kwargs, chosen)
        rows, row_map = None, old
        if pruning:
            assert chosen is not None
            assert visual is not None
            rows, filler = self._rows(chosen, visual, kwargs.get("attention_mask"), past)
            head = old or RowMap.identity(batch, past, embeddings.device)
            row_map = head.extended(rows, past, length, filler)
        if chosen is not None:
            physical = length if rows is None else rows.shape[1]
            held = past - (0 if old is None else old.dropped)
            self.prefill = Prefill(chosen, batch, length, physical, past, held)
        if row_map is None:
            return None
        flash = "flash" in (text.config._attn_implementation or "")
        self.forward = Forward(batch, length, past, row_map, rows, cache, flash)
        if text.training and torch.is_grad_enabled():
            # Checkpointing runs the layers again during backward, when no forward is under way (transformers < 5.23).
            kwargs[CONTEXT] = self.forward
        return args, kwargs

    def leave_text(self, text: nn.Module, args: tuple, out: Any) -> Any:
        forward, self.forward = self.forward, None
        if forward is None or forward.rows is None or out is None:
            return None
        if forward.cache is not None:
            caches.adopt(forward.cache, forward.row_map)
        out.last_hidden_state = put(out.last_hidden_state, forward.rows, forward.length)
        return out

    @staticmethod
    def _caches(text: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the text model will make a cache by itself."""
        use = kwargs.get("use_cache")
        use = text.config.use_cache if use is None else use
        return bool(use) and not (text.training and text.gradient_checkpointing)

    @staticmethod
    def _past(cache: Any, kwargs: dict[str, Any], chosen: list[Chosen] | None) -> int:
        """Logical tokens in the cache. A decode step with a ready-made mask does not need them, so nothing is read back."""
        if cache is None:
            return 0
        if chosen is None and caches.is_static(cache) and getattr(kwargs.get("attention_mask"), "ndim", 0) == 4:
            return 0
        return int(cache.get_seq_length())

    def _rows(self, chosen: list[Chosen], visual: Tensor, mask: Any, past: int) -> tuple[Tensor, bool]:
        """Kept rows ``(B, n)`` of this pass, and whether some of them are filler."""
        batch, length = visual.shape
        order = assign(chosen, visual)
        flat = [self._mask_of(choice, visual.device) for sample in order for choice in sample]
        alive = (~visual).masked_scatter(visual, torch.cat(flat)) if flat else ~visual
        padding = masks.padding(mask, past, length, batch)
        if padding is None:
            lengths = [length - sum(c.layout.total - c.kept for c in sample) for sample in order]
        else:
            alive = alive & ~padding.to(alive.device)
            lengths = alive.sum(1).tolist()
        return right_align(alive, max(lengths)), min(lengths) < max(lengths)

    @staticmethod
    def _mask_of(choice: Chosen, device: torch.device) -> Tensor:
        if choice.keep is None:
            return torch.ones(choice.layout.total, dtype=torch.bool, device=device)
        mask = torch.zeros(choice.layout.total, dtype=torch.bool, device=device)
        return mask.index_fill_(0, choice.keep.to(device), True)

    # ------------------------------------------------------------------ decoder layers

    def enter_layer(self, first: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
        forward = self.forward
        if CONTEXT in kwargs:
            kwargs = dict(kwargs)
            forward = kwargs.pop(CONTEXT)
        if forward is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if first and forward.rows is not None:
            hidden = take(hidden, forward.rows, 1)
        changed = self._translate(forward, kwargs)
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _translate(self, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, in physical rows and columns."""
        rows = forward.rows
        changed = dict(kwargs)
        if rows is not None:
            tables = kwargs["position_embeddings"]
            changed["position_embeddings"] = forward.once("rotary", lambda: tuple(take(t, rows, 1) for t in tables))
            if kwargs.get("position_ids") is not None:
                # Gaps in position ids look like packed sequences to flash attention.
                position_ids = kwargs["position_ids"]
                changed["position_ids"] = None if forward.flash else forward.once("ids", lambda: take(position_ids, rows, 1))
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = self._cache_position(forward, kwargs["cache_position"])
        mask = kwargs.get("attention_mask")
        changed["attention_mask"] = forward.once(
            "mask",
            lambda: masks.physical(mask, forward.row_map, rows, forward.past, forward.length, forward.slots, forward.flash),
        )
        return changed

    @staticmethod
    def _cache_position(forward: Forward, logical: Tensor) -> Tensor:
        """Slots that this pass writes to (transformers before 5.4 tells the layers)."""
        if forward.rows is None:
            return logical - forward.row_map.shift
        count = forward.rows.shape[1]
        return torch.arange(count, device=logical.device) + (forward.row_map.prefix.shape[1] - count)


def assign(chosen: list[Chosen], visual: Tensor) -> list[list[Chosen]]:
    """The images of each sequence of the batch, in order; beams of a prompt share its images.

    ``visual (B, L)`` bool. Raises :class:`VLPruneError` where images and placeholders disagree.
    """
    total = sum(choice.layout.total for choice in chosen)
    batch = visual.shape[0]
    if batch == 1 and visual.is_cuda:
        # Everything belongs to the one sequence; asking the device for its count would wait for it.
        return [chosen]
    counts = visual.sum(1).tolist()
    copies, rest = divmod(sum(counts), total) if total else (0, 1)
    problem = VLPruneError(
        f"the prompt holds {sum(counts)} placeholders of visual tokens where the images give {total}: pass each prompt "
        "whole and with its own images (a prefill in chunks cannot be pruned)"
    )
    if rest or copies == 0 or batch % copies:
        raise problem
    remaining = iter(chosen)
    order: list[list[Chosen]] = []
    for sample in range(0, batch, copies):
        images: list[Chosen] = []
        while sum(choice.layout.total for choice in images) < counts[sample]:
            image = next(remaining, None)
            if image is None:
                raise problem
            images.append(image)
        if sum(choice.layout.total for choice in images) != counts[sample]:
            raise problem
        order.extend([images] * copies)
    return order
