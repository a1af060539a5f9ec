"""What a pruned forward kept, and what that saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from vlprune.engine.encoder import Chosen
    from vlprune.engine.family import Parts
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
    """One image: ``total`` visual tokens in the prompt, ``kept`` their ascending positions that entered the LLM."""

    total: int
    kept: list[int]
    stages: list[StageReport]

    @property
    def tokens_out(self) -> int:
        """Visual tokens that enter the LLM."""
        return len(self.kept)


@dataclass(frozen=True)
class Report:
    """The last forward with images, images in the order of the prompts.

    ``entering``, ``leaving``, ``layer_mean``: visual tokens of all images that enter the LLM, that leave its last stage,
    and their mean over its layers. ``flops``: multiplications and additions of vision encoder, projector and LLM layers in
    that forward. ``kv_bytes``: bytes of KV cache that hold a token after it; a static cache takes its full size all the same.
    """

    method: dict[str, Any]
    images: list[ImageReport]
    entering: int
    leaving: int
    layer_mean: float
    flops: int
    flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int

    @property
    def total(self) -> int:
        """Visual tokens of all images in the prompts."""
        return sum(image.total for image in self.images)

    @property
    def selection_seconds(self) -> float:
        return sum(stage.seconds for image in self.images for stage in image.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return {**asdict(self), "total": self.total, "selection_seconds": self.selection_seconds}

    def __str__(self) -> str:
        knobs = ", ".join(f"{k}={v}" for k, v in self.method.items() if k != "method")
        lines = [f"{self.method['method']} ({knobs})", f"{'image':>6} {'stage':>10} {'tokens in':>10} {'out':>6} {'ms':>8}"]
        for index, image in enumerate(self.images):
            for stage in image.stages:
                cells = f"{stage.tokens_in:>10} {stage.tokens_out:>6} {stage.seconds * 1000:>8.2f}"
                name = stage.name if stage.layer is None else f"{stage.name} {stage.layer}"
                lines.append(f"{index:>6} {name:>10} {cells}")
        lines.append(f"visual tokens into the LLM: {self.entering} of {self.total}, mean over its layers {self.layer_mean:g}")
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

        def llm(new: list[int], past: list[int]) -> int:
            width = _width(parts.text.config)
            flops = [_layer_flops([b], n, p + n, width) for b, n, p in zip(parts.text_layers, new, past, strict=True)]
            return prefill.batch * sum(flops)

        return cls(
            method=patch.method.to_dict(),
            images=[_image(image) for image in prefill.images],
            entering=sum(choice.kept for choice in choices),
            leaving=sum(image[-1] for image in counts),
            layer_mean=sum(map(sum, counts)) / layers,
            flops=llm(physical, held) + sum(_encoder_flops(parts, choice) for choice in choices),
            flops_unpruned=llm([prefill.logical] * layers, [prefill.past] * layers)
            + sum(c.layout.tiles * _tile_flops(parts, c.layout.grid) for c in choices),
            kv_bytes=round(token * sum(cached)),
            kv_bytes_unpruned=round(token * layers * (prefill.past + prefill.logical)),
        )


def _image(image: Image) -> ImageReport:
    choice = image.chosen
    kept = list(range(choice.layout.total)) if choice.keep is None else choice.keep.tolist()
    return ImageReport(choice.layout.total, kept, [_stage(step) for step in [*choice.steps, *image.steps]])


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


def _encoder_flops(parts: Parts, choice: Chosen) -> int:
    return choice.layout.tiles * _tile_flops(parts, choice.grid)


def _tile_flops(parts: Parts, grid: tuple[int, int]) -> int:
    """What vision encoder and projector need for one tile of ``grid`` patches."""
    patches = grid[0] * grid[1]
    tokens = patches + parts.prefix
    embedding = sum(p.numel() for p in parts.vision.parameters() if p.ndim == 4)
    projector = sum(p.numel() for p in parts.projector.parameters() if p.ndim == 2)
    blocks = _layer_flops(parts.vision_layers, tokens, tokens, parts.vision.config.hidden_size)
    return blocks + 2 * patches * (embedding + projector)


def _layer_flops(layers: list[nn.Module], new: int, keys: int, width: int) -> int:
    """Floating point operations of ``layers`` for ``new`` tokens that attend to ``keys`` tokens.

    Two for each weight of a matrix and token, and four for each pair of query and key and channel; a causal mask is not
    taken off, as torch's own counter does it.
    """
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    return new * (2 * weights + 4 * len(layers) * keys * width)


def _width(config: Any) -> int:
    """Channels of all query heads."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head * config.num_attention_heads


def _kv_bytes_per_token(text: Any) -> int:
    config = text.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(text.dtype).bits // 8
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
