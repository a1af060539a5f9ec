"""The best partner of every row, without the matrix of similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.kernels.bipartite_match import reference
from vlprune.kernels.dispatch import on_triton


def bipartite_match(
    source: Tensor, target: Tensor, normalise: bool = True, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For every source the most similar target.

    Args:
        source: ``(B, S, D)``, half precision or float32; any strides. Even tokens for example.
        target: ``(B, T, D)`` of the same dtype; any strides. Odd tokens for example.
        normalise: the similarity is the cosine, in [-1, 1] up to rounding; otherwise the dot product. A row of zeros has the
            cosine 0 to everything.
        valid: ``(B, T)`` bool, the targets that exist, where samples have different numbers of them. All do by default.

    Returns:
        ``similarity (B, S)`` float32 (float64 for float64) and ``index (B, S)`` int64 of the best target.

        The lowest index wins among equal similarities. NaN counts as -inf. A source without a similarity above -inf, for
        want of valid targets for example, has similarity -inf and index 0.

    Products of half precision are added up in float32. Gradients flow back through the similarity to the sources and to the
    targets that were chosen; none from the cosine of a row of zeros. Extra memory: linear in S and T.
    """
    return torch.ops.vlprune.bipartite_match(source, target, normalise, valid)


@torch.library.custom_op("vlprune::bipartite_match", mutates_args=())
def _operator(source: Tensor, target: Tensor, normalise: bool, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if on_triton(source):
        from vlprune.kernels.bipartite_match import triton

        if triton.supports(source, target):
            return triton.bipartite_match(source, target, normalise, valid)
    return reference.bipartite_match(source, target, normalise, valid)


@_operator.register_fake
def _(source: Tensor, target: Tensor, normalise: bool, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = source.shape[:2]
    return source.new_empty(shape, dtype=reference.wide(source.dtype)), source.new_empty(shape, dtype=torch.int64)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, bool, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    source, target, ctx.normalise, _ = inputs
    ctx.save_for_backward(source, target, *output)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
    source, target, similarity, index = ctx.saved_tensors
    return *reference.gradients(gradient, source, target, similarity, index, ctx.normalise), None, None


_operator.register_autograd(_backward, setup_context=_remember)
