"""Around the vision encoder: measures what a method needs, lets it choose, hands its choice to the decoder's side.

``get_image_features``, and ``get_video_features`` where a family has it, are the seams between encoder and LLM, and
generate() calls them on its own before the prefill. Their output keeps its length, so placeholder checks and beam expansion
upstream go on working.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from vlprune.engine import cache as caches
from vlprune.engine.choosing import Chosen, asks, choose
from vlprune.engine.devices import to_device
from vlprune.engine.family import MODALITIES, SEAMS, VIDEO, Parts
from vlprune.engine.features import features_of, put_together, restored, taken_apart, with_features
from vlprune.engine.vision import Track, VisionHooks
from vlprune.errors import UnsupportedMethodError, VLPruneError
from vlprune.image import ImageLayout, ImageTokens, centres
from vlprune.method import Method

CHOICE = "_vlprune_choice"
"""Attribute of an encoder's output: what was chosen for its images."""


class ImageFeatures:
    """Stands in for the base model's ``get_image_features`` or ``get_video_features`` while a method is applied.

    An object and no closure, so that deepcopy and pickle keep it together with the model it belongs to.
    """

    def __init__(self, hooks: EncoderHooks, kind: int):
        self.hooks, self.kind = hooks, kind

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() reads which arguments the method takes.
        base = self.hooks.parts.base
        return inspect.signature(getattr(type(base), SEAMS[self.kind]).__get__(base))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        named = {k: v for k, v in bound.arguments.items() if k != "kwargs"} | bound.arguments.get("kwargs", {})
        as_tuple = named.get("return_dict") is False
        if as_tuple:
            named["return_dict"] = True
        out = self.hooks.run(self.kind, named)
        return out.to_tuple() if as_tuple else out


class EncoderHooks:
    """The encoder's side of a patch.

    ``chosen``: what was chosen for the images and videos of the forward under way, by kind, None where it has none.
    ``latest``: what the last run of the encoder for each kind chose, inside of a forward or before it. ``cache``: the one that
    the forward under way was given.
    """

    def __init__(self, model: nn.Module, parts: Parts, method: Method):
        self.model, self.parts, self.method = model, parts, method
        if self.resizes and not parts.family.resizable:
            raise UnsupportedMethodError(
                f"{method.name} shows the vision encoder a smaller image, which {parts.family.name} cannot be shown; "
                "the methods random, uniform and pool can do without"
            )
        self.vision = VisionHooks(parts, method)
        self.chosen: dict[int, list[Chosen]] | None = None
        self.latest: dict[int, list[Chosen]] = {}
        self.running = False
        self.cache: Any = None
        self.shrunk: tuple[tuple[int, int], tuple[int, int]] | None = None

    def install(self) -> list[Any]:
        for kind in self.parts.family.seams:
            self.parts.base.__dict__[SEAMS[kind]] = ImageFeatures(self, kind)
        handles = self.vision.install()
        if self.resizes and self.parts.family.smaller is None:
            handles.append(self.parts.vision.register_forward_pre_hook(self._shrink, with_kwargs=True))
            handles.append(self.parts.projector.register_forward_hook(self._restore_grid))
        return handles

    @property
    def resizes(self) -> bool:
        """Whether the method shows the encoder a smaller image."""
        return self.method.resizes

    def uninstall(self) -> None:
        for kind in self.parts.family.seams:
            self.parts.base.__dict__.pop(SEAMS[kind], None)

    @_disable_dynamo  # torch.compiler.disable, without importing the compiler for those who do not compile
    def run(self, kind: int, arguments: dict[str, Any]) -> Any:
        """Runs the encoder and lets the method choose; returns what the model itself does, of unchanged length.

        Methods are host code that asks for lengths, so torch.compile leaves it out; encoders may be compiled on their own.
        """
        if self.running:
            # Qwen3-VL's video seam calls its image seam.
            return self._original(kind, arguments)
        self.latest.pop(kind, None)
        self.running = True
        try:
            out, chosen = self._run(kind, arguments)
        finally:
            self.running = False
        for choice in chosen:
            choice.kind = kind
        self.latest[kind] = chosen
        self.chosen = {**(self.chosen or {}), kind: chosen}
        if hasattr(out, "pooler_output"):
            setattr(out, CHOICE, chosen)
        return out

    def expect(self, encoded: dict[str, Any] | None) -> None:
        """A forward begins. ``encoded``: outputs of the encoder that it is given, None if it runs the encoder or has no image.

        A choice travels with the output it was made for; outputs that somebody has copied belong to the latest one.
        """
        self.chosen = None
        if not isinstance(encoded, dict):
            return
        found: dict[int, list[Chosen]] = {}
        for modality, kind in MODALITIES.items():
            out = encoded.get(modality)
            if out is None or kind not in self.parts.family.seams:
                continue
            choice = getattr(out, CHOICE, None) or self.latest.get(kind)
            if choice is None:
                raise VLPruneError(
                    f"{type(self.model).__name__} was given {modality} features that were encoded before the method was "
                    "applied; encode them again, or pass the pixels"
                )
            self._check_whole(kind, out, choice)
            if not all(c.idle for c in choice):
                caches.check(self.cache)
            found[kind] = choice
        self.chosen = found or None

    def _check_whole(self, kind: int, out: Any, chosen: list[Chosen]) -> None:
        """Raises :class:`VLPruneError` for features that were cut; those of beams are copies of whole ones."""
        tail = self.parts.family.tail if kind == VIDEO else None
        behind = 0 if tail is None else tail(self.model).shape[0]
        given = sum(piece.flatten(0, -2).shape[0] for piece in features_of(out))
        totals = [choice.layout.total for choice in chosen]
        if not any(given and total and given % total == 0 for total in (sum(totals), sum(totals) - behind * len(totals))):
            raise VLPruneError(
                f"{given} features of visual tokens were given where the images have {sum(totals)}: pass each prompt "
                "whole and with its own images (a prefill in chunks cannot be pruned)"
            )

    def _original(self, kind: int, arguments: dict[str, Any]) -> Any:
        """What :class:`ImageFeatures` stands in for. No bound method of it: torch.compile would take one for the stand-in."""
        return getattr(type(self.parts.base), SEAMS[kind])(self.parts.base, **arguments)

    def _run(self, kind: int, arguments: dict[str, Any]) -> tuple[Any, list[Chosen]]:
        layouts = self.parts.family.seams[kind](self.model, arguments)
        plans = [self.method.plan(layout, self.parts.shape) for layout in layouts]
        asked = any(map(partial(asks, self.method), layouts, plans))
        if asked:
            caches.check(self.cache)
        if not asked or not {"encode", "select"} & set(self.method.stages):
            out = self._original(kind, arguments)
            return out, [Chosen(layout, None, layout.grid, plan) for plan, layout in zip(plans, layouts, strict=True)]
        grids = [self.method.encoder_grid(layout) for layout in layouts]
        groups: dict[Any, list[int]] = {}
        for index, (layout, grid) in enumerate(zip(layouts, grids, strict=True)):
            groups.setdefault(None if grid == layout.grid else (layout.grid, grid), []).append(index)
        if len(groups) == 1 or self.parts.family.smaller is not None:
            return self._run_group(kind, arguments, layouts, grids)
        return self._run_groups(kind, arguments, layouts, grids, list(groups.values()))

    def _run_group(
        self, kind: int, arguments: dict[str, Any], layouts: list[ImageLayout], grids: list[tuple[int, int]]
    ) -> tuple[Any, list[Chosen]]:
        """Images that go through the encoder together, their tiles at ``grids``."""
        plans = [self.method.plan(layout, self.parts.shape) for layout in layouts]
        out, tracks = self._encode(kind, arguments, layouts, grids, [*map(partial(asks, self.method), layouts, plans)])
        tail = self.parts.family.tail
        features = features_of(out)
        images = taken_apart(features, layouts, None if tail is None else tail(self.model))
        chosen, rows = [], []
        for track, plan, grid, image in zip(tracks, plans, grids, images, strict=True):
            tokens = ImageTokens(image, track.layout, plan.entering, track.signals, track.alive, track.notes)
            choice, image = choose(self.method, tokens, plan, grid)
            choice.steps[:0] = track.steps
            chosen.append(choice)
            rows.append(image)
        if any(new is not old for new, old in zip(rows, images, strict=True)):
            out = with_features(out, put_together(features, rows))
        return out, chosen

    def _encode(
        self,
        kind: int,
        arguments: dict[str, Any],
        layouts: list[ImageLayout],
        grids: list[tuple[int, int]],
        asked: list[bool],
    ) -> tuple[Any, list[Track]]:
        """What the encoder gives for tiles at ``grids``, on the full grids, and what happened to the images in it."""
        smaller = self.parts.family.smaller
        shrunk = any(grid != layout.grid for layout, grid in zip(layouts, grids, strict=True))
        if shrunk and smaller is not None:
            arguments = smaller(self.model, arguments, grids)
        elif shrunk:
            self.shrunk = (layouts[0].grid, grids[0])
        try:
            with self.vision.watch(layouts, grids, asked, arguments) as tracks:
                out = self._original(kind, arguments)
        finally:
            self.shrunk = None
        return restored(out, layouts, grids) if shrunk and smaller is not None else out, tracks

    def _run_groups(
        self,
        kind: int,
        arguments: dict[str, Any],
        layouts: list[ImageLayout],
        grids: list[tuple[int, int]],
        groups: list[list[int]],
    ) -> tuple[Any, list[Chosen]]:
        """Images whose tiles differ in grid: one run of the encoder a grid, so that a batch equals single images."""
        out: Any = None
        rows: list[Any] = [None] * len(layouts)
        chosen: list[Any] = [None] * len(layouts)
        for members in groups:
            part = {k: v[members] if k in self.parts.family.pixels and torch.is_tensor(v) else v for k, v in arguments.items()}
            out, choices = self._run_group(kind, part, [layouts[i] for i in members], [grids[i] for i in members])
            features = features_of(out)
            for place, index in enumerate(members):
                rows[index], chosen[index] = features[place], choices[place]
        return with_features(out, rows), chosen

    # ------------------------------------------------------------------ a smaller image for the encoder

    def _shrink(self, vision: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.shrunk is None:
            return None
        rows, columns = self.shrunk[1]
        pixels = args[0] if args else kwargs["pixel_values"]
        patch = self.parts.vision.config.patch_size
        size = (rows * patch, columns * patch)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False).to(pixels.dtype)
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (small, *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": small}

    def _restore_grid(self, projector: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        """Features of the small grid, put where their patches' centres lie on the full one; zeros elsewhere."""
        if self.shrunk is None:
            return None
        (rows, columns), _ = self.shrunk
        full = out.new_zeros(out.shape[0], rows * columns, out.shape[2])
        return full.index_copy(1, to_device(centres(*self.shrunk), out.device), out)
