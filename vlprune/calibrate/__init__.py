"""Finds a method's settings for a model on the user's own data: ``vlprune calibrate``, and :func:`diffrate` behind it."""

from vlprune.calibrate.diffrate import diffrate

__all__ = ["diffrate"]
