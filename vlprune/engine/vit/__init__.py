"""Rows that merge inside of vision transformers on their own: classifiers, image towers, feature extractors."""

from vlprune.engine.vit.architecture import Architecture, VitShape, architecture_of, register, register_wrapper
from vlprune.engine.vit.layout import Layout, Rotary
from vlprune.engine.vit.patch import VitPatch, tower_patch

__all__ = [
    "Architecture",
    "Layout",
    "Rotary",
    "VitPatch",
    "VitShape",
    "architecture_of",
    "register",
    "register_wrapper",
    "tower_patch",
]
