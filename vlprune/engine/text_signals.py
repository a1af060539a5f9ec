"""Measures signals of the LLM's layers while a prompt passes through them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine import attention
from vlprune.engine.attention import Call
from vlprune.engine.family import Parts
from vlprune.engine.sequence import Image, Sequence
from vlprune.signals import Hidden, Keys, ModuleDelta, QueryAttention, ReceivedAttention, Signal, Values


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
                if isinstance(signal, (Hidden, ModuleDelta)):
                    self._hook(layer, signal)

    def close(self) -> None:
        self.stack.close()
        self.measured.clear()

    def of(self, signal: Signal, layer: int, sample: int, slots: Tensor) -> Tensor:
        """The values of the entries at ``slots (N,)`` of the layer's cache, or at others for each head, ``(kv_heads, N)``."""
        _, value = self.measured[layer, signal]
        value, slots = value[sample], slots.to(value.device)
        if not isinstance(signal, (QueryAttention, ReceivedAttention)):
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
        of_entries = self.sequence is not None or isinstance(signal, (QueryAttention, ReceivedAttention))
        return of_entries and (layer, signal) in self.measured

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
        assert isinstance(signal, QueryAttention)
        queries = self._queries(signal, call)
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

    def _queries(self, signal: QueryAttention, call: Call) -> Tensor:
        if signal.queries == "last":
            last = call.query.shape[2] - self.drafts
            return self._rows(call)[:, last - 1 : last]
        rows = self._rows(call) if self.sequence is None else self.sequence.text_rows(self.drafts).to(call.query.device)
        return rows if signal.queries == "text" else rows[:, -int(signal.queries) :]

    def _hook(self, layer: int, signal: Hidden | ModuleDelta) -> None:
        block = self.parts.text_layers[layer]
        family = self.parts.family

        def keep(value: Tensor) -> None:
            self.measured[layer, signal] = self._version, value.detach().float()

        def after_block(module: nn.Module, args: tuple, out: Any) -> None:
            keep(_first(out))

        def after_module(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            keep(torch.stack([before.detach(), _first(out).detach()], 1))

        if isinstance(signal, Hidden):
            handle = block.register_forward_hook(after_block)
        else:
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
    return not isinstance(signal, (Hidden, ModuleDelta))
