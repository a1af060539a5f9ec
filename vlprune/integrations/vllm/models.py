"""vLLM's models with fewer visual tokens, and their processors, which announce as many."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models import llava, llava_next, qwen2_5_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlprune.integrations.vllm import positions as places
from vlprune.integrations.vllm.configure import method_of
from vlprune.integrations.vllm.tower import Pruner, Tower
from vlprune.method import Method

# ------------------------------------------------------------------ processors


class Info:
    """Stands in front of vLLM's class that tells what a model takes: images alone."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {name: most if name == "image" else 0 for name, most in super().get_supported_mm_limits().items()}


class Processor:
    """Stands in front of vLLM's processor: an image gets as many placeholders as tokens of it will be left."""

    info: Any

    @cached_property
    def _tower(self) -> Tower:
        return Tower(self._config)

    @cached_property
    def _method(self) -> Method:
        return method_of(self._config)

    @property
    def _config(self) -> Any:
        return self.info.ctx.model_config.hf_config

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        # Caches of features and of prompts go by these; a cache may be shared with a server of other settings.
        settings = json.dumps(self._config.vlprune, sort_keys=True).encode()
        suffix = hashlib.sha256(settings).hexdigest()[:16]
        return {kind: [f"{known}-{suffix}" for known in hashes] for kind, hashes in super()._get_mm_hashes(inputs).items()}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> list[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [self._shortened(update, out_mm_kwargs) for update in updates if update.modality == "image"]

    def _shortened(self, update: Any, items: Any) -> Any:
        def replacement(index: int) -> list[int]:
            tokens = update.replacement(index)
            layout = self._tower.layout(items["image"][index])
            if len(tokens) != layout.total:
                raise ValueError(
                    f"vLLM gives this image {len(tokens)} tokens, vlprune expects {layout.total}; please report it"
                )
            return tokens[: self._method.plan(layout, self._tower.shape).entering]

        return dataclasses.replace(update, replacement=replacement)


# ------------------------------------------------------------------ models


class Pruned:
    """Stands in front of vLLM's model class. Tokens that are left keep their positions."""

    supports_mrope = True
    supports_multimodal_pruning = True
    pruner: Pruner

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        config = vllm_config.model_config.hf_config
        self.pruner = Pruner(config, method_of(config), self._vision_blocks())

    def _vision_blocks(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    @property
    def _image_token(self) -> int:
        config: Any = self.pruner.tower.config
        return getattr(config, "image_token_id", None) or config.image_token_index

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        given = self._parse_and_validate_image_input(**kwargs)
        return [] if given is None else self.pruner.run(kwargs, lambda: self._process_image_input(given))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        tower, spans = self.pruner.tower, []
        for feature in mm_features:
            where = feature.mm_position
            spans.append(places.Span(where.offset, where.length, places.extent(tower.layout(feature.data), tower.mrope)))
        return places.of_prompt(len(input_tokens), spans)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Features without the columns of positions, positions, and how much further the text behind the prompt stands."""
        if not multimodal_embeddings:
            # vLLM's older runner asks in each step for each request, mostly about new tokens.
            return [], mrope_positions, places.delta_of(mrope_positions)
        visual = torch.as_tensor(input_ids, device=mrope_positions.device) == self._image_token
        columns = [features[:, -places.COLUMNS :] for features in multimodal_embeddings]
        found = torch.cat(columns).to(mrope_positions.device)
        now, delta = places.with_images(
            mrope_positions, visual, num_computed_tokens, places.from_columns(found), self.pruner.tower.mrope
        )
        return [features[:, : -places.COLUMNS] for features in multimodal_embeddings], now, delta


class OnePosition(Pruned):
    """A model whose LLM has one position a token."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        longest = vllm_config.model_config.hf_text_config.max_position_embeddings
        self.last_position = max(longest, vllm_config.model_config.max_model_len) - 1

    def _vision_blocks(self) -> Sequence[nn.Module]:
        return list(self.vision_tower.vision_model.encoder.layers)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The whole prompt may be longer than the LLM's table of positions, though the pruned one is not. In place: a CUDA
        # graph reads them where they were when it was recorded.
        first = positions[0] if positions.ndim == 2 else positions
        return super().forward(input_ids, first.clamp_(max=self.last_position), *args, **kwargs)


class LlavaInfo(Info, llava.LlavaProcessingInfo): ...


class LlavaProcessor(Processor, llava.LlavaMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class PrunedLlava(OnePosition, llava.LlavaForConditionalGeneration): ...


class LlavaNextInfo(Info, llava_next.LlavaNextProcessingInfo): ...


class LlavaNextProcessor(Processor, llava_next.LlavaNextMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class PrunedLlavaNext(OnePosition, llava_next.LlavaNextForConditionalGeneration):
    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        pixels = kwargs.get("pixel_values")
        if pixels is not None:
            # Where a prompt has images of several sizes, their tiles are filled up to the same number.
            layouts = self.pruner.tower.layouts(kwargs)
            kwargs["pixel_values"] = [tiles[: layout.tiles] for tiles, layout in zip(pixels, layouts, strict=True)]
        return super().embed_multimodal(**kwargs)


class QwenVisionBlocks(Pruned):
    def _vision_blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.blocks)


class Qwen2_5Info(Info, qwen2_5_vl.Qwen2_5_VLProcessingInfo): ...


class Qwen2_5Processor(Processor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5Processor, info=Qwen2_5Info, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen2_5_VL(QwenVisionBlocks, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration): ...


class Qwen3Info(Info, qwen3_vl.Qwen3VLProcessingInfo): ...


class Qwen3Processor(Processor, qwen3_vl.Qwen3VLMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(Qwen3Processor, info=Qwen3Info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder)
class PrunedQwen3VL(QwenVisionBlocks, qwen3_vl.Qwen3VLForConditionalGeneration): ...
