"""A block that merges rows between its attention and its MLP: a subclass of the block's own class."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.blocks import BlockAttention, BlockMethod, BlockTokens
from vlprune.engine.vit.architecture import Layout
from vlprune.errors import VLPruneError
from vlprune.kernels import gather_rows

ORIGINAL = "_vlprune_original"
"""Attribute of a merging class: the class it was made of."""
STATE = "_vlprune_block"
"""Attribute of a merging block: its :class:`BlockState`."""
MASKS = ("attention_mask", "causal_attention_mask", "head_mask", "attn_mask")


class Run:
    """What happened to the rows in the forward under way, or the last one.

    Entry ``i`` of a list is what block ``i`` is given, and the entry behind it what it leaves. So a block that is run again,
    as activation checkpointing does, finds what it found before.

    ``rows``: how many, protected ones included; of an adaptive method those of the image that keeps most, and ``planned`` what
    they are at most. ``sizes (B, N)`` float32 and ``maps (B, N of the image)`` int64: how many rows of the image each row
    stands for, and which row stands for each, -1 for none; None as long as nothing was merged.
    """

    def __init__(self, method: BlockMethod, prefix: int, blocks: int):
        self.method, self.prefix, self.blocks = method, prefix, blocks
        self.rows: list[int] = []
        self.planned: list[int] = []
        self.batch = 0
        self.sizes: list[Tensor | None] = [None] * (blocks + 1)
        self.maps: list[Tensor | None] = [None] * (blocks + 1)
        self.keys: list[Tensor | None] = [None] * blocks
        self.queries: list[Tensor | None] = [None] * blocks
        self.values: list[Tensor | None] = [None] * blocks

    def begin(self, x: Tensor) -> None:
        self.batch, tokens = x.shape[0], x.shape[1] - self.prefix
        self.planned = [self.prefix + count for count in (tokens, *self.method.counts(tokens, self.blocks))]
        self.rows = list(self.planned)
        self.sizes[0] = self.maps[0] = None

    def idle(self, block: int) -> bool:
        """Whether the block has nothing to do with merged rows."""
        return self.sizes[block] is None and self.rows[block] == self.rows[block + 1]

    def hand_on(self, block: int) -> None:
        self.sizes[block + 1], self.maps[block + 1] = self.sizes[block], self.maps[block]

    def bias(self, block: int, x: Tensor) -> Tensor | None:
        """What is added to the logits ``(B, heads, N, N)`` of the block's attention."""
        weights = self.weights(block)
        return None if weights is None else key_bias(weights, x.dtype)

    def weights(self, block: int) -> Tensor | None:
        """What is added to the logits of each of the block's keys, ``(B, N)`` float32; minus infinity for padding."""
        sizes = self.sizes[block]
        if sizes is None or not (self.method.proportional or self.method.adaptive):
            return None
        return sizes.log() if self.method.proportional else torch.where(sizes > 0, 0.0, -torch.inf)

    def merge(self, block: int, x: Tensor, heads: int, scaling: float | None) -> Tensor:
        """The rows ``x (B, N, C)`` that are left."""
        leaving = self.rows[block] - min(self.rows[block], self.planned[block + 1])
        if leaving == 0 and not self.method.adaptive:
            self.forget(block)
            self.hand_on(block)
            return x
        tokens = self.tokens(block, x, leaving, heads, scaling)
        self.forget(block)
        with torch.no_grad():
            assigned, before = self.method.reduce(tokens), self.maps[block]
            self.maps[block + 1] = assigned if before is None else _composed(before, assigned)
            if self.method.adaptive:
                self.note(block + 1, int(assigned.max()) + 1)
        x, mass = self.method.merge(tokens, assigned, self.rows[block + 1])
        self.sizes[block + 1] = mass.detach().float()
        return x

    def note(self, entry: int, rows: int) -> None:
        """That ``rows`` are left of all images of the batch, fewer than planned perhaps."""
        self.rows[entry:] = [min(rows, planned) for planned in self.planned[entry:]]

    def tokens(self, block: int, x: Tensor, leaving: int, heads: int, scaling: float | None) -> BlockTokens:
        """What the method sees."""
        sizes = self.sizes[block]
        if sizes is None:
            sizes = torch.ones(x.shape[:2], device=x.device)
        keys = self._read("keys", block, heads)
        assert keys is not None
        attention = None
        if "queries" in self.method.reads:
            queries = self._read("queries", block, heads)
            assert queries is not None
            scale = keys.shape[-1] ** -0.5 if scaling is None else scaling
            attention = BlockAttention(queries, keys, self._read("values", block, heads), self.weights(block), scale)
        return BlockTokens(keys.mean(1, dtype=torch.float32), x, sizes, self.prefix, leaving, block, self.blocks, attention)

    def _read(self, what: str, block: int, heads: int) -> Tensor | None:
        """Queries, keys or values ``(B, H, N, d)`` that a tap has noted, without gradients."""
        out = getattr(self, what)[block]
        if out is None or out.ndim == 4:
            return None if out is None else out.detach()
        return out.detach().unflatten(-1, (heads, -1)).transpose(1, 2)

    def forget(self, block: int) -> None:
        self.keys[block] = self.queries[block] = self.values[block] = None

    def restore(self, x: Tensor) -> Tensor:
        """The rows behind the last block, each at the places that it stands for; their mean where none does."""
        places = self.maps[self.blocks]
        if places is None:
            return x
        if self.method.drops:
            sizes = self.sizes[self.blocks]
            assert sizes is not None
            weights = sizes[:, self.prefix :, None] / sizes[:, self.prefix :, None].sum(1, keepdim=True)
            mean = (x[:, self.prefix :] * weights).sum(1, keepdim=True).to(x.dtype)
            x, places = torch.cat([x, mean], 1), torch.where(places < 0, x.shape[1], places)
        return gather_rows([x], places)[0]


def _composed(before: Tensor, assigned: Tensor) -> Tensor:
    """The assignment ``before (B, N)`` followed by ``assigned (B, M)``; what left before stays away."""
    return torch.where(before < 0, -1, assigned.gather(1, before.clamp(min=0)))


def key_bias(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, N, N)``, the ``weights (B, N)`` of keys for every query; takes the memory of ``(B, N)``."""
    return weights.to(dtype)[:, None, None].expand(-1, 1, weights.shape[1], -1)


class Tap:
    """A hook on the module that hands out a block's keys, queries or values; ``third``: the last third of its output."""

    def __init__(self, run: Run, block: int, what: str, third: bool):
        self.run, self.block, self.what, self.third = run, block, what, third

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        getattr(self.run, self.what)[self.block] = out[..., -(out.shape[-1] // 3) :] if self.third else out


class BlockState:
    """What a merging block knows: its place, its layout, and the names of what its model passes to it."""

    def __init__(self, run: Run, index: int, layout: Layout, heads: int, block: nn.Module):
        self.run, self.index, self.layout, self.heads = run, index, layout, heads
        cls = original(type(block))
        self.names = tuple(inspect.signature(cls.forward).parameters)[2:]
        self.scaling = layout.scaling(block)
        self.as_tuple = False
        self.required: tuple[str, ...] = ()

    def options(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the block's attention is given besides rows and mask."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if any(named.get(name) is not None for name in MASKS):
            raise VLPruneError("an attention mask for patches was given, and merged rows cannot follow it; pass none")
        if named.get("is_causal") or named.get("rope") is not None:
            raise VLPruneError(
                "causal attention and rotary positions are by the places of rows, which merged rows do not keep"
            )
        if named.get("output_attentions"):
            raise VLPruneError("attention maps of merged rows cannot be given out: output_attentions=True is not allowed")
        return {name: value for name, value in named.items() if name not in MASKS or name in self.required}


def forward(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a merging block; until something is merged it is the block's own."""
    state: BlockState = getattr(block, STATE)
    run, index = state.run, state.index
    if index == 0:
        run.begin(x)
    if run.idle(index):
        run.hand_on(index)
        out = original(type(block)).forward(block, x, *args, **kwargs)
        run.forget(index)
        return out
    x = x + state.layout.attend(block, x, run.bias(index, x), state.options(args, kwargs))
    x = run.merge(index, x, state.heads, state.scaling)
    x = x + state.layout.feed(block, x)
    if index + 1 == run.blocks:
        x = run.restore(x)
    return (x,) if state.as_tuple else x


def original(cls: type) -> Any:
    return getattr(cls, ORIGINAL, cls)


@functools.cache
def merging(cls: type) -> type:
    """The subclass of a block's class that merges. It bears the same name, since sharding policies go by names."""

    def merging_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _remade, (cls,), self.__dict__

    body = {"forward": merging_forward, "__reduce_ex__": reduce_ex, "__module__": cls.__module__, ORIGINAL: cls}
    return type(cls.__name__, (cls,), body)


def _remade(cls: type) -> Any:
    return object.__new__(merging(cls))
