"""Attention kernels that a test can have without their hardware."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH = "flash_stand_in"
"""A name with "flash" in it: that is how transformers tells flash attention from others."""


def flash_stand_in(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' flash attention takes: no mask or ``(B, keys)``, causal from the lower right, packed sequences told
    from position ids that start anew, or from lengths that add up."""
    batch, heads, queries, _ = query.shape
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
        # Keys of a static cache that hold nothing yet.
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    keys = key.shape[2]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen &= row >= column
    if sliding_window is not None:
        seen &= row - column < sliding_window
    if attention_mask is not None:
        assert attention_mask.shape == (batch, keys), "flash attention wants a mask of samples and keys"
        seen &= attention_mask.bool()[:, None, None]
    elif cu_seq_lens_q is not None:
        part = torch.bucketize(torch.arange(queries), cu_seq_lens_q[1:-1].long(), right=True)
        seen &= part[:, None] == part
    else:
        assert position_ids is None or not _is_packed_sequence(position_ids, batch), "positions taken for several sequences"
    seen |= row == column
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scaling).transpose(1, 2).contiguous(), None


@contextmanager
def registered() -> Iterator[str]:
    """The stand-in among transformers' kernels; afterwards they are as they were."""
    tables = [ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping]
    before = [dict(table) for table in tables]
    tables[0][FLASH] = flash_stand_in
    tables[1][FLASH] = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    try:
        yield FLASH
    finally:
        for table in tables:
            table.pop(FLASH)
        assert [dict(table) for table in tables] == before


@contextmanager
def uncompiled() -> Iterator[str]:
    """Flex attention as it is written, since compiling it for the CPU takes long and does not work for every mask."""
    with torch.compiler.set_stance("force_eager"):
        yield "flex_attention"


def switch(model: Any, name: str) -> Any:
    """Makes all of a model run the kernel of this name."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = name
    return model
