"""What a pruned forward kept, and what that saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from vlprune import flops
from vlprune.image import ImageLayout

if TYPE_CHECKING:
    from vlprune.engine.patch import Patch
    from vlprune.engine.sequence import Image
    from vlprune.engine.steps import Step


@dataclass(frozen=True)
class StageReport:
    """One stage: ``layer`` is None where it lies outside of the layers; ``seconds`` is time on the device.

    ``kept``: which of the image's placeholders had a token afterwards; a list for each head where ``evict`` chose by head.
    """

    name: str
    layer: int | None
    tokens_in: int
    tokens_out: int
    seconds: float
    kept: list[Any]


@dataclass(frozen=True)
class ImageReport:
    """One image: ``total`` visual tokens in the prompt, ``kept`` their ascending positions that entered the LLM.

    ``layout``: where the tokens lie in the image, for pictures. ``video``: the image is one, its tiles are frames.
    """

    total: int
    kept: list[int]
    stages: list[StageReport]
    layout: ImageLayout | None = field(default=None, repr=False, compare=False)
    video: bool = False

    @property
    def tokens_out(self) -> int:
        """Visual tokens that enter the LLM."""
        return len(self.kept)


@dataclass(frozen=True)
class Report:
    """The last forward with images, images in the order of the prompts.

    ``entering``, ``leaving``, ``layer_mean``: visual tokens of all images that enter the LLM, that leave its last stage,
    and their mean over its layers. ``cached``: mean over layers of their entries in the KV cache after that forward.
    ``flops``: multiplications and additions of vision encoder, projector and LLM layers in it, see :mod:`vlprune.flops`;
    what a method itself computes is not among them. ``kv_bytes``: bytes of KV cache that hold a token after it; a static
    cache takes its full size all the same, and a layer with a sliding window no more than its window. ``layers``: of the LLM.
    """

    method: dict[str, Any]
    images: list[ImageReport]
    entering: int
    leaving: int
    layer_mean: float
    cached: float
    flops: int
    flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int
    model_type: str = ""
    layers: int = 0

    @property
    def total(self) -> int:
        """Visual tokens of all images in the prompts."""
        return sum(image.total for image in self.images)

    @property
    def selection_seconds(self) -> float:
        return sum(stage.seconds for image in self.images for stage in image.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON; without the layouts."""
        told = asdict(replace(self, images=[replace(image, layout=None) for image in self.images]))
        for image in told["images"]:
            del image["layout"]
        return {**told, "total": self.total, "selection_seconds": self.selection_seconds}

    def __str__(self) -> str:
        knobs = ", ".join(f"{k}={v}" for k, v in self.method.items() if k != "method")
        lines = [f"{self.method['method']} ({knobs})", f"{'image':>6} {'stage':>10} {'tokens in':>10} {'out':>6} {'ms':>8}"]
        for index, image in enumerate(self.images):
            for stage in image.stages:
                cells = f"{stage.tokens_in:>10} {stage.tokens_out:>6} {stage.seconds * 1000:>8.2f}"
                name = stage.name if stage.layer is None else f"{stage.name} {stage.layer}"
                lines.append(f"{index:>6} {name:>10} {cells}")
        lines.append(
            f"visual tokens into the LLM: {self.entering} of {self.total}, mean over its layers {self.layer_mean:g}, "
            f"in the cache {self.cached:g}"
        )
        for name, now, before in (
            ("GFLOPs", self.flops / 1e9, self.flops_unpruned / 1e9),
            ("KV MiB", self.kv_bytes / 2**20, self.kv_bytes_unpruned / 2**20),
        ):
            lines.append(f"{name}: {now:.3g} of {before:.3g} ({now / before:.1%})" if before else f"{name}: 0")
        return "\n".join(lines)

    @classmethod
    def of(cls, patch: Patch) -> Report:
        prefill, parts = patch.prefill, patch.parts
        assert prefill is not None
        layers = len(parts.text_layers)
        physical = prefill.physical or [prefill.logical] * layers
        held = prefill.held or [prefill.past] * layers
        cached = prefill.cached or [prefill.logical + prefill.past] * layers
        counts = [_layer_counts(image, layers) for image in prefill.images]
        token = _kv_bytes_per_token(parts.text) * prefill.batch / layers
        choices = [image.chosen for image in prefill.images]
        unpruned = prefill.batch * flops.text(parts, [prefill.logical] * layers, [prefill.past] * layers)
        return cls(
            method=patch.method.to_dict(),
            images=[_image(image) for image in prefill.images],
            entering=sum(choice.kept for choice in choices),
            leaving=sum(image[-1] for image in counts),
            layer_mean=sum(map(sum, counts)) / layers,
            cached=sum(map(_cached, prefill.images, counts)) / layers,
            flops=prefill.batch * flops.text(parts, physical, held)
            + sum(flops.vision(parts, c.layout, c.grid, c.steps) for c in choices),
            flops_unpruned=unpruned + sum(flops.vision(parts, c.layout, c.layout.grid) for c in choices),
            kv_bytes=round(token * sum(cached)),
            kv_bytes_unpruned=round(token * layers * (prefill.past + prefill.logical)),
            model_type=parts.model.config.model_type,
            layers=layers,
        )


def _image(image: Image) -> ImageReport:
    from vlprune.engine.family import VIDEO  # the engine is imported by the first apply

    choice = image.chosen
    kept = list(range(choice.layout.total)) if choice.keep is None else choice.keep.tolist()
    stages = [_stage(step) for step in [*choice.steps, *image.steps]]
    return ImageReport(choice.layout.total, kept, stages, choice.layout, video=choice.kind == VIDEO)


def _stage(step: Step) -> StageReport:
    return StageReport(step.stage, step.layer, step.tokens_in, step.tokens_out, step.clock.seconds, step.kept.tolist())


def _layer_counts(image: Image, layers: int) -> list[int]:
    """The image's visual tokens in each of the LLM's layers."""
    left = {step.layer: step.tokens_out for step in image.steps if step.stage == "prefill"}
    counts, now = [], image.chosen.kept
    for layer in range(layers):
        now = left.get(layer, now)
        counts.append(now)
    return counts


def _cached(image: Image, counts: list[int]) -> int:
    """Entries of the image in the cache after the prompt, added up over layers; ``counts`` went through each of them."""
    left: dict[int | None, int] = {}
    for step in image.steps:
        if step.stage == "evict":
            # While it generates, a method may evict again.
            left.setdefault(step.layer, step.tokens_out)
    return sum(left.get(layer, count) for layer, count in enumerate(counts))


def _kv_bytes_per_token(text: Any) -> int:
    config, size = text.config, torch.finfo(text.dtype).bits // 8
    return 2 * config.num_hidden_layers * config.num_key_value_heads * flops.head_width(config) * size
