"""Around the language model: logical outside of its decoder layers, physical inside.

Hooks on the base model learn which tokens are visual, hooks on the text model turn the chosen tokens into rows, and a hook
on each decoder layer translates what enters it: hidden states, rotary tables, positions, masks. Everything else, generate()
included, goes on in lengths that count every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlprune.engine import cache as caches
from vlprune.engine import stages
from vlprune.engine.encoder import EncoderHooks
from vlprune.engine.eviction import Ledger
from vlprune.engine.family import Parts
from vlprune.engine.forward import Forward, Passed, Prefill
from vlprune.engine.heads import VISUAL, inactive
from vlprune.engine.placing import distinct, placed
from vlprune.engine.rows import Take, put, take
from vlprune.engine.sequence import Sequence
from vlprune.engine.stages import Pass
from vlprune.engine.text_signals import TextSignals
from vlprune.method import Method

CONTEXT = "vlprune_context"


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
        self.inactive = inactive(method, parts)

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
        for heads in self.inactive.values():
            handles += heads.install()
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
        pruning = chosen is not None and any(self.inactive or not c.idle for listed in chosen.values() for c in listed)
        if pruning and cache is None and self._caches(text, kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=text.config)
        batch, length = embeddings.shape[:2]
        past = self._past(cache, kwargs, chosen)
        sequence = None
        if chosen is not None:
            assert self.visual is not None
            images = placed(chosen, self.visual)
            self.prefill = Prefill(distinct(images), batch, length, past)
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

        This waits while tokens are still to leave before a later layer: what a method notes then, it may need to evict. It
        waits for the last layer if the method does. Otherwise whole caches and measured signals do not wait for the end of
        the pass.
        """
        now, ledger = forward.now, forward.ledger
        waits = self.method.waits and layer < len(forward.old)
        if waits or any(hook > layer for hook in now.leaving()):
            return
        for done in range(forward.finished, layer):
            passed = forward.passed[done]
            passed.left = passed.row_map
            if ledger is not None:
                if now.sequence is not None:
                    ledger.note(done, now.sequence, forward.past, passed.alive)
                passed.left = ledger.evict(now, forward.cache, done, passed.row_map, forward.ends)
        if now.signals is not None:
            for done in range(forward.finished, layer):
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
        elif forward is None or forward.untouched(layer, kwargs):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer not in forward.passed:
            forward.passed[layer] = self._pass(forward, layer, hidden, kwargs.get("attention_mask"))
        for change in forward.passed[layer].changes:
            hidden = change(hidden)
        changed = forward.translate(layer, kwargs)
        if layer in self.inactive and forward.sequence is not None:
            changed[VISUAL] = forward.visual(layer)
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
                sequence.enter(forward.padding(mask))
            if layer == 0 and sequence.rows is not None:
                changes.append(Take(sequence.rows))
                if layer in forward.now.leaving():
                    hidden = changes[0](hidden.detach())
            changes += stages.prefill(forward.now, layer, hidden)
            alive = [image.alive for image in sequence.all_images()]
            passed = Passed(changes, sequence.rows, sequence.version, sequence.filler, alive)
        forward.passed[layer] = passed
        passed.row_map = forward.row_map(layer, hidden.device)
        if sequence is not None or forward.ledger is not None:
            self._finish(forward, layer)
        return passed
