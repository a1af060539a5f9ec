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


@dataclass(frozen=True)
class StageReport:
    """One stage: ``layer`` is None where it lies outside of the layers; ``seconds`` is time on the device."""

    name: str
    layer: int | None
    tokens_in: int
    tokens_out: int
    seconds: float


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
        lines = [f"{self.method['method']} ({knobs})", f"{'image':>6} {'stage':>8} {'tokens in':>10} {'out':>6} {'ms':>8}"]
        for index, image in enumerate(self.images):
            for stage in image.stages:
                cells = f"{stage.tokens_in:>10} {stage.tokens_out:>6} {stage.seconds * 1000:>8.2f}"
                lines.append(f"{index:>6} {stage.name:>8} {cells}")
        lines.append(f"visual tokens into the LLM: {self.entering} of {self.total}, mean over its layers {self.layer_mean:g}")
        for name, now, before in (
            ("GFLOPs", self.flops / 1e9, self.flops_unpruned / 1e9),
            ("KV MiB", self.kv_bytes / 2**20, self.kv_bytes_unpruned / 2**20),
        ):
            lines.append(f"{name}: {now:.3g} of {before:.3g} ({now / before:.1%})" if before else f"{name}: 0")
        return "\n".join(lines)

    @classmethod
    def of(cls, patch: Patch) -> Report:
        prefill = patch.prefill
        assert prefill is not None
        images = [_image(choice) for choice in prefill.chosen]
        entering = sum(image.tokens_out for image in images)
        text, layers = patch.parts.text, patch.parts.text_layers

        def llm(new: int, past: int) -> int:
            return prefill.batch * _layer_flops(layers, new, past + new, _width(text.config))

        token = _kv_bytes_per_token(text) * prefill.batch
        return cls(
            method=patch.method.to_dict(),
            images=images,
            entering=entering,
            leaving=entering,
            layer_mean=float(entering),
            flops=llm(prefill.physical, prefill.past_physical)
            + sum(c.layout.tiles * _tile_flops(patch.parts, c.grid) for c in prefill.chosen),
            flops_unpruned=llm(prefill.logical, prefill.past_logical)
            + sum(c.layout.tiles * _tile_flops(patch.parts, c.layout.grid) for c in prefill.chosen),
            kv_bytes=token * (prefill.past_physical + prefill.physical),
            kv_bytes_unpruned=token * (prefill.past_logical + prefill.logical),
        )


def _image(choice: Chosen) -> ImageReport:
    total = choice.layout.total
    kept = list(range(total)) if choice.keep is None else choice.keep.tolist()
    return ImageReport(total, kept, [StageReport("select", None, total, len(kept), choice.clock.seconds)])


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
