"""The rows of one forward: what was merged in which block, and how they are put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.assignments import unmerge
from vlprune.blocks import BlockAttention, BlockMethod, BlockTokens
from vlprune.engine.vit.layout import Layout
from vlprune.kernels import gather_rows


class Run:
    """What happened to the rows in the forward under way, or the last one.

    Entry ``i`` of a list is what block ``i`` is given, and the entry behind it what it leaves. So a block that is run again,
    as activation checkpointing does, finds what it found before.

    ``rows``: how many, protected ones included; of an adaptive method those of the image that keeps most, and ``planned`` what
    they are at most. ``sizes (B, N)`` float32 and ``maps (B, N of the image)`` int64: how many rows of the image each row
    stands for, and which row stands for each, -1 for none; None as long as nothing was merged. The sizes of padding are 0.

    ``dense``: whether somebody looks at what is between the blocks, which then hand out all rows of the image; ``shown``: at
    these entries alone, None for all.
    """

    def __init__(self, method: BlockMethod, prefix: int, blocks: int):
        self.method, self.prefix, self.blocks = method, prefix, blocks
        self.rows: list[int] = []
        self.planned: list[int] = []
        self.batch = 0
        self.dense = False
        self.shown: frozenset[int] | None = None
        self.padded = False
        self.sizes: list[Tensor | None] = [None] * (blocks + 1)
        self.maps: list[Tensor | None] = [None] * (blocks + 1)
        self.keys: list[Tensor | None] = [None] * blocks
        self.queries: list[Tensor | None] = [None] * blocks
        self.values: list[Tensor | None] = [None] * blocks

    def begin(self, x: Tensor, valid: Tensor | None) -> None:
        """A forward starts with ``x (B, N, C)``; ``valid (B, N)``: False for padding, None if there is none."""
        self.batch, tokens = x.shape[0], x.shape[1] - self.prefix
        self.planned = [self.prefix + count for count in (tokens, *self.method.counts(tokens, self.blocks))]
        self.rows = list(self.planned)
        self.padded = valid is not None
        self.sizes[0] = None if valid is None else valid.float()
        self.maps[0] = None

    def idle(self, block: int) -> bool:
        """Whether the block has nothing to do with merged rows."""
        acts = self.method.softens or self.method.acts(block, self.blocks)
        return self.maps[block] is None and self.rows[block] == self.rows[block + 1] and not acts

    def whole(self, entry: int) -> bool:
        """Whether all rows of the image are there at an entry, merged ones as copies."""
        return entry == self.blocks or (self.dense and (self.shown is None or entry in self.shown))

    def hand_on(self, block: int) -> None:
        self.sizes[block + 1], self.maps[block + 1] = self.sizes[block], self.maps[block]

    # ------------------------------------------------------------------ what a block is given

    def bias(self, block: int, x: Tensor) -> Tensor | None:
        """What is added to the logits ``(B, heads, N, N)`` of the block's attention."""
        weights = self.weights(block)
        return None if weights is None else key_bias(weights, x.dtype)

    def weights(self, block: int) -> Tensor | None:
        """What is added to the logits of each of the block's keys, ``(B, N)`` float32; minus infinity for padding."""
        sizes = self.sizes[block]
        if sizes is None or not (self.method.proportional or self.method.adaptive or self.padded):
            return None
        return sizes.log() if self.method.proportional else torch.where(sizes > 0, 0.0, -torch.inf)

    def tables(self, block: int, layout: Layout, given: Any) -> Any:
        """The rotary tables of the block's rows, of those ``given`` for the image's."""
        places = self.maps[block]
        if layout.rotary is None or given is None or places is None:
            return given
        places = (places[:, self.prefix :] - self.prefix).clamp(min=-1)
        return layout.rotary.merged(given, places, self.rows[block] - self.prefix)

    # ------------------------------------------------------------------ what a block does

    def merge(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        """The rows ``x (B, N, C)`` that are left."""
        if self.method.softens:
            x, self.sizes[block + 1] = self.method.soften(self.tokens(block, x, 0, heads))
            self.forget(block)
            return x
        leaving = self.rows[block] - min(self.rows[block], self.planned[block + 1])
        if leaving == 0 and not self.method.acts(block, self.blocks):
            self.forget(block)
            self.hand_on(block)
            return x
        tokens = self.tokens(block, x, leaving, heads)
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

    def tokens(self, block: int, x: Tensor, leaving: int, heads: Heads) -> BlockTokens:
        """What the method sees."""
        sizes = self.sizes[block]
        if sizes is None:
            sizes = torch.ones(x.shape[:2], device=x.device)
        attention = None
        if "queries" in self.method.reads:
            queries, keys, values = heads.each(self, block)
            attention = BlockAttention(queries, keys, values, self.weights(block), heads.scaling or keys.shape[-1] ** -0.5)
        planned, mean_key = self.planned[block + 1] - self.prefix, heads.mean_key(self, block)
        return BlockTokens(mean_key, x, sizes, self.prefix, leaving, block, self.blocks, attention, planned)

    def forget(self, block: int) -> None:
        self.keys[block] = self.queries[block] = self.values[block] = None

    # ------------------------------------------------------------------ back to all rows of the image, and again to those left

    def restore(self, x: Tensor, entry: int) -> Tensor:
        """The rows ``x`` behind block ``entry - 1``, each at the places that it stands for; their mean where none does."""
        places = self.maps[entry]
        if places is None:
            return x
        if not self.method.drops:
            return gather_rows([x], places)[0]
        sizes = self.sizes[entry]
        assert sizes is not None
        weights = sizes[:, self.prefix :, None] / sizes[:, self.prefix :, None].sum(1, keepdim=True)
        return unmerge(x, places, (x[:, self.prefix :] * weights).sum(1))

    def assignment(self, entry: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """:attr:`maps` and :attr:`sizes` of an entry, also where nothing was merged yet."""
        places, sizes = self.maps[entry], self.sizes[entry]
        if places is None:
            places = torch.arange(self.rows[0], device=device).expand(self.batch, -1)
        return places, torch.ones(self.batch, self.rows[entry], device=device) if sizes is None else sizes

    def shortened(self, x: Tensor, entry: int) -> Tensor:
        """The inverse of :meth:`restore`: each row from the first place that it stands for."""
        places, rows = self.maps[entry], self.rows[entry]
        if places is None:
            return x
        order = torch.arange(places.shape[1], device=x.device).expand_as(places)
        first = order.new_full((len(places), rows + 1), places.shape[1] - 1)
        first = first.scatter_reduce(1, torch.where(places < 0, rows, places), order, "amin")
        return gather_rows([x], first[:, :rows].contiguous())[0]


class Heads:
    """Reads queries, keys and values ``(B, H, N, d)`` of a block that taps have noted, turned by their rotary tables.

    ``heads`` of them; ``scaling`` of the logits, None for ``d ** -0.5``; ``tables`` of the rows at hand.
    """

    def __init__(self, layout: Layout, heads: int, scaling: float | None, block: Any, tables: Any):
        self.heads, self.scaling, self.tables = heads, scaling, tables
        self.rotary = None if tables is None else layout.rotary
        self.attention = layout.attention_of(block)

    def each(self, run: Run, block: int) -> tuple[Tensor, Tensor, Tensor | None]:
        queries, keys = (self._turned(run, self._noted(noted[block])) for noted in (run.queries, run.keys))
        # Heads may share keys and values, so that there are fewer of those.
        return queries, keys, None if run.values[block] is None else self._noted(run.values[block], keys.shape[1])

    def mean_key(self, run: Run, block: int) -> Tensor:
        """The mean over the heads ``(B, N, d)``, float32."""
        keys = self._noted(run.keys[block])
        if self.rotary is not None and self.rotary.per_head(self.tables):
            return self._turned(run, keys).mean(1, dtype=torch.float32)
        return self._turned(run, keys.mean(1, keepdim=True, dtype=torch.float32))[:, 0]

    def _turned(self, run: Run, x: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary.turned(x, self.tables, run.prefix, self.attention)

    def _noted(self, out: Tensor | None, heads: int | None = None) -> Tensor:
        """Without gradients."""
        assert out is not None
        return out.detach() if out.ndim == 4 else out.detach().unflatten(-1, (heads or self.heads, -1)).transpose(1, 2)


def _composed(before: Tensor, assigned: Tensor) -> Tensor:
    """The assignment ``before (B, N)`` followed by ``assigned (B, M)``; what left before stays away."""
    return torch.where(before < 0, -1, assigned.gather(1, before.clamp(min=0)))


def key_bias(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, N, N)``, the ``weights (B, N)`` of keys for every query; takes the memory of ``(B, N)``."""
    return weights.to(dtype)[:, None, None].expand(-1, 1, weights.shape[1], -1)
