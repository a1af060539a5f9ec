"""Measures signals of the vision encoder, beside its attention and without changing what it computes.

Queries, keys and values are noted as the kernel gets them; inputs and outputs of modules by hooks. All of them are brought
to ``(B, L, ...)``: ``L`` rows of each tile, or ``B = 1`` where all images stand one behind the other. The place of an image
says which of the rows are its visual tokens'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine import attention
from vlprune.engine.attention import Call
from vlprune.engine.devices import to_device
from vlprune.engine.family import Parts
from vlprune.signals import (
    ClsAttention,
    ClsValues,
    GlobalAttention,
    Hidden,
    Keys,
    MeanAttention,
    ModuleDelta,
    ReceivedAttention,
    Signal,
    Values,
)

Key = tuple[Signal, int]
"""A signal that a method asked for, and the block it is of."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the visual tokens of one image are among the rows of the encoder.

    ``batch (tiles,)`` and ``rows (tiles, n, k)`` int64: the ``k`` rows of each token, in which row of the batch.
    ``patches (tiles, n)`` int64: which patch of its tile a token is. ``total``: patches of a tile before any left.
    """

    batch: Tensor
    rows: Tensor
    patches: Tensor
    total: int

    @property
    def complete(self) -> bool:
        """Whether all patches are still there."""
        return self.patches.shape[1] == self.total

    def on(self, device: torch.device) -> Place:
        """The same, with its tensors on ``device``."""
        if self.batch.device == self.rows.device == self.patches.device == device:
            return self
        batch, rows, patches = (to_device(tensor, device) for tensor in (self.batch, self.rows, self.patches))
        return replace(self, batch=batch, rows=rows, patches=patches)

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What to index ``(B, L, ...)`` with."""
        there = self.on(device)
        return there.batch[:, None, None], there.rows

    def of(self, values: Tensor) -> Tensor:
        """This image's part of ``values (B, L, ...)``: ``(tiles, n, k, ...)``."""
        return values[self.index(values.device)]

    def spread(self, values: Tensor) -> Tensor:
        """``values (tiles, n, ...)`` at the places of their patches, zeros elsewhere: ``(tiles, total, ...)``."""
        if self.complete:
            return values
        full = values.new_zeros(values.shape[0], self.total, *values.shape[2:])
        return full.scatter(1, _index(to_device(self.patches, values.device), values), values)

    def pick(self, full: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""
        if self.complete:
            return full
        return full.gather(1, _index(to_device(self.patches, full.device), full))


def _index(patches: Tensor, values: Tensor) -> Tensor:
    """``patches (tiles, n)`` as an index for gather and scatter along dimension 1 of ``values (tiles, ..., ...)``."""
    shape = *patches.shape, *values.shape[2:]
    return patches.view(*patches.shape, *[1] * (values.ndim - 2)).expand(shape)


class Tap:
    """A forward hook that notes what a module took and gave while the probe is open. An object, so that it can be pickled."""

    def __init__(self, probe: Probe, module: str, layer: int):
        self.probe, self.name = probe, (module, layer)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if self.probe.open:
            given = args[0] if args else kwargs["hidden_states"]
            self.probe.states[self.name] = given.detach(), (out[0] if isinstance(out, tuple) else out).detach()


class Probe:
    """Collects the vision encoder's part of ``needs`` during one run: ``with probe.run(own): ...``.

    Signals of the hook's own block (``layer=None``) are measured after the blocks ``own``.
    """

    def __init__(self, parts: Parts, needs: Iterable[Signal]):
        self.parts = parts
        self.needs = tuple(signal for signal in needs if signal.tower == "vision")
        self.open = False
        self.forget()

    def forget(self) -> None:
        """Lets go of everything noted and measured."""
        self.wanted: set[Key] = set()
        self.calls: dict[int, list[Call]] = {}
        self.states: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.measured: dict[Key, list[Tensor]] = {}

    def install(self) -> list[Any]:
        blocks = self.parts.vision_layers
        taps = {
            (self._module(signal), layer)
            for signal in self.needs
            if isinstance(signal, (Hidden, ModuleDelta))
            for layer in (range(len(blocks)) if signal.layer is None else [self._layer(signal)])
        }
        return [
            blocks[layer].get_submodule(module).register_forward_hook(Tap(self, module, layer), with_kwargs=True)
            for module, layer in sorted(taps)
        ]

    def _layer(self, signal: Signal) -> int:
        assert signal.layer is not None
        return range(len(self.parts.vision_layers))[signal.layer]

    @contextmanager
    def run(self, own: Iterable[int] = ()) -> Iterator[None]:
        """Inside the block everything is noted that :meth:`measure` needs; call :meth:`forget` when all is taken."""
        self.forget()
        own = tuple(own)
        for signal in self.needs:
            self.wanted |= {(signal, layer) for layer in (own if signal.layer is None else [self._layer(signal)])}
        layers = {layer for signal, layer in self.wanted if not isinstance(signal, (Hidden, ModuleDelta))}
        self.calls = {layer: [] for layer in layers}
        self.open = True
        try:
            with self.noting(layers):
                yield
        except BaseException:
            self.forget()
            raise
        finally:
            self.open = False

    def noting(self, layers: Iterable[int]) -> AbstractContextManager[None]:
        """Within it ``calls`` takes what the attention kernel of each of these blocks is called with."""
        return attention.watching({self.parts.vision_attention(layer): self.calls[layer].append for layer in layers})

    def measure(self, places: Sequence[Place], filler: Tensor | None = None) -> None:
        """Measures the blocks that have run since the last time, for images at ``places``.

        ``filler``: which rows ``(tiles, rows of a tile)`` of the encoder stand for nothing, None if none does.
        """
        with torch.no_grad():
            for signal, layer in sorted(self.wanted, key=lambda key: key[1]):
                if self._ran(signal, layer):
                    values = self._values(signal, layer, places, filler)
                    if not isinstance(signal, ClsValues):
                        values = [place.spread(value) for place, value in zip(places, values, strict=True)]
                    self.measured[signal, layer] = values
        self.wanted -= self.measured.keys()
        for calls in self.calls.values():
            calls.clear()
        self.states.clear()

    def take(self, image: int, place: Place | None = None, own: int | None = None) -> dict[Signal, Tensor]:
        """What was measured of one image, see :mod:`vlprune.signals` for shapes.

        ``place``: give the tokens that are still there only; ``own``: the block that ``layer=None`` stands for.
        """
        signals = {}
        for (signal, layer), values in self.measured.items():
            if signal.layer is None and layer != own:
                continue
            value = values[image]
            if place is not None and not isinstance(signal, ClsValues):
                value = place.pick(value)
            signals[signal] = _as_documented(signal, value)
        return signals

    # ------------------------------------------------------------------ one signal

    def _module(self, signal: Signal) -> str:
        """What a signal is the output of: a part of a block, or the block."""
        if isinstance(signal, ModuleDelta):
            return self.parts.family.vision_attention if signal.module == "attention" else self.parts.family.vision_mlp
        return ""

    def _ran(self, signal: Signal, layer: int) -> bool:
        if isinstance(signal, (Hidden, ModuleDelta)):
            return (self._module(signal), layer) in self.states
        return bool(self.calls[layer])

    def _values(self, signal: Signal, layer: int, places: Sequence[Place], filler: Tensor | None) -> list[Tensor]:
        """The signal of each image ``(tiles, n, ...)`` float32, heads behind the tokens."""
        if isinstance(signal, MeanAttention):
            query, key = (_rows(self.calls[layer], name) for name in ("query", "key"))
            scaling = self.calls[layer][0].scaling
            return [_mean_attention(place.of(query), place.of(key), scaling) for place in places]
        if isinstance(signal, ClsValues):
            values = self.calls[layer][0].value[:, :, 0]
            return [values[to_device(place.batch, values.device)].float() for place in places]
        values = self._all(signal, layer, places, filler)
        return [place.of(values).float().mean(2) for place in places]

    def _all(self, signal: Signal, layer: int, places: Sequence[Place], filler: Tensor | None) -> Tensor:
        """The signal of all rows of the encoder, ``(B, L, ...)``."""
        if isinstance(signal, (Hidden, ModuleDelta)):
            given, out = (state.view(-1, *state.shape[-2:]) for state in self.states[self._module(signal), layer])
            return out if isinstance(signal, Hidden) else torch.stack([given, out], 2)
        calls = self.calls[layer]
        if isinstance(signal, (Keys, Values)):
            return _rows(calls, "key" if isinstance(signal, Keys) else "value")
        if isinstance(signal, ClsAttention):
            return _paid_by_cls(calls[0]).transpose(1, 2)
        assert isinstance(signal, (ReceivedAttention, GlobalAttention)), signal
        threshold = signal.threshold if isinstance(signal, GlobalAttention) else None
        segments = _segments(calls, [place.rows.numel() for place in places] if self.parts.family.packed else None)
        return torch.cat([_received(call, filler, threshold).transpose(1, 2) for call in segments], 1)


def _as_documented(signal: Signal, values: Tensor) -> Tensor:
    """``values (tiles, n, ...)`` with its dimensions in the order that :mod:`vlprune.signals` documents."""
    if isinstance(signal, (Hidden, ClsValues)):
        return values
    return values.movedim(2, 0) if isinstance(signal, ModuleDelta) else values.transpose(1, 2)


def _rows(calls: list[Call], name: str) -> Tensor:
    """Queries, keys or values of all calls ``(B, L, heads, head_dim)``."""
    return torch.cat([getattr(call, name).transpose(1, 2) for call in calls], 1)


def _segments(calls: list[Call], lengths: list[int] | None) -> list[Call]:
    """One call for each stretch of rows that attend to each other. Nobody may be left of some; these have none.

    Flash attention gets all of them in one call with their bounds, others one by one, or with a mask that lets each image
    see itself. ``lengths``: rows of each image where these are packed one behind the other, None for tiles.
    """
    bounds = calls[0].options.get("cu_seq_lens_q")
    if bounds is not None:
        lengths = bounds.diff().tolist()
    elif lengths is None or calls[0].mask is None:
        return calls
    (call,) = calls
    assert lengths is not None
    parts = zip(*(t.split(lengths, dim=2) for t in (call.query, call.key, call.value)), strict=True)
    return [replace(call, query=q, key=k, value=v, mask=None) for q, k, v in parts if q.shape[2]]


def _paid_by_cls(call: Call) -> Tensor:
    """``(tiles, heads, rows)``; [CLS] is row 0 of its tile."""
    return attention.rows(call, torch.zeros(call.query.shape[0], 1, dtype=torch.long, device=call.query.device))[:, :, 0]


def _received(call: Call, filler: Tensor | None, threshold: float | None = None) -> Tensor:
    """``(tiles, heads, rows)``, over all queries that are no filler, or those of them that receive more than ``threshold``
    times the mean; where none does, over all again."""
    queries = torch.arange(call.query.shape[2], device=call.query.device).expand(call.query.shape[0], -1)
    if filler is not None:
        queries = queries.masked_fill(filler.to(queries.device), -1)
    received = attention.received(call, queries)
    if threshold is None:
        return received
    level = received.mean(1) * (queries >= 0)
    mean = level.sum(1, keepdim=True) / (queries >= 0).sum(1, keepdim=True).clamp(min=1)
    hubs = level > threshold * mean
    return attention.received(call, torch.where(hubs | ~hubs.any(1, keepdim=True), queries, -1))


def _mean_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention of a tile's mean query ``(tiles, n, heads)``, from ``query`` and ``key (tiles, n, k, heads, head_dim)``."""
    mean = query.float().mean((1, 2))
    scores = torch.einsum("thc,tnkhc->tnkh", mean, key.float()) * scaling
    return scores.flatten(1, 2).softmax(1).view_as(scores).mean(2)
