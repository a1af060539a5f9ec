"""What describes a block: its two residual branches, and how its attention takes weights and rotary tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.kernels import merge_rows

COMPANIONS = {
    "k_proj": {"queries": ("q_proj",), "values": ("v_proj",)},
    "key": {"queries": ("query",), "values": ("value",)},
    "ln_k": {"queries": ("ln_q",)},
    "k_norm": {"queries": ("q_norm",), "values": ("v_proj", "qkv")},
}
"""By the last name of the module that hands out keys: those beside it for queries and values."""

ByHand = Callable[[Any, Tensor, Tensor | None, dict[str, Any]], tuple[Tensor, Tensor, Tensor, Tensor]]
"""``(attention module, rows, bias, options)`` to what the module gives, and its queries, keys and values ``(B, H, N, d)``."""


@dataclass(frozen=True)
class Rotary:
    """How a block is told the rotary tables of its rows.

    ``argument`` of the block; it holds one tensor or several, each of shape ``(rows, width)`` or ``(heads, rows, width)`` and
    without protected rows; a batch's have four dimensions. ``rotate(x (B, H, N, d), argument, attention)``
    turns rows without protected ones as the module does. ``example(angles (rows, d / 2))`` is such an argument, to try a
    block with.
    """

    argument: str
    rotate: Callable[[Tensor, Any, Any], Tensor]
    example: Callable[[Tensor], Any]

    def merged(self, tables: Any, places: Tensor, rows: int) -> Any:
        """The tables of ``rows`` merged rows, each ``(B, 1 or heads, rows, width)``: means over what is merged.

        ``places (B, N)``: the merged row of every row of the image, protected ones not counted, -1 for none.
        """
        if not isinstance(tables, Tensor):
            return tuple(self.merged(table, places, rows) for table in tables)
        tables = tables[(None,) * (4 - tables.ndim)].transpose(1, 2)
        flat = tables.flatten(2).expand(len(places), -1, -1)
        return merge_rows(flat, places, None, rows)[0].unflatten(-1, tables.shape[2:]).transpose(1, 2)

    def turned(self, x: Tensor, tables: Any, prefix: int, attention: Any) -> Tensor:
        """``x (B, H, N, d)`` with all but the first ``prefix`` rows turned."""
        return torch.cat([x[:, :, :prefix], self.rotate(x[:, :, prefix:], tables, attention).type_as(x)], 2)

    def per_head(self, tables: Any) -> bool:
        """Whether heads are turned differently."""
        first = tables if isinstance(tables, Tensor) else tables[0]
        return first.ndim > 2 and first.shape[-3] > 1


@dataclass(frozen=True)
class Layout:
    """The two residual branches of a block, as the names of its submodules in the order in which they are called.

    ``x + after(attention(norm(x)))``, then ``x + mlp(x)``; a parameter among them scales. ``mask`` is the name of the
    attention's argument for what is added to its logits, ``key`` the module whose output are its keys, ``(B, N, heads x d)``
    or ``(B, heads, N, d)``; those of its queries and values have names that go with it.

    ``by_hand``: computes the attention in place of its module, for modules that do not take a mask for each row of a batch, or
    have no module that hands out keys. ``rotary``: how it takes rotary tables, if it does.
    """

    norm: str
    attention: str
    key: str
    after: tuple[str, ...]
    mlp: tuple[str, ...]
    mask: str = "attention_mask"
    by_hand: ByHand | None = None
    rotary: Rotary | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        key = () if self.by_hand else (self.key,)
        return (self.norm, self.attention, *key, *self.after, *self.mlp)

    def source(self, block: nn.Module, what: str) -> str | None:
        """The name of the module that hands out the block's ``"queries"``, ``"keys"`` or ``"values"``, None if none does.

        A fused projection hands out values as the last third of its output, unless a bias is added outside of it.
        """
        if what == "keys":
            return self.key
        front, _, last = self.key.rpartition(".")
        outside = getattr(part_of(block, self.attention), "q_bias", None) is not None
        names = [name for name in COMPANIONS.get(last, {}).get(what, ()) if not (name == "qkv" and outside)]
        paths = (f"{front}.{name}".lstrip(".") for name in names)
        return next((path for path in paths if has_part(block, path) and part_of(block, path) is not None), None)

    def scaling(self, block: nn.Module) -> float | None:
        """What the block's attention multiplies its logits by, None if it does not say: then ``d ** -0.5``."""
        attention = part_of(block, self.attention)
        said = getattr(attention, "scale", getattr(attention, "scaling", None))
        return said if isinstance(said, float) else None

    def attention_of(self, block: nn.Module) -> Any:
        return part_of(block, self.attention)

    def fits(self, block: nn.Module) -> bool:
        """Whether the block has all these parts and no others, and its attention takes the mask."""
        if not all(has_part(block, path) for path in self.paths):
            return False
        known = {path.split(".")[0] for path in self.paths}
        own = [*block.named_children(), *block.named_parameters(recurse=False)]
        takes = inspect.signature(type(part_of(block, self.attention)).forward).parameters
        return known.issuperset(name for name, _ in own) and (self.by_hand is not None or self.mask in takes)

    def attend(self, block: nn.Module, x: Any, bias: Any, options: dict[str, Any], note: Callable | None = None) -> Any:
        """What the attention branch adds to ``x (B, N, C)``; ``bias`` None or broadcastable to ``(B, heads, N, N)``.

        ``note`` is told queries, keys and values where no module hands them out.
        """
        attention, rows = part_of(block, self.attention), part_of(block, self.norm)(x)
        if self.by_hand is not None:
            out, *heads = self.by_hand(attention, rows, bias, options)
            if note is not None:
                note(*heads)
        else:
            out = attention(rows, **{**options, self.mask: bias})
        return _through(block, self.after, out[0] if isinstance(out, tuple) else out)

    def feed(self, block: nn.Module, x: Any) -> Any:
        """What the MLP branch adds to ``x (B, N, C)``."""
        return _through(block, self.mlp, x)


def _through(block: nn.Module, paths: tuple[str, ...], x: Any) -> Any:
    """``x`` through modules; parameters scale it, and a part that is None does nothing."""
    for path in paths:
        part = part_of(block, path)
        if part is not None:
            x = part(x) if isinstance(part, nn.Module) else part * x
    return x


def part_of(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name)
    return block


def has_part(block: nn.Module, path: str) -> bool:
    try:
        part_of(block, path)
    except AttributeError:
        return False
    return True
