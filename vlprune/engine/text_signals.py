"""Measures signals of the LLM's layers while a prompt passes through them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine import attention
from vlprune.engine.attention import Call
from vlprune.engine.family import Parts
from vlprune.engine.sequence import Image, Sequence
from vlprune.signals import (
    AttentionColumns,
    AttentionSupport,
    Hidden,
    Keys,
    ModuleDelta,
    QueryAttention,
    ReceivedAttention,
    Signal,
    SinkShare,
    Transition,
    Values,
)
from vlprune.sinks import sink_share

OF_CACHE = (QueryAttention, ReceivedAttention, AttentionColumns)
"""Signals that have a value for each entry of the cache; others have one for each row of the pass."""


class TextSignals:
    """Signals of one pass: ``open`` before the first layer, ``of`` before a later one, ``close`` after the last.

    ``sequence``: the prompt, None while text is generated. ``wanted``: layer -> signals of that layer, as the method named
    them. Each is kept with the version of the sequence that it was measured on, since rows may leave before somebody asks for
    it. ``held``: entries of each layer's cache before the pass; ``drafts``: tokens at the end that are no prompt.
    """

    def __init__(
        self, parts: Parts, sequence: Sequence | None, wanted: dict[int, list[Signal]], held: dict[int, int], drafts: int
    ):
        self.parts, self.sequence, self.wanted, self.held, self.drafts = parts, sequence, wanted, held, drafts
        self.measured: dict[tuple[int, Signal], tuple[int, Tensor]] = {}
        self.stack = ExitStack()

    def open(self) -> None:
        watchers = {self.parts.text_attention(j): self._watcher(j) for j, s in self.wanted.items() if any(map(_of_kernel, s))}
        self.stack.enter_context(attention.watching(watchers))
        for layer, signals in self.wanted.items():
            for signal in signals:
                if not _of_kernel(signal):
                    self._hook(layer, signal)

    def close(self) -> None:
        self.stack.close()
        self.measured.clear()

    def of(self, signal: Signal, layer: int, sample: int, slots: Tensor) -> Tensor:
        """The values of the entries at ``slots (N,)`` of the layer's cache, or at others for each head, ``(kv_heads, N)``."""
        _, value = self.measured[layer, signal]
        value, slots = value[sample], slots.to(value.device)
        if isinstance(signal, AttentionSupport):
            return value
        if not isinstance(signal, OF_CACHE):
            # What this pass has added is at the same slots in all heads.
            own = slots if slots.ndim == 1 else slots[0]
            return value.index_select(-2, own - self.held.get(layer, 0))
        if isinstance(signal, QueryAttention):
            value = self._without_filler(signal, value, sample)
        if slots.ndim == 1:
            return value.index_select(-1, slots)
        heads = max(value.shape[0], slots.shape[0])
        value = value.expand(heads, *value.shape[1:])
        index = slots.repeat_interleave(heads // slots.shape[0], 0)
        return value.gather(-1, index.view(index.shape[0], *[1] * (value.ndim - 2), -1).expand(*value.shape[:-1], -1))

    def holds(self, signal: Signal, layer: int) -> bool:
        """Whether the signal was measured of the image's entries; rows of generated tokens hold none of theirs."""
        of_entries = self.sequence is not None or isinstance(signal, OF_CACHE)
        return of_entries and (layer, signal) in self.measured

    def of_layers(self, sample: int) -> dict[Signal, Tensor]:
        """The signals of whole layers, of all that have run and were not forgotten."""
        found = self.measured.items()
        return {signal: value[sample] for (_, signal), (_, value) in found if isinstance(signal, AttentionSupport)}

    def slots(self, signal: Signal, layer: int, image: Image) -> Tensor:
        """Where the image's tokens were in the layer's cache when the signal was measured."""
        version, _ = self.measured[layer, signal]
        assert self.sequence is not None
        return self.sequence.slots(image.sample, image.places[image.alive], version) + self.held.get(layer, 0)

    def rows_of(self, signal: Signal, layer: int, sample: int, logical: Tensor | None, count: int) -> Tensor:
        """The values of all rows of a sample; ``logical``: their positions, None for all of the ``count`` last rows."""
        version, value = self.measured[layer, signal]
        if logical is None:
            return value[sample].narrow(-2, value.shape[-2] - count, count)
        assert self.sequence is not None
        return value[sample].index_select(-2, self.sequence.slots(sample, logical, version).to(value.device))

    def forget(self, layer: int, signals: Iterable[Signal]) -> None:
        for signal in signals:
            self.measured.pop((layer, signal), None)

    def forget_layer(self, layer: int) -> None:
        self.forget(layer, self.wanted.get(layer, ()))

    # ------------------------------------------------------------------ measuring

    def _watcher(self, layer: int) -> Any:
        def watch(call: Call) -> None:
            with torch.no_grad():
                for signal in filter(_of_kernel, self.wanted[layer]):
                    self.measured[layer, signal] = self._version, self._measure(signal, layer, call)

        return watch

    def _measure(self, signal: Signal, layer: int, call: Call) -> Tensor:
        start, count = self.held.get(layer, 0), call.query.shape[2]
        if isinstance(signal, Keys):
            return call.key[:, :, start : start + count].float()
        if isinstance(signal, Values):
            return call.value[:, :, start : start + count].float()
        if isinstance(signal, ReceivedAttention):
            return attention.received(call, self._rows(call))
        if isinstance(signal, AttentionColumns):
            return self._columns(signal, layer, call)
        if isinstance(signal, AttentionSupport):
            return _support(call, self._queries("after", call), signal.threshold)
        assert isinstance(signal, QueryAttention)
        queries = self._queries(signal.queries, call)
        weights = attention.rows(call, queries)
        weights = weights.mean(1, keepdim=True) if signal.mean_heads else weights
        if not signal.mean_queries:
            return weights
        # Filler of shorter samples does not count.
        return weights.sum(2, keepdim=True) / (queries >= 0).sum(1).clamp(min=1)[:, None, None, None]

    def _without_filler(self, signal: QueryAttention, value: Tensor, sample: int) -> Tensor:
        """``value (heads, R, k)`` for the sample's own queries: as many as if it were alone."""
        if self.sequence is None or signal.queries == "last" or signal.mean_queries:
            return value
        text = self.sequence.text_counts()[sample] - self.drafts
        return value[:, max(value.shape[1] - text, 0) :]

    @property
    def _version(self) -> int:
        return 0 if self.sequence is None else self.sequence.version

    def _rows(self, call: Call) -> Tensor:
        """Rows ``(B, n)`` of the pass."""
        if self.sequence is not None:
            return self.sequence.all_rows().to(call.query.device)
        return torch.arange(call.query.shape[2], device=call.query.device).expand(call.query.shape[0], -1)

    def _queries(self, which: str | int, call: Call) -> Tensor:
        """Rows ``(B, R)`` of the queries that a signal names; negative ones are filler."""
        last = call.query.shape[2] - self.drafts
        if which == "last":
            return self._rows(call)[:, last - 1 : last]
        if which == "all":
            return self._rows(call)[:, :last]
        if self.sequence is None:
            rows = self._rows(call)
        else:
            rows = self.sequence.text_rows(self.drafts, after=which == "after").to(call.query.device)
        return rows[:, -which:] if isinstance(which, int) else rows

    def _columns(self, signal: AttentionColumns, layer: int, call: Call) -> Tensor:
        queries = self._queries(signal.queries, call)
        age = torch.arange(queries.shape[1] - 1, -1, -1, device=queries.device)
        weights = (signal.decay ** age.double()).float().expand_as(queries)
        if signal.noise is not None or signal.temperature != 1.0:
            noise = None if signal.noise is None else self._noise(signal.noise, layer, call)
            call = attention.perturbed(call, signal.temperature, noise)
        return attention.columns(call, queries, weights)

    def _noise(self, seed: int, layer: int, call: Call) -> Tensor:
        """Gumbel noise ``(B, kv_heads, k)``; a sample's own tokens get what they would get if it were alone."""
        key = call.key
        filler = (self._rows(call) < 0).sum(1)[:, None, None]
        place = torch.arange(key.shape[2], device=key.device) - filler
        return gumbel(seed, layer, torch.arange(key.shape[1], device=key.device)[:, None], place)

    def _replayed(self, module: nn.Module, kwargs: dict[str, Any]) -> Call:
        """The call that an attention module would make to its kernel without rotary embedding, of this pass alone."""
        cos, sin = kwargs["position_embeddings"]
        call = attention.call_of(module, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})
        return replace(call, mask=(self._rows(call) >= 0).long(), causal=True, flash=False)

    def _hook(self, layer: int, signal: Signal) -> None:
        block = self.parts.text_layers[layer]
        family = self.parts.family

        def keep(value: Tensor) -> None:
            self.measured[layer, signal] = self._version, value.detach().float()

        def after_block(module: nn.Module, args: tuple, out: Any) -> None:
            keep(_first(out))

        def normed(module: nn.Module, args: tuple, out: Any) -> None:
            with torch.no_grad():
                keep(self.parts.text.norm(_first(out)))

        def after_module(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            pair = before.detach(), _first(out).detach()
            keep(torch.stack(pair, 1) if isinstance(signal, ModuleDelta) else _transition(*pair))

        def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                weights = self._measure(signal, layer, self._replayed(module, kwargs))
            keep(torch.nn.functional.pad(weights, (self.held.get(layer, 0), 0)))

        def before_block(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            first = None if self.sequence is None else self.sequence.first_rows()
            keep(sink_share(hidden.detach().float(), first, signal.channels) if isinstance(signal, SinkShare) else hidden)

        if isinstance(signal, SinkShare) or (isinstance(signal, Hidden) and signal.state == "before"):
            handle = block.register_forward_pre_hook(before_block, with_kwargs=True)
        elif isinstance(signal, Hidden):
            handle = block.register_forward_hook(normed if signal.state == "normed" else after_block)
        elif isinstance(signal, QueryAttention):
            handle = self.parts.text_attention(layer).register_forward_pre_hook(before_attention, with_kwargs=True)
        else:
            assert isinstance(signal, (ModuleDelta, Transition))
            path = family.text_attention if signal.module == "attention" else family.text_mlp
            handle = block.get_submodule(path).register_forward_hook(after_module, with_kwargs=True)
        self.stack.callback(handle.remove)


def resolved(signal: Signal, layers: int, hook_layer: int) -> int:
    """The block that ``signal`` speaks of in a hook before ``hook_layer``."""
    if signal.layer is None:
        return hook_layer - 1
    return signal.layer % layers


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _of_kernel(signal: Signal) -> bool:
    """Whether what the kernel is called with tells the signal."""
    if isinstance(signal, QueryAttention):
        return signal.rotary
    return not isinstance(signal, (Hidden, ModuleDelta, SinkShare, Transition))


def _transition(before: Tensor, after: Tensor) -> Tensor:
    """Ratio of lengths and cosine ``(B, n, 2)`` of what went into a module and what came out ``(B, n, D)``."""
    before, after = before.float(), after.float()
    length = before.norm(dim=-1)
    tiny = torch.finfo(length.dtype).tiny
    return torch.stack([after.norm(dim=-1) / length.clamp(min=tiny), torch.cosine_similarity(before, after, dim=-1)], -1)


def _support(call: Call, queries: Tensor, threshold: float) -> Tensor:
    """Keys of at least ``threshold`` times a query's largest attention: ``(B, heads)``, the mean over ``queries (B, R)``."""
    found = call.query.new_zeros(call.query.shape[:2], dtype=torch.float32)
    for block in queries.split(attention.BLOCK, dim=1):
        weights = attention.rows(call, block)
        high = (weights >= threshold * weights.amax(-1, keepdim=True)) & (block >= 0)[:, None, :, None]
        found += high.sum((2, 3))
    return found / (queries >= 0).sum(1).clamp(min=1)[:, None]


def gumbel(seed: int, *numbers: Tensor | int) -> Tensor:
    """Gumbel noise, a function of ``numbers`` alone, which are broadcast: the same on every device and in every batch."""
    state: Tensor | int = seed & 0xFFFFFFFF
    for number in numbers:
        mixed = (state ^ (number & 0xFFFF)) * 0x45D9F3B & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 16)) * 0x45D9F3B & 0xFFFFFFFF
        state = mixed ^ (mixed >> 16)
    assert isinstance(state, Tensor)
    uniform = (state.double() + 0.5) / 2**32
    return -(-uniform.log()).log().float()
