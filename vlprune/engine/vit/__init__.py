"""Rows that merge inside of vision transformers on their own: classifiers, image towers, feature extractors."""

from vlprune.engine.vit.architecture import Architecture, Layout, VitShape, architecture_of, register
from vlprune.engine.vit.patch import VitPatch

__all__ = ["Architecture", "Layout", "VitPatch", "VitShape", "architecture_of", "register"]
