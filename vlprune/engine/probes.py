"""Measures signals beside the vision encoder's attention.

The projections of one layer give queries and keys; [CLS] rows are computed from them in float32. The model's own kernel
is not touched, and no patches x patches map is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.family import Parts
from vlprune.signals import ClsAttention, Hidden, Keys, Signal


class Tap:
    """A forward hook that keeps a module's output while the probe is open. An object, so that it can be pickled."""

    def __init__(self, probe: Probe, name: tuple[str, int]):
        self.probe, self.name = probe, name

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.probe.open:
            self.probe.seen[self.name] = (out[0] if isinstance(out, tuple) else out).detach()


class Probe:
    """Collects ``needs`` during one run of the vision encoder: ``with probe: ...``, then :meth:`take`."""

    def __init__(self, parts: Parts, needs: tuple[Signal, ...]):
        self.parts, self.needs = parts, needs
        self.open = False
        self.seen: dict[tuple[str, int], Tensor] = {}

    def install(self) -> list[Any]:
        taps: dict[tuple[str, int], nn.Module] = {}
        for signal in self.needs:
            layer = self.parts.vision_layers[signal.layer]
            if isinstance(signal, ClsAttention):
                taps["query", signal.layer] = layer.get_submodule("self_attn.q_proj")
            if isinstance(signal, (ClsAttention, Keys)):
                taps["key", signal.layer] = layer.get_submodule("self_attn.k_proj")
            if isinstance(signal, Hidden):
                taps["hidden", signal.layer] = layer
        return [module.register_forward_hook(Tap(self, name)) for name, module in taps.items()]

    def __enter__(self) -> Probe:
        self.open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.open = False
        if exception[0] is not None:
            self.seen.clear()

    def take(self) -> dict[Signal, Tensor]:
        """The measured signals of all tiles, see :mod:`vlprune.signals` for shapes."""
        with torch.no_grad():
            signals = {signal: self._measure(signal) for signal in self.needs}
        self.seen.clear()
        return signals

    def _measure(self, signal: Signal) -> Tensor:
        prefix = self.parts.prefix
        if isinstance(signal, Hidden):
            return self.seen["hidden", signal.layer][:, prefix:].float()
        keys = self._heads("key", signal.layer)
        if isinstance(signal, Keys):
            return keys[:, :, prefix:]
        query = self._heads("query", signal.layer, rows=1)
        scores = query @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5
        return scores.softmax(-1)[:, :, 0, prefix:]

    def _heads(self, name: str, layer: int, rows: int | None = None) -> Tensor:
        """(tiles, heads, rows, head_dim) float32."""
        heads = self.parts.vision.config.num_attention_heads
        return self.seen[name, layer][:, :rows].float().unflatten(-1, (heads, -1)).transpose(1, 2)
