"""Model families, one file each. A family from outside: ``vlprune.integrations.register(Family(...))``."""

from vlprune.engine.family import Family, register
from vlprune.integrations import llava as llava

__all__ = ["Family", "register"]
