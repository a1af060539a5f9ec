"""Merges rows into their weighted means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.kernels.dispatch import on_triton
from vlprune.kernels.merge_rows import reference


def merge_rows(values: Tensor, target: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The weighted mean of the rows of every segment.

    Args:
        values: ``(B, N, D)`` of any floating type, any strides.
        target: ``(B, N)`` int64, the segment of every row, in ``[-1, count)`` and in any order; rows of -1 take part in none.
        weight: ``(B, N)`` of any floating type, not negative; None for 1 each.
        count: segments of a sample.

    Returns:
        Means ``(B, count, D)`` in the type of the values, and masses ``(B, count)``: the sums of the weights, float32. Sums
        are accumulated in float32. (Masses and sums are float64 where the values are.) A segment of mass 0, one without
        members for example, has mean 0. NaN and infinities of a member stay within its segment, which they spoil even with a
        weight of 0. The kernel sums in an order that is always the same; the reference does so on a CPU.

        Gradients flow back to values and weights.
    """
    return torch.ops.vlprune.merge_rows(values, target, weight, count)


@torch.library.custom_op("vlprune::merge_rows", mutates_args=())
def _operator(values: Tensor, target: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    if on_triton(values):
        from vlprune.kernels.merge_rows import triton

        if triton.supports(values, target, count):
            return triton.merge_rows(values, target, weight, count)
    return reference.merge_rows(values, target, weight, count)


@_operator.register_fake
def _(values: Tensor, target: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    batch, _, width = values.shape
    exact = reference.accumulates_in(values)
    return values.new_empty(batch, count, width), values.new_empty(batch, count, dtype=exact)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: tuple[Tensor, Tensor]) -> None:
    values, target, weight, _ = inputs
    ctx.save_for_backward(values, target, weight, *output)


def _backward(ctx: Any, of_means: Tensor, of_mass: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    values, target, weight, means, mass = ctx.saved_tensors
    share = reference.shares(of_means, target, mass)
    of_values = of_weight = None
    if ctx.needs_input_grad[0]:
        of_values = reference.value_gradient(share, target, weight).to(values.dtype)
    if weight is not None and ctx.needs_input_grad[2]:
        of_weight = reference.weight_gradient(share, of_mass, values, target, means).to(weight.dtype)
    return of_values, None, of_weight, None


_operator.register_autograd(_backward, setup_context=_remember)
