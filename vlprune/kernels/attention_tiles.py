"""What the kernels about attention share: tiles of queries and keys, and their scores.

The tensor cores want widths that are powers of two. A head of another width is taken in two pieces, 80 as 64 and 16, where
that is less than the next power of two.
"""

# A type checker does not follow how Triton calls a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS

WIDEST = 256
"""Width of a head, at most."""
NARROWEST = 16
"""What ``tl.dot`` takes at least, in any direction."""


def supports(query: Tensor, key: Tensor) -> bool:
    return query.dtype in FLOATS and query.dtype == key.dtype and 0 < query.shape[-1] <= WIDEST


def pieces(width: int) -> tuple[int, int]:
    """Powers of two, the second possibly zero, that cover a head of ``width``."""
    whole = max(NARROWEST, triton.next_power_of_2(width))
    half = whole // 2
    rest = max(NARROWEST, triton.next_power_of_2(width - half))
    return (half, rest) if half >= NARROWEST and half + rest < whole else (whole, 0)


def dense(tensor: Tensor) -> Tensor:
    """``tensor`` with a dense last dimension, itself wherever it has one."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def alignment(*tensors: Tensor) -> int:
    """The largest of 16, 8, 4, 2 and 1 elements to whose multiples all rows of ``tensors`` are aligned, beyond their start.

    Triton finds it out by itself for strides that are multiples of 16, and would load heads of 72 element by element.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return next(size for size in (16, 8, 4, 2, 1) if all(stride % size == 0 for stride in strides))


def factors(scaling: float, softcap: float | None, unit: float = 1.0) -> tuple[float, float]:
    """What :func:`scores` takes, for scores in units of ``1 / unit``."""
    return (scaling * unit, 0.0) if softcap is None else (scaling / softcap, softcap * unit)


def bytes_of(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Booleans as bytes; ``instead``, which the kernel will not touch, of nothing."""
    if tensor is None:
        return instead
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Launches go to the device that is current, which need not be the tensors'."""
    return torch.cuda.device_of(tensor)


@triton.jit
def _piece(base, offset, present, WIDTH: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    column = FIRST + tl.arange(0, SIZE)
    at = base + offset[:, None] + column[None, :]
    mask = present[:, None]
    if FIRST + SIZE > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load(
    tensor,
    sample,
    head,
    row,
    present,
    stride_0,
    stride_1,
    stride_2,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Both pieces of each ``row`` of the ``head``, which may be one or one a row; zero where not ``present``."""
    base = tensor + tl.multiple_of(sample.to(tl.int64) * stride_0, ALIGN)
    head = tl.zeros((), tl.int64) + head  # the variable of a loop is a plain number in the interpreter
    offset = tl.multiple_of(head * stride_1 + row.to(tl.int64) * stride_2, ALIGN)
    first = _piece(base, offset, present, WIDTH, 0, SIZE)
    second = first
    if TAIL > 0:
        second = _piece(base, offset, present, WIDTH, SIZE, TAIL)
    return first, second


INTERPRETED = tl.constexpr(not isinstance(load, triton.JITFunction))
"""Whether Triton's interpreter runs the kernels, which multiplies the bits of bfloat16 as if they were integers."""


@triton.jit
def _product(left, right, sums):
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, tl.trans(right), sums, input_precision="ieee")


@triton.jit
def scores(left, left_tail, right, right_tail, factor, cap, TAIL: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores of the rows of ``left`` and of ``right``. See :func:`factors`."""
    product = _product(left, right, tl.zeros((left.shape[0], right.shape[0]), tl.float32))
    if TAIL > 0:
        product = _product(left_tail, right_tail, product)
    product *= factor
    if SOFTCAP:
        # The hyperbolic tangent; it is 1 where the exponential overflows.
        product = cap * (1.0 - 2.0 / (tl.exp(2.0 * product) + 1.0))
    return product
