"""What a method may ask to be measured. A signal that no method asks for costs nothing.

Signals are measured beside the model's own attention: whichever kernel the model runs, it goes on running it.
Layer numbers count the vision encoder's blocks from 0; negative numbers count from the end, so -2 is the block whose
output LLaVA feeds to its projector.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signal:
    """A statistic of vision block ``layer``, always float32 and without gradient."""

    layer: int


@dataclass(frozen=True)
class ClsAttention(Signal):
    """Softmax attention that [CLS] pays to each patch: ``(tiles, heads, patches)``.

    The softmax runs over all keys, [CLS] included, so a row adds up to less than 1.
    """


@dataclass(frozen=True)
class Keys(Signal):
    """Attention keys of the patches: ``(tiles, heads, patches, head_dim)``."""


@dataclass(frozen=True)
class Hidden(Signal):
    """Hidden states of the patches after the block: ``(tiles, patches, hidden)``."""
