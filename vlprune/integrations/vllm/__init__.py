"""Pruned models for vLLM, which finds them by the entry point group ``vllm.general_plugins``.

``vllm serve MODEL --additional-config '{"vlprune": {"method": "hired", "budget": 0.2}}'``; see docs/serving.md. Without that,
or the environment variable ``VLPRUNE_VLLM``, vLLM is as it was. Written against vLLM 0.32.
"""

from __future__ import annotations

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "PrunedLlava",
    "LlavaNextForConditionalGeneration": "PrunedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "PrunedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "PrunedQwen3VL",
}
"""vLLM's architectures, and the class in ``models.py`` that takes the place of each."""


def plugin() -> None:
    """vLLM calls it in each of its processes, maybe more than once. Model classes are imported when they are needed."""
    from vllm import ModelRegistry  # pyright: ignore

    from vlprune.integrations.vllm.configure import ask_again_on_cpu, watch_configurations

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
    watch_configurations()
    ask_again_on_cpu()
