"""vLLM's vision encoders as the engine knows vision encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.attention import Call
from vlprune.engine.choosing import choose
from vlprune.engine.family import Family, Parts
from vlprune.engine.probes import Probe
from vlprune.engine.vision_rows import Packed, Tiles
from vlprune.errors import UnsupportedModelError, VLPruneError
from vlprune.image import ImageLayout, ImageTokens, ModelShape
from vlprune.integrations import llava, qwen_vl
from vlprune.integrations.vllm.positions import offsets, to_columns
from vlprune.method import Method

FAMILIES = (llava.LLAVA, llava.LLAVA_NEXT, qwen_vl.QWEN25_VL, qwen_vl.QWEN3_VL)
ARGUMENTS = ("image_sizes", "image_grid_thw")
"""Of what the processor tells of an image, what its layout follows from."""


class Tower:
    """The encoder of a model with ``config``, known without the model: vLLM's processor and model run in other processes.

    ``blocks``: those of the model. ``built``: how many of them vLLM builds; a LLaVA's projector takes the output of the last.
    """

    def __init__(self, config: Any, blocks: Sequence[nn.Module] = ()):
        self.config, vision = config, config.vision_config
        self.family = _family(config)
        depth = getattr(vision, "num_hidden_layers", None) or vision.depth
        self.parts = Parts(
            family=self.family,
            model=SimpleNamespace(config=config, model=SimpleNamespace(visual=SimpleNamespace(config=vision))),
            base=None,
            text=None,
            text_layers=[None] * config.get_text_config().num_hidden_layers,
            vision=SimpleNamespace(config=vision),
            vision_layers=[*blocks, *[None] * (depth - len(blocks))],
            projector=None,
            has_cls=vision.model_type in self.family.cls_types,
        )
        self.built = self.shape.feature_layer + 1

    @property
    def shape(self) -> ModelShape:
        return self.parts.shape

    @property
    def mrope(self) -> bool:
        """Whether a visual token's position has a row and a column."""
        return self.family.packed

    def layouts(self, arguments: dict[str, Any]) -> list[ImageLayout]:
        return self.family.layouts(self.parts.model, arguments)

    def layout(self, item: Any) -> ImageLayout:
        """The layout of one image, from what vLLM's processor made of it."""
        known = {name: item[name].data[None] for name in ARGUMENTS if name in item}
        return self.layouts({"pixel_values": torch.empty(1), **known})[0]


def _family(config: Any) -> Family:
    vision, feature = config.vision_config.model_type, getattr(config, "vision_feature_layer", -1)
    family = next((known for known in FAMILIES if config.model_type in known.model_types), None)
    if family is None or vision not in family.vision_types:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} with a vision encoder {vision!r} cannot be pruned in vLLM"
        )
    if not isinstance(feature, int):
        raise UnsupportedModelError(f"features of several vision blocks ({feature}) cannot be pruned in vLLM")
    return family


class TowerProbe(Probe):
    """Notes the calls of vLLM's attention kernels."""

    @contextmanager
    def noting(self, layers: Iterable[int]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in layers:
                kernel: Any = self.parts.vision_attention(layer).attn
                handle = kernel.register_forward_pre_hook(partial(self._note, layer), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _note(self, layer: int, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value", "cu_seqlens"), args, strict=False)) | kwargs
        options: dict[str, Any] = {"scaling": kernel.scale}
        if self.parts.family.packed:
            if kernel.attn_backend.name == "FLASHINFER":
                raise VLPruneError("with --mm-encoder-attn-backend FLASHINFER the bounds of images are not told; take another")
            options["cu_seq_lens_q"] = given["cu_seqlens"]
        states = [_heads_first(given[name], kernel.head_size) for name in ("query", "key", "value")]
        self.calls[layer].append(Call(*states, mask=None, causal=False, flash=False, options=options))


def _heads_first(states: Tensor, width: int) -> Tensor:
    """``(B, heads, L, width)`` of all heads, of ``states (B, L, heads of this rank * width)`` or with heads apart."""
    states = states.detach().flatten(2).unflatten(2, (-1, width))
    return _all_ranks(states).transpose(1, 2)


def _all_ranks(states: Tensor) -> Tensor:
    group = _ranks()
    return states if group is None else group.all_gather(states.contiguous(), dim=2)


def _ranks() -> Any:
    """The group of processes that share the model's heads; None if there is one."""
    from vllm.distributed import get_tp_group  # pyright: ignore

    group = get_tp_group()
    return group if group.world_size > 1 else None


class Pruner:
    """Prunes what a model's encoder gives. ``kept``: tokens of each image of the last run ``(T,)``, ascending."""

    def __init__(self, config: Any, method: Method, blocks: Sequence[nn.Module]):
        self.method, self.tower = method, Tower(config, blocks)
        self.probe = TowerProbe(self.tower.parts, method.wants(self.tower.shape))
        self.width: int = config.get_text_config().hidden_size
        self.kept: list[Tensor] = []

    def run(self, arguments: dict[str, Any], encode: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
        """Features of each image that are left, with the columns of ``positions.py``; ``encode()`` gives those of all."""
        layouts = self.tower.layouts(arguments)
        rows = (Packed if self.tower.family.packed else Tiles)(
            self.tower.parts, layouts, [layout.grid for layout in layouts], arguments
        )
        with self.probe.run():
            images = list(encode())
        try:
            self.probe.measure(rows.places)
            pruned = [self._prune(index, *pair) for index, pair in enumerate(zip(images, layouts, strict=True))]
        finally:
            self.probe.forget()
        self.kept = [keep for keep, _ in pruned]
        return [features for _, features in pruned]

    def _prune(self, index: int, features: Tensor, layout: ImageLayout) -> tuple[Tensor, Tensor]:
        """``features (total, D)``, and more channels behind those of the LLM's width (DeepStack)."""
        plan = self.method.plan(layout, self.tower.shape)
        image = ImageTokens(features[:, : self.width], layout, plan.entering, self.probe.take(index))
        chosen, merged = choose(self.method, image, plan, layout.grid)
        keep = torch.arange(layout.total, device=features.device) if chosen.keep is None else chosen.keep
        places = to_columns(offsets(layout, self.tower.mrope).to(keep.device)[keep], features)
        left = torch.cat([merged[keep], features[keep, self.width :], places], 1)
        group = _ranks()
        if group is not None:
            # Ranks compute the same, but one of them decides, so that rounding cannot tell them apart.
            keep, left = (group.broadcast(found.contiguous(), src=0) for found in (keep, left))
        return keep, left
