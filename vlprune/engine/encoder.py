"""Around the vision encoder: measures what a method needs, lets it choose, hands its choice to the decoder's side.

``get_image_features`` is the one seam that every family has between encoder and LLM, and generate() calls it on its own
before the prefill. Its output keeps its length, so placeholder checks and beam expansion upstream go on working.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from vlprune.engine.family import Parts
from vlprune.engine.probes import Probe
from vlprune.errors import BudgetError, VLPruneError
from vlprune.image import ImageLayout, ImageTokens, centres
from vlprune.method import Merge, Method, Selection

CHOICE = "_vlprune_choice"
"""Attribute of an encoder's output: what was chosen for its images."""


@dataclass(eq=False)
class Chosen:
    """What was chosen for one image: ``keep (T,)`` on the device, None for all; ``grid`` the encoder saw a tile at."""

    layout: ImageLayout
    keep: Tensor | None
    grid: tuple[int, int]
    clock: Clock

    @property
    def kept(self) -> int:
        return self.layout.total if self.keep is None else self.keep.shape[0]


class Clock:
    """Time on the device between ``start`` and ``stop``, read when somebody asks, so that nothing waits for it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = [self._mark()]

    def stop(self) -> None:
        self.marks.append(self._mark())

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __getstate__(self) -> dict[str, Any]:
        # Events of a device can neither be copied nor pickled.
        return {"cuda": False, "marks": [0.0, self.seconds]}

    @property
    def seconds(self) -> float:
        start, end = self.marks
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class ImageFeatures:
    """Stands in for the base model's ``get_image_features`` while a method is applied.

    An object and no closure, so that deepcopy and pickle keep it together with the model it belongs to.
    """

    def __init__(self, hooks: EncoderHooks):
        self.hooks = hooks

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() reads which arguments the method takes.
        base = self.hooks.parts.base
        return inspect.signature(type(base).get_image_features.__get__(base))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        named = {k: v for k, v in bound.arguments.items() if k != "kwargs"} | bound.arguments.get("kwargs", {})
        as_tuple = named.get("return_dict") is False
        if as_tuple:
            named["return_dict"] = True
        out = self.hooks.run(named)
        return out.to_tuple() if as_tuple else out


class EncoderHooks:
    """The encoder's side of a patch.

    ``chosen``: what was chosen for the images of the forward under way, None where it has none. ``latest``: what the last
    run of the encoder chose, inside of a forward or before it.
    """

    def __init__(self, model: nn.Module, parts: Parts, method: Method):
        self.model, self.parts, self.method = model, parts, method
        self.probe = Probe(parts, method.needs)
        self.chosen: list[Chosen] | None = None
        self.latest: list[Chosen] | None = None
        self.shrunk: tuple[tuple[int, int], tuple[int, int]] | None = None

    def install(self) -> list[Any]:
        self.parts.base.__dict__["get_image_features"] = ImageFeatures(self)
        handles = self.probe.install()
        if type(self.method).encoder_grid is not Method.encoder_grid:
            handles.append(self.parts.vision.register_forward_pre_hook(self._shrink, with_kwargs=True))
            handles.append(self.parts.projector.register_forward_hook(self._restore_grid))
        return handles

    def uninstall(self) -> None:
        self.parts.base.__dict__.pop("get_image_features", None)

    @_disable_dynamo  # torch.compiler.disable, without importing the compiler for those who do not compile
    def run(self, arguments: dict[str, Any]) -> Any:
        """Runs the encoder and lets the method choose; returns what the model itself does, of unchanged length.

        Methods are host code that asks for lengths, so torch.compile leaves it out; encoders may be compiled on their own.
        """
        self.chosen = self.latest = None
        out = self._run(arguments)
        self.latest = self.chosen
        if hasattr(out, "pooler_output"):
            setattr(out, CHOICE, self.chosen)
        return out

    def expect(self, encoded: dict[str, Any] | None) -> None:
        """A forward begins. ``encoded``: outputs of the encoder that it is given, None if it runs the encoder or has no image.

        A choice travels with the output it was made for; outputs that somebody has copied belong to the latest one.
        """
        self.chosen = None
        if encoded:
            self.chosen = next((c for out in encoded.values() if (c := getattr(out, CHOICE, None))), self.latest)
            if self.chosen is None:
                raise VLPruneError(
                    f"{type(self.model).__name__} was given image features that were encoded before the method was applied; "
                    "encode them again, or pass the pixels"
                )

    def _original(self, arguments: dict[str, Any]) -> Any:
        """What :class:`ImageFeatures` stands in for. No bound method of it: torch.compile would take one for the stand-in."""
        return type(self.parts.base).get_image_features(self.parts.base, **arguments)

    def _run(self, arguments: dict[str, Any]) -> Any:
        layouts = self.parts.family.layouts(self.model, arguments)
        if all(self.method.count(layout.total) >= layout.total for layout in layouts) and not self.method.adaptive:
            out = self._original(arguments)
            clock = Clock(torch.device("cpu"))
            clock.stop()
            self.chosen = [Chosen(layout, None, layout.grid, clock) for layout in layouts]
            return out
        groups: dict[tuple[int, int], list[int]] = {}
        for index, layout in enumerate(layouts):
            groups.setdefault(self.method.encoder_grid(layout), []).append(index)
        if len(groups) == 1:
            return self._run_group(arguments, layouts, next(iter(groups)))
        return self._run_groups(arguments, layouts, groups)

    def _run_group(self, arguments: dict[str, Any], layouts: list[ImageLayout], grid: tuple[int, int]) -> Any:
        """Images whose tiles the encoder sees at the same ``grid``."""
        self.shrunk = (layouts[0].grid, grid) if grid != layouts[0].grid else None
        try:
            with self.probe:
                out = self._original(arguments)
        finally:
            self.shrunk = None
        features = out.pooler_output if hasattr(out, "pooler_output") else out
        signals = self.probe.take()
        chosen, rows, first = [], [], 0
        for layout, image in zip(layouts, features, strict=True):
            tiles = {signal: values[first : first + layout.tiles] for signal, values in signals.items()}
            first += layout.tiles
            choice, image = self._choose(ImageTokens(image, layout, self.method.count(layout.total), tiles), grid)
            chosen.append(choice)
            rows.append(image)
        self.chosen = chosen
        return _with_features(out, rows, features)

    def _run_groups(self, arguments: dict[str, Any], layouts: list[ImageLayout], groups: dict) -> Any:
        """Images whose tiles differ in ``grid``: one run of the encoder a grid, so that a batch equals single images."""
        out: Any = None
        rows: list[Any] = [None] * len(layouts)
        chosen: list[Any] = [None] * len(layouts)
        for grid, members in groups.items():
            part = {k: v[members] if k in self.parts.family.pixels and torch.is_tensor(v) else v for k, v in arguments.items()}
            out = self._run_group(part, [layouts[i] for i in members], grid)
            features = out.pooler_output if hasattr(out, "pooler_output") else out
            for place, index in enumerate(members):
                rows[index], chosen[index] = features[place], (self.chosen or [])[place]
        self.chosen = chosen
        return _with_features(out, rows, rows)

    def _choose(self, image: ImageTokens, grid: tuple[int, int]) -> tuple[Chosen, Tensor]:
        """The choice for one image, and its features with merged rows in place."""
        clock = Clock(image.device)
        if image.count >= image.layout.total and not self.method.adaptive:
            clock.stop()
            return Chosen(image.layout, None, grid, clock), image.features
        with torch.no_grad():
            selection = self.method.select(image)
        features = _merged(image.features, selection)
        clock.stop()
        if not self.method.adaptive and selection.keep.shape[0] != image.count:
            raise BudgetError(
                f"{type(self.method).__name__} kept {selection.keep.shape[0]} visual tokens where its budget "
                f"{self.method.budget!r} allows exactly {image.count} of {image.layout.total}; "
                "a method whose count depends on the image's content says so: adaptive = True"
            )
        return Chosen(image.layout, selection.keep, grid, clock), features

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
        return full.index_copy(1, centres(*self.shrunk).to(out.device), out)


def _merged(features: Tensor, selection: Selection) -> Tensor:
    """``features (N, D)`` with every kept row replaced by the weighted mean of the rows merged into it."""
    if selection.merge is None:
        return features
    merge: Merge = selection.merge
    count = selection.keep.shape[0]
    slot = torch.where(merge.target < 0, count, merge.target)
    weight = torch.ones_like(slot, dtype=torch.float32) if merge.weight is None else merge.weight.float()
    sums = features.new_zeros(count + 1, features.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, slot, features.float() * weight[:, None])
    mass = weight.new_zeros(count + 1).index_add(0, slot, weight)
    means = (sums / mass.clamp(min=1e-12)[:, None])[:count].to(features.dtype)
    kept = features[selection.keep]
    means = torch.where((mass[:count] > 0)[:, None], means, kept)
    return features.index_copy(0, selection.keep, means)


def _with_features(out: Any, rows: list[Tensor], like: Any) -> Any:
    """``out`` with other features of the same lengths, in the container that the model had."""
    if torch.is_tensor(like):
        features: Any = torch.stack(rows)
    else:
        features = type(like)(rows)
    if hasattr(out, "pooler_output"):
        out.pooler_output = features
        return out
    return features
