"""Around the language model: logical outside of its decoder layers, physical inside.

Hooks on the base model learn which tokens are visual, hooks on the text model turn the chosen tokens into rows, and a hook
on each decoder layer translates what enters it: hidden states, rotary tables, positions, masks. Everything else, generate()
included, goes on in lengths that count every token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlprune.engine import cache as caches
from vlprune.engine import masks, stages
from vlprune.engine.devices import to_device
from vlprune.engine.encoder import Chosen, EncoderHooks
from vlprune.engine.family import Parts
from vlprune.engine.rows import RowMap, Take, put, take, take_tables
from vlprune.engine.sequence import Image, Sequence
from vlprune.engine.stages import Ledger, Pass
from vlprune.engine.text_signals import TextSignals
from vlprune.errors import VLPruneError
from vlprune.method import Method

CONTEXT = "vlprune_context"


@dataclass(eq=False)
class Prefill:
    """What the last forward with images was like; :mod:`vlprune.report` reads it.

    ``physical``: rows of a sequence at each layer, ``held``: entries of each layer's cache before, ``cached``: afterwards;
    ``logical`` and ``past`` count every token.
    """

    images: list[Image]
    batch: int
    logical: int
    past: int
    physical: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Passed:
    """What happened before one layer: ``changes`` of the hidden states, in order, then ``rows (B, n)`` as they were in it.

    Kept, since checkpointing runs the layers again during backward. ``alive``: each image's tokens. ``row_map``: of the
    layer's cache once the layer has run, ``left``: after eviction.
    """

    changes: list[Callable[[Tensor], Tensor]]
    rows: Tensor | None
    version: int
    filler: bool
    alive: list[Tensor]
    row_map: RowMap | None = None
    left: RowMap | None = None


@dataclass(eq=False)
class Forward:
    """One pass through the text model.

    ``now``: what the method's stages are told of it. ``mask``: as the text model was given it. ``old``: the row map of each
    layer's cache before the pass, ``group``: a number for each of them. ``ledger``: the images whose entries the method may
    evict, None if it is not asked. ``passed``: what was found at the layers so far, ``finished``: how many of them need
    nothing any more that was measured in them.
    """

    batch: int
    length: int
    past: int
    cache: Any
    attention: str
    now: Pass
    mask: Any
    old: list[RowMap | None]
    group: list[int]
    types: Listing[str] | None
    ledger: Ledger | None = None
    passed: dict[int, Passed] = field(default_factory=dict)
    finished: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def sequence(self) -> Sequence | None:
        """The prompt under way, None where nothing can leave."""
        return self.now.sequence

    @property
    def flash(self) -> bool:
        return "flash" in self.attention

    @property
    def ends(self) -> int:
        """Logical tokens after the pass."""
        return self.past + self.length

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """Layers that hold the same tokens share what the first one computed."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def kind(self, layer: int) -> tuple[int, int, str]:
        """What layers have in common that share rows, columns and masks."""
        return self.group[layer], self.passed[layer].version, self.types[layer] if self.types else ""

    def held(self, layer: int) -> int:
        """Physical entries of the layer's cache before the pass."""
        if self.cache is not None and caches.is_sliding(self.cache, layer):
            return caches.stored(self.cache, layer)
        old = self.old[layer]
        return self.past - (0 if old is None else old.dropped)


class LayerHook:
    """Pre-hook of one decoder layer; an object, so that it can be copied and pickled with the model."""

    def __init__(self, hooks: DecoderHooks, layer: int):
        self.hooks, self.layer = hooks, layer

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.hooks.enter_layer(self.layer, args, kwargs)


class DeepStack:
    """Stands in for the text model's way of adding features of earlier vision blocks: only rows that are alive get some."""

    def __init__(self, hooks: DecoderHooks):
        self.hooks = hooks

    def __call__(self, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        forward, text = self.hooks.forward, self.hooks.parts.text
        if forward is not None and forward.sequence is not None and forward.sequence.rows is not None:
            rows = forward.sequence.rows
            number = (visual.flatten().cumsum(0) - 1).view_as(visual)
            full = take(features[number.clamp(min=0).flatten()].view(*visual.shape, -1), rows, 1)
            alive = (visual.gather(1, rows.clamp(min=0)) & (rows >= 0))[..., None]
            return hidden + (full * alive).to(hidden.device, hidden.dtype)
        if forward is not None and forward.now.signals is not None:
            # Some versions of transformers add in place, to what a signal of the layer may be.
            hidden = hidden.clone()
        return type(text)._deepstack_process(text, hidden, visual, features)


class DecoderHooks:
    """The language model's side of a patch. One forward at a time, like the model's own state."""

    def __init__(self, model: nn.Module, parts: Parts, method: Method, encoder: EncoderHooks):
        self.model, self.parts, self.method, self.encoder = model, parts, method, encoder
        self.visual: Tensor | None = None
        self.forward: Forward | None = None
        self.prefill: Prefill | None = None
        self.drafts = 0
        self.unpadded = False

    def install(self) -> list[Any]:
        base, text = self.parts.base, self.parts.text
        handles = [
            base.register_forward_pre_hook(self.enter_base, with_kwargs=True),
            base.register_forward_hook(self.leave_base, always_call=True),
            text.register_forward_pre_hook(self.enter_text, with_kwargs=True),
            text.register_forward_hook(self.leave_text, always_call=True),
        ]
        if {"prefill", "evict"} & set(self.method.stages):
            handles.append(self.model.register_forward_pre_hook(self.enter_model, with_kwargs=True))
        for index, layer in enumerate(self.parts.text_layers):
            handles.append(layer.register_forward_pre_hook(LayerHook(self, index), with_kwargs=True))
        if hasattr(text, "_deepstack_process"):
            text.__dict__["_deepstack_process"] = DeepStack(self)
        return handles

    def uninstall(self) -> None:
        self.parts.text.__dict__.pop("_deepstack_process", None)

    # ------------------------------------------------------------------ model and base model

    def enter_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Learns how many tokens at the end are no prompt: drafts of assisted decoding, answers that are being scored."""
        wanted = kwargs.get("logits_to_keep")
        self.drafts = max(wanted - 1, 0) if isinstance(wanted, int) else 0

    def enter_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        encoded = kwargs.get("mm_encoder_outputs")
        self.visual = None
        self.unpadded = kwargs.get("attention_mask") is None
        self.encoder.cache = kwargs.get("past_key_values")
        self.encoder.expect(encoded)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        embeddings = kwargs.get("inputs_embeds")
        if input_ids is not None:
            prompt = input_ids.shape[1] > 1
        else:
            pixels = any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
            prompt = embeddings is not None and bool(encoded or pixels)
        if prompt:
            self.visual = self.parts.family.placeholders(self.model, input_ids, embeddings)

    def leave_base(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.visual = None
        self.drafts = 0
        self.encoder.cache = None

    # ------------------------------------------------------------------ text model

    def enter_text(self, text: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.forward = None
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            return None
        chosen = self.encoder.chosen if self.visual is not None else None
        cache = kwargs.get("past_key_values")
        pruned = isinstance(cache, caches.PrunedCache)
        if chosen is None and not pruned:
            return None
        pruning = chosen is not None and not all(c.idle for listed in chosen.values() for c in listed)
        if pruning and cache is None and self._caches(text, kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=text.config)
        batch, length = embeddings.shape[:2]
        past = self._past(cache, kwargs, chosen)
        sequence = None
        if chosen is not None:
            assert self.visual is not None
            images = placed(chosen, self.visual)
            self.prefill = Prefill(_distinct(images), batch, length, past)
            if pruning:
                sequence = Sequence(images, self.visual)
        if sequence is None and not pruned:
            return None
        mask = None if self.unpadded else kwargs.get("attention_mask")
        self.forward = forward = self._begin(text, cache, sequence, mask, batch, length, past)
        self._observe(forward)
        if text.training and torch.is_grad_enabled():
            # Checkpointing runs the layers again during backward, when no forward is under way (transformers < 5.23).
            kwargs[CONTEXT] = forward
        return args, kwargs

    def leave_text(self, text: nn.Module, args: tuple, out: Any) -> Any:
        forward, self.forward = self.forward, None
        if forward is None:
            return None
        try:
            if out is None:
                return None
            self._settle(forward)
            sequence = forward.sequence
            if sequence is not None and sequence.rows is not None:
                out.last_hidden_state = put(out.last_hidden_state, sequence.rows, forward.length)
            return out
        finally:
            if forward.now.signals is not None:
                forward.now.signals.close()

    def _begin(
        self, text: Any, cache: Any, sequence: Sequence | None, mask: Any, batch: int, length: int, past: int
    ) -> Forward:
        layers = len(self.parts.text_layers)
        pruned = isinstance(cache, caches.PrunedCache)
        return Forward(
            batch=batch,
            length=length,
            past=past,
            cache=cache,
            attention=text.config._attn_implementation or "",
            now=Pass(self.method, self.parts, sequence, self.drafts),
            mask=mask,
            old=list(cache.row_maps) if pruned else [None] * layers,
            group=cache.groups if pruned else [-1] * layers,
            types=getattr(text.config, "layer_types", None),
        )

    def _observe(self, forward: Forward) -> None:
        """Opens the signals that the method will ask for during this pass."""
        sequence, ledger = forward.sequence, self._ledger(forward)
        forward.ledger = ledger
        if sequence is not None:
            wanted = stages.wanted(self.method, self.parts, sequence.all_images())
        elif ledger is not None:
            wanted = stages.wanted(self.method, self.parts, ledger.images())
        else:
            return
        if wanted:
            held = {layer: forward.held(layer) for layer in wanted}
            forward.now.signals = TextSignals(self.parts, sequence, wanted, held, self.drafts)
            forward.now.signals.open()

    def _ledger(self, forward: Forward) -> Ledger | None:
        """The images whose entries the method may evict in this pass."""
        if "evict" not in self.method.stages or forward.cache is None:
            return None
        if forward.sequence is not None:
            return Ledger(forward.ends)
        ledger = getattr(forward.cache, "ledger", None)
        return ledger if ledger is not None and ledger.due(forward.ends, self.method.every) else None

    def _settle(self, forward: Forward) -> None:
        """After the last layer: the cache learns what its layers hold, the report what the pass was like."""
        sequence, cache, ledger = forward.sequence, forward.cache, forward.ledger
        if sequence is None and ledger is None:
            return
        self._finish(forward, len(forward.old))
        row_maps = [forward.passed[layer].left for layer in range(len(forward.old))]
        if cache is not None and any(row_map is not None for row_map in row_maps):
            caches.adopt(cache, row_maps)
            if ledger is not None:
                ledger.asked(forward.ends, self.method.every)
                cache.ledger = ledger if self.method.every else None
        if sequence is not None:
            self._note(forward, sequence)

    def _finish(self, forward: Forward, layer: int) -> None:
        """Lets the method evict from the layers before ``layer``, which have run, and forgets what was measured in them.

        This waits while tokens are still to leave before a later layer: what a method notes then, it may need to evict.
        Otherwise whole caches and measured signals do not wait for the end of the pass.
        """
        now, ledger = forward.now, forward.ledger
        if any(hook > layer for hook in now.leaving()):
            return
        for done in range(forward.finished, layer):
            passed = forward.passed[done]
            passed.left = passed.row_map
            if ledger is not None:
                if now.sequence is not None:
                    ledger.note(done, now.sequence, forward.past, passed.alive)
                passed.left = ledger.evict(now, forward.cache, done, passed.row_map, forward.ends)
            if now.signals is not None:
                now.signals.forget_layer(done)
        forward.finished = layer

    def _note(self, forward: Forward, sequence: Sequence) -> None:
        assert self.prefill is not None
        logical = forward.ends
        for layer, passed in forward.passed.items():
            old, now = forward.old[layer], caches.row_map(forward.cache, layer)
            self.prefill.physical.append(forward.length if passed.rows is None else passed.rows.shape[1])
            self.prefill.held.append(forward.past - (0 if old is None else old.dropped))
            self.prefill.cached.append(logical - (0 if now is None else now.dropped))

    @staticmethod
    def _caches(text: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the text model will make a cache by itself."""
        use = kwargs.get("use_cache")
        use = text.config.use_cache if use is None else use
        return bool(use) and not (text.training and text.gradient_checkpointing)

    @staticmethod
    def _past(cache: Any, kwargs: dict[str, Any], chosen: Any) -> int:
        """Logical tokens in the cache. A decode step with a ready-made mask does not need them, so nothing is read back."""
        if cache is None:
            return 0
        if chosen is None and caches.is_static(cache) and getattr(kwargs.get("attention_mask"), "ndim", 0) == 4:
            return 0
        return int(cache.get_seq_length())

    # ------------------------------------------------------------------ decoder layers

    def enter_layer(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        forward = self.forward
        if CONTEXT in kwargs:
            kwargs = dict(kwargs)
            forward = kwargs.pop(CONTEXT)
        if forward is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer not in forward.passed:
            forward.passed[layer] = self._pass(forward, layer, hidden, kwargs.get("attention_mask"))
        for change in forward.passed[layer].changes:
            hidden = change(hidden)
        changed = self._translate(forward, layer, kwargs)
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _pass(self, forward: Forward, layer: int, hidden: Tensor, mask: Any) -> Passed:
        """Lets tokens leave before ``layer``, which is given ``mask``."""
        sequence = forward.sequence
        if sequence is None:
            passed = Passed([], None, 0, False, [])
        else:
            changes: list[Callable[[Tensor], Tensor]] = []
            if layer == 0:
                sequence.enter(self._padding(forward, mask))
            if layer == 0 and sequence.rows is not None:
                changes.append(Take(sequence.rows))
                if layer in forward.now.leaving():
                    hidden = changes[0](hidden.detach())
            changes += stages.prefill(forward.now, layer, hidden)
            alive = [image.alive for image in sequence.all_images()]
            passed = Passed(changes, sequence.rows, sequence.version, sequence.filler, alive)
        forward.passed[layer] = passed
        passed.row_map = self._row_map(forward, layer, hidden.device)
        self._finish(forward, layer)
        return passed

    @staticmethod
    def _padding(forward: Forward, mask: Any) -> Tensor | None:
        """Which of the new tokens are padding. ``mask``: what the first layer is given."""
        given = forward.mask
        if mask is None and torch.is_tensor(given) and given.ndim == 2 and (forward.flash or forward.attention == "sdpa"):
            # transformers has read the mask for these kernels, and leaves it out where it hides nothing.
            return None
        return masks.padding(given, forward.past, forward.length, forward.batch)

    def _translate(self, forward: Forward, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, in physical rows and columns."""
        passed = forward.passed[layer]
        rows, changed = passed.rows, dict(kwargs)
        if forward.sequence is not None and forward.flash and "position_ids" in kwargs:
            # Positions of visual tokens have gaps, which look like packed sequences to flash attention.
            changed["position_ids"] = None
        if passed.row_map is None:
            return changed
        kind = forward.kind(layer)
        if rows is not None:
            for name in [n for n in kwargs if n.startswith("position_embeddings") and kwargs[n] is not None]:
                tables = kwargs[name]
                changed[name] = forward.once((name, kind), lambda tables=tables: tuple(take_tables(t, rows) for t in tables))
            ids = changed.get("position_ids")
            if ids is not None:
                changed["position_ids"] = forward.once(("ids", kind), lambda: take(ids, rows, 1))
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = self._cache_position(forward, layer, rows, kwargs["cache_position"])
        changed["attention_mask"] = forward.once(
            ("mask", kind), lambda: self._mask(forward, layer, kwargs.get("attention_mask"))
        )
        return changed

    @staticmethod
    def _row_map(forward: Forward, layer: int, device: torch.device) -> RowMap | None:
        old, passed = forward.old[layer], forward.passed[layer]
        if passed.rows is None:
            return old

        def extended() -> RowMap:
            head = old or RowMap.identity(forward.batch, forward.past, device)
            return head.extended(passed.rows, forward.past, forward.length, passed.filler)

        return forward.once(("map", *forward.kind(layer)[:2]), extended)

    @staticmethod
    def _mask(forward: Forward, layer: int, mask: Any) -> Any:
        cache, passed = forward.cache, forward.passed[layer]
        assert passed.row_map is not None
        slots = caches.slots(cache) if cache is not None and caches.is_static(cache) else None
        stored = caches.stored(cache, layer) if cache is not None and caches.is_sliding(cache, layer) else None
        return masks.physical(
            mask, masks.Layer(passed.row_map, passed.rows, forward.past, forward.length, slots, stored, forward.flash)
        )

    @staticmethod
    def _cache_position(forward: Forward, layer: int, rows: Tensor | None, logical: Tensor) -> Tensor:
        """Slots that this pass writes to (transformers before 5.4 tells the layers)."""
        old = forward.old[layer]
        if rows is None:
            return logical if old is None else logical - old.shift
        return torch.arange(rows.shape[1], device=logical.device) + forward.held(layer)


def placed(chosen: dict[int, list[Chosen]], visual: Tensor) -> list[list[Image]]:
    """The images of each sequence, with the places of their placeholders. Beams of a prompt share its images.

    ``visual (B, L)``: 0 for text, else the kind of placeholder that ``chosen`` is ordered by.
    """
    batch = visual.shape[0]
    images: list[list[Image]] = [[] for _ in range(batch)]
    for kind, listed in chosen.items():
        mine = visual == kind
        places = mine.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        for sample, own in enumerate(assign(listed, mine)):
            start = 0
            for choice in own:
                total = choice.layout.total
                run = places[sample, start : start + total]
                alive = (
                    torch.arange(total, device=visual.device) if choice.keep is None else to_device(choice.keep, visual.device)
                )
                images[sample].append(Image(choice, sample, run, alive, notes=dict(choice.notes)))
                start += total
    return images


def _distinct(images: list[list[Image]]) -> list[Image]:
    """Each image once, in the order of the prompts, also where beams share it."""
    seen: dict[int, Image] = {}
    for sample in images:
        for image in sample:
            seen.setdefault(id(image.chosen), image)
    return list(seen.values())


def assign(chosen: list[Chosen], visual: Tensor) -> list[list[Chosen]]:
    """The images of each sequence: as many as fill its placeholders. Beams of a prompt share its images.

    ``visual (B, L)`` bool. Raises :class:`VLPruneError` where images and placeholders disagree.
    """
    total = sum(choice.layout.total for choice in chosen)
    batch = visual.shape[0]
    if batch == 1:
        # Everything belongs to the one sequence; asking the device for its count would wait for it. The model itself compares
        # features with placeholders.
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
