"""Model families, one file each. A family from outside: ``vlprune.integrations.register(Family(...))``."""

from vlprune.engine.family import Family, register
from vlprune.integrations import gemma3, idefics, internvl, llava, llava_onevision, mistral3, open_clip, qwen_vl, timm, vit

__all__ = [
    "Family",
    "gemma3",
    "idefics",
    "internvl",
    "llava",
    "llava_onevision",
    "mistral3",
    "open_clip",
    "qwen_vl",
    "register",
    "timm",
    "vit",
]
