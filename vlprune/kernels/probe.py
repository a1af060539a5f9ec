"""The smallest kernel there is: where it runs, the others do."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_one(values):
    tl.store(values, tl.load(values) + 1)


def add_one(values: Tensor) -> Tensor:
    """Adds one to the first of ``values``, in place."""
    with torch.cuda.device_of(values):
        _add_one[(1,)](values)
    return values
