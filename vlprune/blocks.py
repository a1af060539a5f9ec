"""The contract of methods that reduce rows inside the blocks of a vision transformer, between attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.kernels import attention_columns, attention_rows, merge_rows
from vlprune.method import Method
from vlprune.schedule import solved


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """The attention of one block, beside its kernel: of ``queries`` and ``keys (B, H, N, d)``, in the model's dtype.

    ``values (B, H, N, d)``: None unless the method reads them. ``weights (B, N)`` float32: what is added to the logits of each
    key, None for nothing; rows that are padding have minus infinity. ``scaling`` of the logits. No gradients flow back.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    scaling: float

    def weighed(self) -> tuple[Tensor, Tensor]:
        """Queries and keys with one feature more, by which a key's weight comes into the product."""
        if self.weights is None:
            return self.queries, self.keys
        # Minus infinity times zero is no number in the padding of a kernel; this is as far down, and finite.
        weights = (self.weights.clamp(min=-1e4) / self.scaling)[:, None, :, None].expand(-1, self.keys.shape[1], -1, -1)
        queries, keys = self.queries.float(), self.keys.float()
        return torch.cat([queries, torch.ones_like(queries[..., :1])], -1), torch.cat([keys, weights], -1)

    def rows(self, rows: Tensor, reduce_heads: bool = True) -> Tensor:
        """Attention that ``rows (B, R)`` pay: float32 ``(B, R, N)``, the mean over the heads, or ``(B, H, R, N)``."""
        return attention_rows(*self.weighed(), rows, scaling=self.scaling, reduce_heads=reduce_heads)

    def of_cls(self) -> Tensor:
        """Attention ``(B, N)`` that row 0 pays to each row, the mean over the heads; float32."""
        return self.rows(self.queries.new_zeros(self.queries.shape[0], 1, dtype=torch.int64))[:, 0]

    def received(self, weights: Tensor) -> Tensor:
        """Attention ``(B, H, N)`` that each row receives, summed over queries by their ``weights (B, N)``; float32."""
        return attention_columns(*self.weighed(), weights, scaling=self.scaling)


@dataclass(frozen=True, eq=False)
class BlockTokens:
    """What a method sees of a batch of images between the attention and the MLP of one block.

    ``keys (B, N, d)`` float32: this block's keys, the mean over its heads. ``hidden (B, N, C)``: the rows, in the model's
    dtype. ``sizes (B, N)`` float32: how many of the image's rows each of them stands for; 0 for padding, which an adaptive
    method leaves behind where images of a batch keep different numbers. The first ``prefix`` rows ([CLS], registers) are
    protected: they stay alone, and keep their places. ``leaving``: how many of the other rows leave. ``block`` of ``blocks``,
    from 0. ``attention``: of this block, for methods that read queries. ``planned``: what :meth:`BlockMethod.counts` says for
    this block, which in a batch of an adaptive method may be more than there are rows.
    """

    keys: Tensor
    hidden: Tensor
    sizes: Tensor
    prefix: int
    leaving: int
    block: int
    blocks: int
    attention: BlockAttention | None = None
    planned: int = 0

    @property
    def read(self) -> BlockAttention:
        """The block's attention, for methods whose ``reads`` asks for it."""
        assert self.attention is not None
        return self.attention

    @property
    def count(self) -> int:
        """Rows that are to be left, protected ones included."""
        return self.hidden.shape[1] - self.leaving


@dataclass(kw_only=True)
class BlockMethod(Method):
    """A method for vision transformers on their own: no language model, no placeholders, the whole batch at once.

    The budget is the mean over the blocks of the rows behind each block's reduction, protected ones not counted: those that
    its MLP computes. What leaves is put back behind the last block: a copy of the row that it was merged into, or, for what
    was dropped, the mean of the rows that are left. So outputs keep their shapes, heads that average over rows weigh a merged
    row by its size, and average what is left. An adaptive method's budget is an upper bound.
    """

    serves: ClassVar[tuple[str, ...]] = ("vit",)
    reads: ClassVar[tuple[str, ...]] = ()
    """What it wants of the block's attention besides keys: ``"queries"``, ``"values"``."""
    needs_cls: ClassVar[bool] = False
    """Whether the first row has to be [CLS]."""
    softens: ClassVar[bool] = False
    """Whether no row leaves, and each block asks :meth:`soften` instead of :meth:`reduce`: what training is made of."""
    proportional: bool = True
    """A row that stands for s rows gets the attention of s: log s is added to the logits of its key."""

    def counts(self, tokens: int, blocks: int) -> list[int]:
        """How many of an image's ``tokens`` rows (protected ones not counted) are left behind each block."""
        return solved(self.budget, tokens, blocks)

    def acts(self, block: int, blocks: int) -> bool:
        """Whether an adaptive method is asked about this block though by the counts nothing leaves in it."""
        return self.adaptive

    def reduce(self, tokens: BlockTokens) -> Tensor:
        """The assignment ``(B, N)`` int64: the output row of every row, in ``[0, tokens.count)``; -1 for one that is dropped.

        Protected rows keep their index. Every output row is used, but for the padding that an adaptive method leaves at an
        image's end.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reduce()")

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` output rows ``(B, count, C)`` and their sizes: unless overridden means by size, and sums."""
        return merge_rows(tokens.hidden, assigned, tokens.sizes, count)

    def soften(self, tokens: BlockTokens) -> tuple[Tensor, Tensor | None]:
        """The rows ``(B, N, C)`` that go on, and their sizes ``(B, N)`` for the blocks behind; None: each counts as one.

        Unlike :meth:`reduce` it runs with gradients, which flow back through rows and sizes. Sizes are above zero.
        """
        raise NotImplementedError(f"{type(self).__name__} has no soften()")

    @property
    def drops(self) -> bool:
        """Whether rows leave without being merged."""
        return False

    @property
    def stages(self) -> tuple[str, ...]:
        return ("reduce",)
