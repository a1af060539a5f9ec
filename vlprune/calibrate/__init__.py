"""Finds a method's settings for a model on the user's own data: ``vlprune calibrate``, and what is behind it."""

from vlprune.calibrate.diffrate import diffrate
from vlprune.calibrate.search import knobs
from vlprune.calibrate.yopo import yopo

__all__ = ["diffrate", "knobs", "yopo"]
