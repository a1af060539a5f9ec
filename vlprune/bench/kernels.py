"""``vlprune bench kernels``: the operations of :mod:`vlprune.kernels` beside their references and what the machine can do.

To add one, write a function that makes its :class:`Work` for a :class:`Shape`, and put it into :data:`CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT = 64
"""Tokens of text in a prompt."""
WINDOW = 32
"""Text tokens that look at the image, as SnapKV has them look."""


@dataclass(frozen=True)
class Shape:
    """A prompt in an LLM: ``tokens`` are visual, of which ``keep`` stay."""

    name: str
    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    head: int = 128
    batch: int = 1
    share: float = 1 / 9

    @property
    def keep(self) -> int:
        return max(1, round(self.share * self.tokens))

    @property
    def prompt(self) -> int:
        return self.tokens + TEXT


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5", 576, 4096, 32, 32, 32),
        Shape("llava-next", 2880, 4096, 32, 32, 32),
        Shape("llava-next-x8", 2880, 4096, 32, 32, 32, batch=8),
        Shape("qwen2.5-vl-4k", 4096, 3584, 28, 4, 28),
        Shape("qwen2.5-vl-16k", 16384, 3584, 28, 4, 28),
        Shape("tiny", 64, 64, 4, 2, 2, head=16),
    )
}
"""LLaVA-NeXT keeps 320 of 2880 visual tokens here, the others as large a share."""
ON_GPU = ("llava-next", "llava-1.5", "llava-next-x8", "qwen2.5-vl-4k", "qwen2.5-vl-16k")
ON_CPU = ("llava-1.5", "llava-next")


@dataclass(frozen=True)
class Work:
    """One operation on one set of arguments.

    ``run``: the operation as vlprune calls it. ``plain``: its reference as a function that ``torch.compile`` can take, None
    where that makes no sense (hundreds of rounds would become as many copies of one round). ``bytes`` that have to be read
    and written at least, ``flops`` that have to be done. ``beside``: what else it is compared with, once a call.
    """

    run: Callable[[], Any]
    plain: Callable[[], Any] | None
    bytes: int
    flops: int = 0
    beside: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """``limit``: which ceiling of the machine the operation is up against. ``beside``: what :attr:`Work.beside` is."""

    name: str
    make: Callable[[Shape, torch.device, torch.dtype], Work]
    limit: Literal["bytes", "flops"]
    beside: str = ""


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def noise(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def survivors(shape: Shape, device: torch.device, heads: int = 1) -> Tensor:
    """Rows ``(batch * heads, n)`` of a prompt that stay: a random choice of visual tokens, and all of the text."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(shape.batch * heads):
        visual = torch.randperm(shape.tokens, generator=generator)[: shape.keep].sort().values
        rows.append(torch.cat([visual, torch.arange(shape.tokens, shape.prompt)]))
    return torch.stack(rows).to(device)


def _attention_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    query = noise(shape.batch, shape.heads, shape.prompt, shape.head, device=device, dtype=dtype)
    return query, noise(shape.batch, shape.kv_heads, shape.prompt, shape.head, device=device, dtype=dtype)


# ------------------------------------------------------------------ the operations


def _gather_rows(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """Hidden states and both rotary tables, as they enter the first layer that sees fewer rows."""
    from vlprune.kernels import gather_rows
    from vlprune.kernels.gather_rows import reference

    rows = survivors(shape, device)
    hidden = noise(shape.batch, shape.prompt, shape.hidden, device=device, dtype=dtype)
    tables = [noise(1, shape.prompt, shape.head, device=device, dtype=dtype) for _ in range(2)]
    out = rows.numel() * (shape.hidden + 2 * shape.head) * hidden.element_size()
    tensors = [hidden, *tables]
    return Work(lambda: gather_rows(tensors, rows), lambda: reference.gather_rows(tensors, rows), 2 * out + size(rows))


def _compact_cache(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """Keys and values of all layers, each head with survivors of its own."""
    from vlprune.kernels import compact_cache
    from vlprune.kernels.compact_cache import reference

    store = (shape.batch, shape.kv_heads, shape.prompt, shape.head)
    stores = [noise(*store, device=device, dtype=dtype) for _ in range(2 * shape.layers)]
    rows = survivors(shape, device, shape.kv_heads).view(shape.batch, shape.kv_heads, -1)
    out = len(stores) * rows.numel() * shape.head * stores[0].element_size()
    return Work(lambda: compact_cache(stores, rows), lambda: reference.compact_cache(stores, rows), 2 * out + size(rows))


def _attention_rows(queries: int) -> Callable[[Shape, torch.device, torch.dtype], Work]:
    def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
        """The last tokens of the prompt against all of it."""
        from vlprune.kernels import attention_rows
        from vlprune.kernels.attention_rows import reference

        query, key = _attention_inputs(shape, device, dtype)
        rows = torch.arange(shape.prompt - queries, shape.prompt, device=device).expand(shape.batch, -1)
        mean, scaling = queries == 1, shape.head**-0.5
        pairs = shape.batch * shape.heads * queries * shape.prompt
        out = 4 * (pairs // shape.heads if mean else pairs)
        return Work(
            lambda: attention_rows(query, key, rows, causal_shift=0, reduce_heads=mean),
            lambda: reference.attention_rows(query, key, rows, scaling, 0, None, None, None, mean),
            size(key) + size(query) * queries // shape.prompt + out,
            2 * pairs * shape.head,
        )

    return make


def _attention_columns(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """What every key receives from all queries of a causal layer, next to the kernel of that layer."""
    from vlprune.kernels import attention_columns
    from vlprune.kernels.attention_columns import reference

    query, key = _attention_inputs(shape, device, dtype)
    weights = torch.full((shape.batch, shape.prompt), 1 / shape.prompt, device=device)
    scaling, grouped = shape.head**-0.5, shape.heads != shape.kv_heads
    pairs = shape.batch * shape.heads * shape.prompt * (shape.prompt + 1) // 2
    return Work(
        lambda: attention_columns(query, key, weights, causal_shift=0),
        lambda: reference.attention_columns(query, key, weights, scaling, 0, None, None, None),
        size(query, key) + 4 * shape.batch * shape.heads * shape.prompt,
        # The scores are needed twice: for each query's sum, and for the columns.
        4 * pairs * shape.head,
        lambda: F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=grouped),
    )


def _bipartite_match(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """Even tokens against odd ones, as ToMe has it."""
    from vlprune.kernels.bipartite_match import bipartite_match, reference

    tokens = noise(shape.batch, shape.tokens, shape.hidden, device=device, dtype=dtype)
    source, target = tokens[:, ::2], tokens[:, 1::2]
    flops = 2 * shape.batch * source.shape[1] * target.shape[1] * shape.hidden
    return Work(
        lambda: bipartite_match(source, target),
        lambda: reference.bipartite_match(source, target, True, None),
        size(tokens),
        flops,
    )


def _merge_rows(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """Every visual token into one of those that stay, as pooling and ToMe have it."""
    from vlprune.kernels import merge_rows
    from vlprune.kernels.merge_rows import reference

    values = noise(shape.batch, shape.tokens, shape.hidden, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, shape.keep, (shape.batch, shape.tokens), generator=generator).to(device)
    weight = torch.ones(shape.batch, shape.tokens, device=device)
    out = shape.batch * shape.keep * (shape.hidden * values.element_size() + 4)
    return Work(
        lambda: merge_rows(values, target, weight, shape.keep),
        lambda: reference.merge_rows(values, target, weight, shape.keep),
        size(values, target, weight) + out,
    )


def _farthest_points(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """As DivPrune chooses."""
    from vlprune.kernels.farthest_points import farthest_points

    features = noise(shape.batch, shape.tokens, shape.hidden, device=device, dtype=dtype)
    count, points = shape.keep, shape.tokens
    flops = 2 * shape.batch * points**2 * shape.hidden
    return Work(lambda: farthest_points(features, count), None, size(features) + 4 * shape.batch * count * points, flops)


def _dpp_map(shape: Shape, device: torch.device, dtype: torch.dtype) -> Work:
    """As CDPruner chooses, from a matrix that is there; in float32."""
    from vlprune.kernels.dpp_map import dpp_map

    features = F.normalize(noise(shape.batch, shape.tokens, 256, device=device, dtype=torch.float32), dim=-1)
    kernel = features @ features.mT + torch.eye(shape.tokens, device=device)
    count, points = shape.keep, shape.batch * shape.tokens
    # Round t reads t factors and one row of the kernel.
    values = points * (math.comb(count, 2) + count)
    return Work(lambda: dpp_map(kernel, count), None, 4 * values, 2 * values)


CASES = {
    case.name: case
    for case in (
        Case("gather_rows", _gather_rows, "bytes"),
        Case("compact_cache", _compact_cache, "bytes"),
        Case("attention_rows 1", _attention_rows(1), "bytes"),
        Case(f"attention_rows {WINDOW}", _attention_rows(WINDOW), "bytes"),
        Case("attention_columns", _attention_columns, "flops", beside="SDPA of that layer"),
        Case("bipartite_match", _bipartite_match, "flops"),
        Case("merge_rows", _merge_rows, "bytes"),
        Case("farthest_points", _farthest_points, "flops"),
        Case("dpp_map", _dpp_map, "bytes"),
    )
}
"""A new operation joins here. Its number of queries may stand behind its name."""
