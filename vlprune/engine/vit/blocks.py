"""A block that merges rows between its attention and its MLP: a subclass of the block's own class."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.vit.architecture import VitShape
from vlprune.engine.vit.layout import Layout
from vlprune.engine.vit.run import Heads, Run
from vlprune.errors import VLPruneError

ORIGINAL = "_vlprune_original"
"""Attribute of a merging class: the class it was made of."""
STATE = "_vlprune_block"
"""Attribute of a merging block: its :class:`BlockState`."""
ROTARY = ("rope", "position_embeddings")
MASKS = ("attention_mask", "causal_attention_mask", "head_mask", "attn_mask")


class Tap:
    """A hook on the module that hands out a block's keys, queries or values; ``third``: the last third of its output."""

    def __init__(self, run: Run, block: int, what: str, third: bool):
        self.run, self.block, self.what, self.third = run, block, what, third

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        getattr(self.run, self.what)[self.block] = out[..., -(out.shape[-1] // 3) :] if self.third else out


class BlockState:
    """What a merging block knows: its place, its layout, and the names of what its model passes to it.

    ``sequence_first``: its rows are ``(N, B, C)``. ``as_tuple``: it hands on a tuple.
    """

    def __init__(self, run: Run, index: int, layout: Layout, shape: VitShape, block: nn.Module):
        self.run, self.index, self.layout, self.heads = run, index, layout, shape.heads
        self.sequence_first, self.takes_padding = shape.sequence_first, shape.padding
        cls = original(type(block))
        self.names = tuple(inspect.signature(cls.forward).parameters)[2:]
        self.scaling = layout.scaling(block)
        self.as_tuple = False
        self.required: tuple[str, ...] = ()

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the block was given besides rows."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def valid(self, named: dict[str, Any]) -> Tensor | None:
        """Which of the image's rows are no padding, ``(B, N)``; None for all."""
        mask = next((named[name] for name in MASKS if named.get(name) is not None), None)
        if mask is None or not self.takes_padding:
            return None
        row = mask[:, 0, 0]
        return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2

    def options(self, named: dict[str, Any]) -> dict[str, Any]:
        """What the block's attention is given besides rows and mask."""
        if not self.takes_padding and any(named.get(name) is not None for name in MASKS):
            raise VLPruneError("an attention mask for patches was given, and merged rows cannot follow it; pass none")
        if named.get("is_causal") or any(named.get(name) is not None for name in ("k_x", "v_x")):
            raise VLPruneError("causal and cross attention are by the places of rows, which merged rows do not keep")
        if named.get("output_attentions"):
            raise VLPruneError("attention maps of merged rows cannot be given out: output_attentions=True is not allowed")
        options = {name: value for name, value in named.items() if name not in MASKS or name in self.required}
        rotary = self.layout.rotary
        if rotary is not None:
            options[rotary.argument] = self.run.tables(self.index, self.layout, named.get(rotary.argument))
        elif any(named.get(name) is not None for name in ROTARY):
            raise VLPruneError("rotary tables were given to a block whose attention was not expected to use any")
        return options

    def noted(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Is told what the block's attention computed, where no module hands it out."""
        run, index = self.run, self.index
        run.keys[index] = keys
        if self.run.method.reads:
            run.queries[index], run.values[index] = queries, values


def forward(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a merging block; until something is merged it is the block's own."""
    state: BlockState = getattr(block, STATE)
    run, index, named = state.run, state.index, state.named(args, kwargs)
    rows = x.transpose(0, 1) if state.sequence_first else x
    if index == 0:
        run.begin(rows, state.valid(named))
    if run.idle(index):
        run.hand_on(index)
        out = original(type(block)).forward(block, x, *args, **kwargs)
        run.forget(index)
        return out
    rows = _reduced(block, state, run.shortened(rows, index) if run.whole(index) else rows, named)
    if run.whole(index + 1):
        rows = run.restore(rows, index + 1)
    rows = rows.transpose(0, 1) if state.sequence_first else rows
    return (rows,) if state.as_tuple else rows


def _reduced(block: Any, state: BlockState, x: Tensor, named: dict[str, Any]) -> Tensor:
    """The rows ``x (B, N, C)`` through attention branch, merge and MLP branch."""
    run, index, layout = state.run, state.index, state.layout
    options = state.options(named)
    x = x + layout.attend(block, x, run.bias(index, x), options, state.noted)
    tables = None if layout.rotary is None else options[layout.rotary.argument]
    x = run.merge(index, x, Heads(layout, state.heads, state.scaling, block, tables))
    return x + layout.feed(block, x)


def install(block: nn.Module, state: BlockState) -> None:
    block.__class__ = merging(original(type(block)))
    block.__dict__[STATE] = state
    _follow_class(block)


def uninstall(block: nn.Module) -> None:
    block.__class__ = original(type(block))
    block.__dict__.pop(STATE, None)
    _follow_class(block)


def shadowed(block: nn.Module) -> bool:
    """Whether the block has a forward of its own that goes past its class's."""
    own = block.__dict__.get("forward")
    return own is not None and not _is_of_class(own, block) and not _is_of_class(block.__dict__.get("_old_forward"), block)


def _follow_class(block: nn.Module) -> None:
    """Methods of the class that were put into the block itself are those of its class now.

    transformers 4 leaves one there when hidden states were looked at; accelerate keeps one, which it calls from its own.
    """
    if _is_of_class(block.__dict__.get("forward"), block):
        del block.__dict__["forward"]
    if _is_of_class(block.__dict__.get("_old_forward"), block):
        block.__dict__["_old_forward"] = types.MethodType(type(block).forward, block)


def _is_of_class(method: Any, block: nn.Module) -> bool:
    """Whether it is the forward of the block's class, or of the one that merges."""
    cls = original(type(block))
    return getattr(method, "__func__", None) in (cls.forward, merging(cls).forward) and method.__self__ is block


def original(cls: type) -> Any:
    return getattr(cls, ORIGINAL, cls)


@functools.cache
def merging(cls: type) -> type:
    """The subclass of a block's class that merges. It bears the same name, since sharding policies go by names."""

    def merging_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Without a state when somebody has kept this method beyond the time that a method was applied.
        own = forward if STATE in self.__dict__ else cls.forward
        return own(self, hidden_states, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _remade, (cls,), self.__dict__

    # Pickle looks up methods by this name, and transformers 4 leaves bound ones in blocks.
    merging_forward.__name__ = "forward"
    body = {"forward": merging_forward, "__reduce_ex__": reduce_ex, "__module__": cls.__module__, ORIGINAL: cls}
    return type(cls.__name__, (cls,), body)


def _remade(cls: type) -> Any:
    return object.__new__(merging(cls))
