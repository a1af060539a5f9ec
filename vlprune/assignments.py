"""What an assignment does to rows: those that go together become one, and come back as copies of it.

An assignment says of every row which output row stands for it. Methods for vision transformers answer with one
(:class:`vlprune.blocks.BlockMethod`); :func:`vlprune.assignment` gives that of a forward. Kernels are imported when they are
needed, since ``import vlprune`` is to be cheap.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(
    features: Tensor, assignment: Tensor, sizes: Tensor | None = None, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """The rows that are left: of those that go together the mean, weighted by size.

    Args:
        features: ``(B, N, C)`` of any floating type.
        assignment: ``(B, N)`` int64, the output row of every row; -1 for one that is dropped.
        sizes: ``(B, N)``, how many rows of the image each of them stands for; 1 each by default.
        count: how many output rows there are; by default one more than the highest in ``assignment``, which costs a wait for
            the device.

    Returns:
        Rows ``(B, count, C)`` in the type of the features, and their sizes ``(B, count)``: sums, in float32 (float64 where the
        features are). An output row without members is zero, and of size 0. Gradients flow back to features and sizes.
    """
    from vlprune.kernels import merge_rows

    return merge_rows(features, assignment, sizes, int(assignment.max()) + 1 if count is None else count)


def unmerge(features: Tensor, assignment: Tensor, fill: Tensor | None = None) -> Tensor:
    """Dense features ``(B, N, C)``: each row a copy of the one that stands for it. The way back from :func:`merge`.

    Args:
        features: ``(B, M, C)``, the rows that are left.
        assignment: ``(B, N)`` int64, which of them stands for each row; -1 for one that was dropped.
        fill: ``(B, C)``, what dropped rows become; zeros by default.
    """
    from vlprune.kernels import gather_rows

    batch, rows, width = features.shape
    last = features.new_zeros(batch, 1, width) if fill is None else fill[:, None].to(features.dtype)
    places = torch.where(assignment < 0, rows, assignment)
    return gather_rows([torch.cat([features, last], 1)], places)[0]
