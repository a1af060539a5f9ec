"""The methods, one file each. They are imported when the first of them is asked for: ``import vlprune`` waits for none."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprune.methods.builtin import *  # noqa: F403


def __getattr__(name: str) -> Any:
    builtin = import_module("vlprune.methods.builtin")
    if name not in builtin.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(builtin, name)
