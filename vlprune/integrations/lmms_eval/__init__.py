"""Pruned models for lmms-eval, which finds them by the entry point group ``lmms_eval.models``.

``--model vlprune_llava --model_args pretrained=...,method=hired,budget=0.2``; see docs/lmms-eval.md. Written against
lmms-eval 0.7.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODELS = {
    "vlprune_llava": "Llava",
    "vlprune_llava_onevision": "LlavaOnevision",
    "vlprune_qwen2_5_vl": "Qwen2_5_VL",
    "vlprune_qwen3_vl": "Qwen3_VL",
}
"""Model id -> class in ``chat.py``, for tasks that give messages, and in ``simple.py``, for ``--force_simple``."""


def manifests() -> list[ModelManifest]:
    """What lmms-eval registers. It imports a class when its model is asked for, not before."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=model_id,
            chat_class_path=f"{__name__}.chat.{name}",
            simple_class_path=f"{__name__}.simple.{name}",
        )
        for model_id, name in MODELS.items()
    ]
