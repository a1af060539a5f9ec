"""Inside the vision encoder: asks the method between two blocks, and lets rows leave there.

What comes out of the projector is put back to its full length, with zeros for tokens that left, so that packing of tiles,
placeholder checks and copies for beams upstream go on working.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.devices import to_device
from vlprune.engine.family import Parts
from vlprune.engine.merging import merged
from vlprune.engine.probes import Place, Probe
from vlprune.engine.steps import Clock, Step
from vlprune.engine.vision_rows import Packed, Tiles
from vlprune.errors import BudgetError, UnsupportedMethodError, VLPruneError
from vlprune.image import ImageLayout, VisionTokens
from vlprune.method import Method, Selection
from vlprune.signals import Signal


@dataclass(eq=False)
class Track:
    """One image on its way through the encoder. ``layers``: the blocks after which the method is asked about it."""

    layout: ImageLayout
    layers: frozenset[int]
    place: Place
    carry: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    @property
    def alive(self) -> Tensor | None:
        """Ascending indices of the placeholders whose patches are still there, None for all. Row ends are not among them."""
        if self.place.complete:
            return None
        places = self._places()
        if min(self.layout.available) == self.layout.placeholder.shape[1]:
            return places
        # How many of the patches left lie in the padding of crops is the method's choice, so the device has to be asked.
        return places[places >= 0]

    def _places(self) -> Tensor:
        """The placeholders, ascending, of the patches that are still there; -1 for those in the padding of crops."""
        patches = self.place.patches
        return to_device(self.layout.placeholder, patches.device).gather(1, patches).flatten().sort().values

    def keep(self, keep: Tensor) -> None:
        """Only ``keep (tiles, T)`` of the tokens are left; no row has moved yet."""
        place = self.place.on(keep.device)
        self.place = replace(place, rows=_kept(place.rows, keep), patches=_kept(place.patches, keep))
        self.carry = {name: _kept(values, keep) for name, values in self.carry.items()}

    def note(self, layer: int, clock: Clock) -> None:
        """Adds what was done after block ``layer``. Tokens include row ends while no patch has left."""
        before = self.steps[-1] if self.steps else self.layout.total
        places = torch.arange(self.layout.total) if self.place.complete else self._places()
        self.steps.append(Step("encode", layer, before, places, clock.stop(), rows=self.place.rows[0].numel()))


class VisionHooks:
    """The vision encoder's part of a patch. ``run``: the run of the encoder under way."""

    def __init__(self, parts: Parts, method: Method):
        self.parts, self.method = parts, method
        self.encodes = "encode" in method.stages
        measures = self.encodes or "select" in method.stages
        self.probe = Probe(parts, method.wants(parts.shape) if measures else ())
        self.run: Run | None = None

    def install(self) -> list[Any]:
        handles = self.probe.install()
        if self.encodes:
            for layer, block in enumerate(self.parts.vision_layers):
                if layer > 0:
                    handles.append(block.register_forward_pre_hook(BlockHook(self, layer), with_kwargs=True))
            if self.parts.family.pointwise:
                handles += [projector.register_forward_hook(self._leave_projector) for projector in self._projectors()]
            else:
                handles.append(self.parts.vision.register_forward_hook(self._leave_encoder))
        return handles

    def _projectors(self) -> list[nn.Module]:
        """All that turn rows of the encoder into visual tokens; Qwen3-VL has more of them behind some of its blocks."""
        return [self.parts.projector, *getattr(self.parts.vision, "deepstack_merger_list", ())]

    @contextmanager
    def watch(
        self,
        layouts: Sequence[ImageLayout],
        grids: Sequence[tuple[int, int]],
        asked: Sequence[bool],
        arguments: dict[str, Any],
    ) -> Iterator[list[Track]]:
        """Inside the block the encoder runs on ``arguments``; after it the tracks tell what happened to the images.

        ``grids``: how the encoder sees a tile of each image. ``asked``: whether the method is asked about it.
        """
        rows: Tiles | Packed = (Packed if self.parts.family.packed else Tiles)(self.parts, layouts, grids, arguments)
        tracks = [
            Track(layout, self._layers(layout) if ask and self.encodes else frozenset(), place)
            for layout, ask, place in zip(layouts, asked, rows.places, strict=True)
        ]
        layers = frozenset[int]().union(*(track.layers for track in tracks))
        if layers and any(grid != layout.grid for grid, layout in zip(grids, layouts, strict=True)):
            raise UnsupportedMethodError(
                f"{type(self.method).__name__} shows the vision encoder smaller tiles and drops inside of it; "
                "a method does one of the two for an image"
            )
        if layers or self.probe.needs:
            self._check_rows()
        self.run = Run(self.parts, self.method, self.probe, rows, tracks) if layers else None
        try:
            with self.probe.run(layers):
                yield tracks
        finally:
            self.run = None
        self.probe.measure([track.place for track in tracks], rows.filler)
        if self.probe.wanted or any(len(track.steps) < len(track.layers) for track in tracks):
            raise VLPruneError(
                f"{type(self.parts.vision).__name__} ran without its hooks, so {type(self.method).__name__} was not asked; "
                "was it compiled before the method was applied? Apply first, then compile."
            )
        for index, track in enumerate(tracks):
            track.signals = self.probe.take(index)
        self.probe.forget()

    def _check_rows(self) -> None:
        """Raises :class:`UnsupportedMethodError` where another method makes rows fewer in the encoder's blocks."""
        from vlprune.engine.vit.blocks import STATE

        patch = next((state.run.method for block in self.parts.vision_layers if (state := block.__dict__.get(STATE))), None)
        if patch is not None:
            raise UnsupportedMethodError(
                f"{self.method.name} looks into the vision encoder, where {patch.name} was applied to "
                f"{type(self.parts.vision).__name__} on its own and makes rows fewer; methods that go by features "
                "alone can be used behind that, divprune for example"
            )

    def _layers(self, layout: ImageLayout) -> frozenset[int]:
        layers = frozenset(self.method.encode_layers(layout, self.parts.shape))
        end = _first_feature_layer(self.parts)
        if layers and not 0 <= min(layers) <= max(layers) < end:
            raise UnsupportedMethodError(
                f"{type(self.method).__name__} drops after the vision blocks {sorted(layers)}; allowed are 0 to {end - 1}, "
                f"since the projector takes the features of block {end}. Drop behind that with select()."
            )
        return layers

    def enter_block(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self.run is None else self.run.enter_block(layer, args, kwargs)

    def _leave_projector(self, projector: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if self.run is None or self.run.rows.origin is None:
            return None
        return self.run.rows.restore_tokens(out)

    def _leave_encoder(self, vision: nn.Module, args: tuple, out: Any) -> None:
        """Puts rows back in what the encoder gives: its last state, and those of earlier blocks that are as long."""
        if self.run is None or self.run.rows.origin is None:
            return
        rows, length = self.run.rows, out.last_hidden_state.shape[-2]

        def restored(state: Tensor | None) -> Tensor | None:
            # transformers 5 leaves out states that the model does not read.
            return rows.restore_rows(state) if state is not None and state.shape[-2] == length else state

        out.last_hidden_state = restored(out.last_hidden_state)
        if out.hidden_states is not None:
            out.hidden_states = tuple(map(restored, out.hidden_states))


class BlockHook:
    """Pre-hook of one block; an object, so that it can be copied and pickled with the model."""

    def __init__(self, hooks: VisionHooks, layer: int):
        self.hooks, self.layer = hooks, layer

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.hooks.enter_block(self.layer, args, kwargs)


def _first_feature_layer(parts: Parts) -> int:
    """The first block whose output goes to the projector; some models join those of several."""
    feature, layers = getattr(parts.model.config, "vision_feature_layer", None), parts.shape.vision_layers
    if not isinstance(feature, (list, tuple)):
        return parts.shape.feature_layer
    return min(number - 1 if number >= 0 else layers + number for number in feature)


@dataclass(eq=False)
class Run:
    """One run of the encoder in which rows may leave."""

    parts: Parts
    method: Method
    probe: Probe
    rows: Tiles | Packed
    tracks: list[Track]

    def enter_block(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What block ``layer`` is to be given instead of ``args`` and ``kwargs``."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if any(layer - 1 in track.layers for track in self.tracks):
            self.probe.measure([track.place for track in self.tracks], self.rows.filler)
            hidden = self._ask(layer - 1, hidden.view(-1, *hidden.shape[-2:])).view(*hidden.shape[:-2], -1, hidden.shape[-1])
        if self.rows.origin is None:
            # Nobody has left yet, but some rows may have been merged into others.
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        block = self.parts.vision_layers[layer]
        args = (hidden, *args[1:]) if args else ()
        kwargs = kwargs if args else {**kwargs, "hidden_states": hidden}
        return self.rows.translate(block, args, kwargs, hidden)

    def _ask(self, layer: int, hidden: Tensor) -> Tensor:
        """Lets the method choose after block ``layer``; ``hidden (B, L, D)`` without the rows that leave."""
        for index, track in enumerate(self.tracks):
            if layer not in track.layers:
                continue
            clock = Clock(hidden.device)
            track.place = track.place.on(hidden.device)
            tokens = track.place.of(hidden)
            selection = self._selection(layer, index, tokens.detach())
            if selection is not None:
                if selection.merge is not None:
                    mixed = merged(tokens.flatten(2), selection).view_as(tokens)
                    hidden = hidden.index_put(track.place.index(hidden.device), mixed)
                track.keep(to_device(selection.keep, hidden.device))
            track.note(layer, clock)
        hidden, places = self.rows.cut(hidden, [track.place for track in self.tracks])
        for track, place in zip(self.tracks, places, strict=True):
            track.place = place
        return hidden

    def _selection(self, layer: int, index: int, tokens: Tensor) -> Selection | None:
        """The method's choice for one image, of ``tokens (tiles, n, k, hidden)``."""
        track = self.tracks[index]
        with torch.no_grad():
            selection = self.method.encode(
                VisionTokens(
                    layer=layer,
                    hidden=tokens.flatten(2),
                    patches=track.place.patches,
                    layout=track.layout,
                    shape=self.parts.shape,
                    signals=self.probe.take(index, track.place, layer),
                    carry=track.carry,
                    notes=track.notes,
                )
            )
        if selection is not None:
            tiles, present = track.place.patches.shape
            shape = tuple(selection.keep.shape)
            if len(shape) != 2 or shape[0] != tiles or not 0 < shape[1] <= present:
                raise BudgetError(
                    f"{type(self.method).__name__} kept rows of shape {shape} after vision block {layer}; allowed is "
                    f"({tiles}, T) with T from 1 to {present}, the same number in each tile of an image"
                )
        return selection


def _kept(values: Tensor, keep: Tensor) -> Tensor:
    """Rows ``keep (tiles, T)`` of ``values (tiles, n, ...)``."""
    index = keep.view(*keep.shape, *[1] * (values.ndim - 2)).expand(*keep.shape, *values.shape[2:])
    return values.gather(1, to_device(index, values.device))
