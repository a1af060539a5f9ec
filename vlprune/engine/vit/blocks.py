"""A block that merges rows between its attention and its MLP: a subclass of the block's own class."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.engine.vit.architecture import Layout
from vlprune.errors import VLPruneError
from vlprune.kernels import gather_rows, merge_rows

ORIGINAL = "_vlprune_original"
"""Attribute of a merging class: the class it was made of."""
STATE = "_vlprune_block"
"""Attribute of a merging block: its :class:`BlockState`."""
MASKS = ("attention_mask", "causal_attention_mask", "head_mask", "attn_mask")


class Run:
    """What happened to the rows in the forward under way, or the last one.

    Entry ``i`` of a list is what block ``i`` is given, and the entry behind it what it leaves. So a block that is run again,
    as activation checkpointing does, finds what it found before.

    ``rows``: how many, protected ones included. ``sizes (B, N)`` float32 and ``maps (B, N of the image)`` int64: how many rows
    of the image each row stands for, and which row stands for each; None as long as nothing was merged.
    """

    def __init__(self, method: BlockMethod, prefix: int, blocks: int):
        self.method, self.prefix, self.blocks = method, prefix, blocks
        self.rows: list[int] = []
        self.batch = 0
        self.sizes: list[Tensor | None] = [None] * (blocks + 1)
        self.maps: list[Tensor | None] = [None] * (blocks + 1)
        self.keys: list[Tensor | None] = [None] * blocks

    def begin(self, x: Tensor) -> None:
        self.batch, tokens = x.shape[0], x.shape[1] - self.prefix
        self.rows = [self.prefix + count for count in (tokens, *self.method.counts(tokens, self.blocks))]
        self.sizes[0] = self.maps[0] = None

    def idle(self, block: int) -> bool:
        """Whether the block has nothing to do with merged rows."""
        return self.sizes[block] is None and self.rows[block] == self.rows[block + 1]

    def hand_on(self, block: int) -> None:
        self.sizes[block + 1], self.maps[block + 1] = self.sizes[block], self.maps[block]

    def bias(self, block: int, x: Tensor) -> Tensor | None:
        """What is added to the logits ``(B, heads, N, N)`` of the block's attention."""
        sizes = self.sizes[block]
        return None if sizes is None or not self.method.proportional else key_bias(sizes, x.dtype)

    def merge(self, block: int, x: Tensor, keys: Tensor) -> Tensor:
        """The rows ``x (B, N, C)`` that are left."""
        leaving = self.rows[block] - self.rows[block + 1]
        if leaving == 0:
            self.hand_on(block)
            return x
        with torch.no_grad():
            sizes = self.sizes[block]
            if sizes is None:
                sizes = torch.ones(x.shape[:2], device=x.device)
            tokens = BlockTokens(keys.float(), x, sizes, self.prefix, leaving, block, self.blocks)
            assigned, before = self.method.reduce(tokens), self.maps[block]
            self.maps[block + 1] = assigned if before is None else assigned.gather(1, before)
        x, mass = merge_rows(x, assigned, sizes, self.rows[block + 1])
        self.sizes[block + 1] = mass.detach().float()
        return x

    def restore(self, x: Tensor) -> Tensor:
        """The rows behind the last block, each at the places that it stands for."""
        places = self.maps[self.blocks]
        return x if places is None else gather_rows([x], places)[0]


def key_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, N, N)``, the logarithms of ``sizes (B, N)`` for every query; takes the memory of ``(B, N)``."""
    return sizes.log().to(dtype)[:, None, None].expand(-1, 1, sizes.shape[1], -1)


class KeyTap:
    """A hook on the module that hands out a block's keys."""

    def __init__(self, run: Run, block: int):
        self.run, self.block = run, block

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.run.keys[self.block] = out


class BlockState:
    """What a merging block knows: its place, its layout, and the names of what its model passes to it."""

    def __init__(self, run: Run, index: int, layout: Layout, heads: int, block: nn.Module):
        self.run, self.index, self.layout, self.heads = run, index, layout, heads
        cls = original(type(block))
        self.names = tuple(inspect.signature(cls.forward).parameters)[2:]
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
        run.keys[index] = None
        return out
    x = x + state.layout.attend(block, x, run.bias(index, x), state.options(args, kwargs))
    keys, run.keys[index] = run.keys[index], None
    assert keys is not None
    keys = keys.transpose(1, 2) if keys.ndim == 4 else keys.unflatten(-1, (state.heads, -1))
    x = run.merge(index, x, keys.mean(2, dtype=torch.float32))
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
