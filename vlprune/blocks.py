"""The contract of methods that merge rows inside the blocks of a vision transformer, between attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlprune.method import Method
from vlprune.schedule import solved


@dataclass(frozen=True, eq=False)
class BlockTokens:
    """What a method sees of a batch of images between the attention and the MLP of one block.

    ``keys (B, N, d)`` float32: this block's keys, the mean over its heads. ``hidden (B, N, C)``: the rows, in the model's
    dtype. ``sizes (B, N)`` float32: how many of the image's rows each of them stands for. The first ``prefix`` rows ([CLS],
    registers) are protected: they stay alone, and keep their places. ``leaving``: how many of the other rows leave, at most
    half of them. ``block`` of ``blocks``, from 0.
    """

    keys: Tensor
    hidden: Tensor
    sizes: Tensor
    prefix: int
    leaving: int
    block: int
    blocks: int


@dataclass(kw_only=True)
class BlockMethod(Method):
    """A method for vision transformers on their own: no language model, no placeholders, the whole batch at once.

    The budget is the mean over the blocks of the rows behind each block's merge, protected ones not counted: those that its
    MLP computes. What leaves is put back behind the last block as a copy of the row that it was merged into, so outputs keep
    their shapes, and heads that average over rows weigh a merged row by its size.
    """

    serves: ClassVar[tuple[str, ...]] = ("vit",)
    proportional: bool = True
    """A row that stands for s rows gets the attention of s: log s is added to the logits of its key."""

    def counts(self, tokens: int, blocks: int) -> list[int]:
        """How many of an image's ``tokens`` rows (protected ones not counted) are left behind each block."""
        return solved(self.budget, tokens, blocks)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        """The assignment ``(B, N)`` int64: the output row of every row, in ``[0, N - tokens.leaving)``, each of them used.

        Protected rows keep their index.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reduce()")

    @property
    def stages(self) -> tuple[str, ...]:
        return ("reduce",)
