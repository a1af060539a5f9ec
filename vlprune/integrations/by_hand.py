"""Attention of modules that do not take a mask for each row of a batch, or have no module that hands out keys.

Each function computes what its module computes; when a method is applied, that is checked bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Heads = tuple[Tensor, Tensor, Tensor, Tensor]
"""What the module gives ``(B, N, C)``, and its queries, keys and values ``(B, H, N, d)``."""


def multihead(module: Any, x: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Heads:
    """``torch.nn.MultiheadAttention`` of rows to themselves."""
    queries, keys, values = split(F.linear(x, module.in_proj_weight, module.in_proj_bias), module.num_heads)
    out = attended(queries, keys, values, bias, module.dropout if module.training else 0.0)
    return module.out_proj(out), queries, keys, values


def timm_fused(module: Any, x: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Heads:
    """``Attention`` of timm before 1.0.16, which takes no mask."""
    queries, keys, values = split(module.qkv(x), module.num_heads)
    queries, keys = module.q_norm(queries), module.k_norm(keys)
    out = attended(queries, keys, values, bias, module.attn_drop.p if module.training else 0.0)
    # A norm came in 1.0.12.
    out = getattr(module, "norm", torch.nn.Identity())(out)
    return module.proj_drop(module.proj(out)), queries, keys, values


def eva(module: Any, x: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Heads:
    """``EvaAttention`` of timm before it had norms of queries and keys. What is handed out is not turned."""
    heads = module.num_heads
    if module.qkv is not None:
        named = (module.q_bias, module.k_bias, module.v_bias)
        packed = F.linear(x, module.qkv.weight, None if module.q_bias is None else torch.cat(named))
        queries, keys, values = split(packed, heads)
    else:
        parts = (module.q_proj(x), module.k_proj(x), module.v_proj(x))
        queries, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    turned, tables = [queries, keys], options.get("rope")
    if tables is not None:
        front = getattr(module, "num_prefix_tokens", 1)
        turned = [torch.cat([x[:, :, :front], timm_rotate(x[:, :, front:], tables, module)], 2) for x in turned]
    rotated = (x.type_as(values) for x in turned)
    out = module.norm(attended(*rotated, values=values, bias=bias, dropout=module.attn_drop.p if module.training else 0.0))
    return module.proj_drop(module.proj(out)), queries, keys, values


def split(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(B, H, N, d)`` of what a packed projection gives, ``(B, N, 3 H d)``."""
    queries, keys, values = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return queries, keys, values


def attended(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """``(B, N, H d)``"""
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def timm_rotate(x: Tensor, tables: Tensor, attention: Any) -> Tensor:
    """``x (B, H, N, d)`` turned by sines and cosines side by side, ``(..., N, 2 d)``."""
    sines, cosines = tables.chunk(2, -1)
    if getattr(attention, "rotate_half", False):
        return x * cosines + crossed_halves(x) * sines
    return x * cosines + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sines


def halves_rotate(x: Tensor, tables: tuple[Tensor, Tensor], attention: Any) -> Tensor:
    """``x (B, H, N, d)`` turned in pairs across halves, by cosines and sines ``(..., N, d)``."""
    cosines, sines = tables
    return x * cosines + crossed_halves(x) * sines


def crossed_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
