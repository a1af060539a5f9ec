"""Gathers the surviving rows of several tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlprune.kernels.dispatch import on_triton
from vlprune.kernels.gather_rows import reference


def gather_rows(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Rows of every tensor.

    Args:
        tensors: up to four of shape ``(B, L, ...)``, or ``(1, L, ...)`` where the samples share one; any dtype. Hidden
            states and rotary tables for example.
        rows: ``(B, n)`` int64 on the tensors' device. Negative ones are filler and yield row 0.

    Returns:
        For each tensor its ``rows``, ``(B, n, ...)``, contiguous. Gradients flow back to the tensors.
    """
    return torch.ops.vlprune.gather_rows(list(tensors), rows)


@torch.library.custom_op("vlprune::gather_rows", mutates_args=())
def _operator(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    if on_triton(rows):
        from vlprune.kernels.gather_rows import triton

        if triton.supports(tensors, rows):
            return triton.gather_rows(tensors, rows)
    return reference.gather_rows(tensors, rows)


@_operator.register_fake
def _(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [tensor.new_empty(*rows.shape, *tensor.shape[2:]) for tensor in tensors]


def _remember(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: list[Tensor]) -> None:
    tensors, rows = inputs
    ctx.shapes = [tensor.shape for tensor in tensors]
    ctx.save_for_backward(rows)


def _backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[list[Tensor], None]:
    (rows,) = ctx.saved_tensors
    return [reference.spread(g, rows, shape) for g, shape in zip(gradients, ctx.shapes, strict=True)], None


_operator.register_autograd(_backward, setup_context=_remember)
