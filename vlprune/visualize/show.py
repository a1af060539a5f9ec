"""``show_kept``, ``show_stages``, ``show_merge_groups``, ``show_scores``: from a report to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlprune.report import ImageReport, Report, StageReport
from vlprune.visualize import drawing
from vlprune.visualize.places import Geometry, View, views
from vlprune.visualize.watch import Watched

Picture = Image.Image | str | Path | Sequence[Image.Image]
SIDE = 512
"""Pixels of the longer side of a picture that is drawn on."""
PANEL = 300
"""The same of a panel among others."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What is drawn on: frames (one of an image), the rectangles of tokens on them, and what is reported of the tokens."""

    frames: list[Image.Image]
    views: list[View]
    images: list[ImageReport]
    layers: int

    @classmethod
    def of(cls, picture: Picture, report: Report, image: int | None, processor: Any, side: int | None) -> Scene:
        frames = [picture] if isinstance(picture, (Image.Image, str, Path)) else list(picture)
        opened = [frame if isinstance(frame, Image.Image) else Image.open(frame) for frame in frames]
        images = report.images if image is None else [report.images[image]]
        geometry = Geometry.of(report.model_type, processor, images[0].video)
        found = views(images, opened[0].size, geometry, len(opened))
        drawn = [drawing.enlarged(frame, side) for frame in opened]
        return cls([frame for frame, _ in drawn], [drawing.scaled(v, drawn[0][1]) for v in found], images, report.layers)

    def of_frame(self, frame: int, view: str | None = None) -> list[View]:
        return [v for v in self.views if v.frame == frame and view in (None, v.name)]

    def every_frame(self, draw: Any) -> Image.Image:
        """``draw(frame's picture, number)``, the frames of a video beside each other."""
        drawn = [draw(picture, number) for number, picture in enumerate(self.frames)]
        if len(drawn) == 1:
            return drawn[0]
        return drawing.sheet([(f"frame {number + 1}", one) for number, one in enumerate(drawn)])


def show_kept(
    picture: Picture,
    report: Report,
    *,
    image: int | None = None,
    processor: Any = None,
    view: str | None = None,
    side: int | None = SIDE,
    outlines: bool = True,
) -> Image.Image:
    """The picture, dark where its tokens left, and the less so the more of the LLM's layers (or heads) have them in the cache.

    Where thumbnail and crops lie over each other, what only the thumbnail has kept is half dark.

    Args:
        picture: an image, its path, or the frames of a video as the model saw them.
        report: of the forward, from :func:`vlprune.report`.
        image: which image of the report it is; all of them by default, as where a model takes each tile for an image.
        processor: the model's, which tells what was cropped or padded.
        view: ``"thumbnail"`` or ``"crops"`` alone; by default both, one over the other.
        side: pixels of the longer side of the drawing; None for the picture's own.
        outlines: lines around what was kept, in another colour where only a thumbnail shows it.
    """
    scene = Scene.of(picture, report, image, processor, side)
    shares = {n: share(one, scene.layers) for n, one in enumerate(scene.images)}
    return scene.every_frame(lambda frame, n: drawing.kept(frame, scene.of_frame(n, view), shares, outlines))


def show_stages(
    picture: Picture,
    report: Report,
    *,
    image: int | None = None,
    processor: Any = None,
    side: int | None = PANEL,
    across: int | None = None,
) -> Image.Image:
    """A panel for the picture and for each stage: what the vision encoder, the step before the LLM, its layers and the cache
    have left. Of a video its middle frame is shown."""
    scene = Scene.of(picture, report, image, processor, side)
    frame = len(scene.frames) // 2
    total = sum(one.total for one in scene.images)
    panels = [(f"the image\n{total} visual tokens", scene.frames[frame])]
    for name, shares in stages(scene.images):
        count = sum(values.sum() for values in shares.values())
        caption = f"{name}\n{count:g} of {total} ({count / total:.0%})" if total else name
        panels.append((caption, drawing.kept(scene.frames[frame], scene.of_frame(frame), shares)))
    legend = [(drawing.KEPT, "kept"), ((40, 40, 40), "dropped")]
    if any(v.name == "thumbnail" for v in scene.views):
        legend.insert(1, (drawing.THUMBNAIL, "kept in the thumbnail (half dark where in it alone)"))
    return drawing.sheet(panels, across, legend)


def show_merge_groups(
    picture: Picture, report: Report, seen: Watched, *, image: int = 0, processor: Any = None, side: int | None = SIDE
) -> Image.Image:
    """The picture with the tokens that were merged into one in one colour; untinted: kept by themselves; dark: left.

    ``seen``: what :func:`watched` noted of the forward.
    """
    scene = Scene.of(picture, report, image, processor, side)
    groups = seen.groups(image).tolist()
    colours = {root: drawing.hues(n) for n, root in enumerate(sorted({root for root in groups if root >= 0}))}
    alone = {n: share(one, scene.layers) for n, one in enumerate(scene.images)}

    def draw(frame: Image.Image, number: int) -> Image.Image:
        shown = scene.of_frame(number, _finest(scene.views))
        below = drawing.kept(frame, shown, {n: np.maximum(s, np.array(groups) >= 0) for n, s in alone.items()}, False)
        tint = lambda view, token: colours.get(groups[token])  # noqa: E731
        return _blend(below, drawing.tinted(frame, shown, tint, 0.62), shown, lambda token: groups[token] >= 0)

    return scene.every_frame(draw)


def show_scores(
    picture: Picture,
    report: Report,
    seen: Watched,
    name: str | None = None,
    *,
    image: int = 0,
    processor: Any = None,
    side: int | None = SIDE,
) -> Image.Image:
    """The picture under a heat map of what a method scored tokens by: the attention of ``name``, by default the last measured.

    The hottest 2 % of the tokens have one colour, or a few sinks would leave all others cold.

    Raises:
        ValueError: the method asked for no attention.
    """
    scores = seen.scores(image)
    if not scores:
        raise ValueError(f"{report.method['method']} asks for no attention, so there is no heat map of it")
    values = scores[name or list(scores)[-1]].numpy()
    known = values[~np.isnan(values)]
    low, high = float(known.min()), float(np.quantile(known, 0.98))
    scene = Scene.of(picture, report, image, processor, side)

    def colour(view: View, token: int) -> Any:
        value = values[token]
        return None if np.isnan(value) else drawing.heat((value - low) / max(high - low, 1e-12))

    return scene.every_frame(lambda frame, n: drawing.tinted(frame, scene.of_frame(n, _finest(scene.views)), colour, 0.66))


def _finest(views: Sequence[View]) -> str | None:
    """Where thumbnail and crops show the same, the crops."""
    return "crops" if any(view.name == "crops" for view in views) else None


def _blend(below: Image.Image, above: Image.Image, shown: Sequence[View], picked: Any) -> Image.Image:
    """``above`` where a token is ``picked``."""
    mask = Image.new("L", below.size, 0)
    for view in shown:
        for _, _, token, box in view.cells():
            if picked(token):
                mask.paste(255, drawing.pixels(box))
    return Image.composite(above, below, mask)


# ------------------------------------------------------------------ what is left where


def share(image: ImageReport, layers: int) -> np.ndarray:
    """Of each token ``(total,)`` the share of the LLM's layers, and of their heads, whose cache has it after the prompt."""
    held = np.zeros(image.total)
    present = mask(image.kept, image.total)
    entering = {stage.layer: mask(stage.kept, image.total) for stage in image.stages if stage.name == "prefill"}
    cached = in_cache(image)
    for layer in range(layers):
        present = entering.get(layer, present)
        held += cached.get(layer, present)
    return held / layers if layers else present


def in_cache(image: ImageReport) -> dict[int | None, np.ndarray]:
    """Layer of the LLM -> the share of its heads that have each token, for layers whose cache was evicted after the prompt."""
    found: dict[int | None, np.ndarray] = {}
    for stage in image.stages:
        if stage.name == "evict" and stage.layer not in found:
            # Later ones, while it generates, are no longer about the prompt alone.
            heads = stage.kept if stage.kept and isinstance(stage.kept[0], list) else [stage.kept]
            found[stage.layer] = np.mean([mask(head, image.total) for head in heads], axis=0)
    return found


def mask(kept: Sequence[int], total: int) -> np.ndarray:
    found = np.zeros(total)
    found[np.asarray(kept, dtype=np.int64)] = 1
    return found


def stages(images: Sequence[ImageReport]) -> list[tuple[str, dict[int, np.ndarray]]]:
    """What a reader calls each stage, and for each image what it has left; all layers' caches are one stage, their mean."""
    found: list[tuple[str, dict[int, np.ndarray]]] = []
    for place, stage in enumerate(images[0].stages):
        if stage.name != "evict" and all(place < len(image.stages) for image in images):
            left = {n: mask(image.stages[place].kept, image.total) for n, image in enumerate(images)}
            found.append((_called(stage), left))
    if not any(stage.name in ("encode", "select") for stage in images[0].stages):
        found.insert(0, ("into the LLM", {n: mask(image.kept, image.total) for n, image in enumerate(images)}))
    cached = [in_cache(image) for image in images]
    if any(cached):
        means = {
            n: np.mean(list(layers.values()), axis=0) if layers else mask(images[n].kept, images[n].total)
            for n, layers in enumerate(cached)
        }
        found.append(("KV cache, mean over layers", means))
    return found


def _called(stage: StageReport) -> str:
    if stage.name == "encode":
        return f"vision encoder, after block {stage.layer}"
    return "before the LLM" if stage.name == "select" else f"LLM, from layer {stage.layer} on"
