"""Row maps: which logical token each physical row of a pruned sequence is.

*Logical* positions count every token ever fed to the model; attention masks, position ids and cache lengths outside the
decoder layers speak of them. *Physical* rows are the tokens still alive inside the decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlprune.errors import IncompatibleCacheError
from vlprune.kernels import gather_rows

FILLER = -1
"""Marks a physical row that stands for no token: shorter samples of a batch have some on the left."""


def right_align(keep: Tensor, length: int) -> Tensor:
    """Kept positions of ``keep (B, L)`` bool as rows ``(B, length)`` int64: ascending, right-aligned, filler on the left.

    ``length`` is the largest number of kept positions of a sample; it is known to the caller, so nothing waits for the
    device.
    """
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - length :]
    return torch.where(keep.gather(1, order), order, FILLER)


def take(tensor: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Gathers ``rows (B, n)`` of ``tensor`` along ``dim``; its dimension 0 is the batch (B, or 1 to be shared).

    Filler rows yield row 0; they are never attended to.
    """
    return gather_rows([tensor.movedim(dim, 1)], rows.to(tensor.device))[0].movedim(1, dim)


class Take:
    """``take`` along dimension 1, with the rows known."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __call__(self, tensor: Tensor) -> Tensor:
        return take(tensor, self.rows, 1)


def take_tables(tables: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
    """Gathers rows of rotary tables ``(..., B, L, head_dim)``; M-RoPE may have a dimension in front of the batch."""
    rows = rows.to(tables[0].device)
    taken = gather_rows([table.movedim((-3, -2), (0, 1)) for table in tables], rows)
    return tuple(table.movedim((0, 1), (-3, -2)) for table in taken)


def put(tensor: Tensor, rows: Tensor, length: int) -> Tensor:
    """The inverse of :func:`take` along dimension 1: ``(B, n, D)`` back to ``(B, length, D)``.

    A dropped position gets the row kept last before it, zeros if there is none: what follows a dropped token, the answer
    to a prompt that ends with an image for one, is predicted by the last token that is there.
    """
    rows = rows.to(tensor.device)
    alive = rows.new_zeros(rows.shape[0], length + 1).scatter(1, torch.where(rows < 0, length, rows), 1)[:, :length]
    seen = alive.cumsum(1)
    full = take(tensor, rows.shape[1] - seen[:, -1:] + seen - 1, 1)
    return full.masked_fill((seen == 0).view(*seen.shape, *[1] * (tensor.ndim - 2)), 0)


class RowMap:
    """Logical position of every physical slot of a layer's cache.

    Slot ``s`` below ``prefix.shape[2]`` holds logical position ``prefix[b, h, s]``, ascending, filler first; ``h`` is 0, or
    the head of keys and values where each has entries of its own. Behind the prefix nothing was dropped, so slots and
    positions go on together from ``base`` on.
    """

    def __init__(self, prefix: Tensor, base: int, filler: bool):
        self.prefix = prefix
        self.base = base
        self.filler = filler
        self.fixed: tuple[Tensor, Tensor] | None = None
        self.shift: int | Tensor = self.dropped

    @property
    def dropped(self) -> int:
        """Logical positions that have no slot (padding counts as dropped)."""
        return self.base - self.prefix.shape[2]

    def entries(self, slots: int) -> Tensor:
        """Logical positions ``(B, 1 or heads, slots)`` of the first ``slots`` slots."""
        length = self.prefix.shape[2]
        if slots <= length:
            return self.prefix[:, :, :slots]
        tail = torch.arange(slots - length, device=self.prefix.device) + self.base
        return torch.cat([self.prefix, tail.expand(*self.prefix.shape[:2], -1)], 2)

    def columns(self, slots: int) -> Tensor:
        """Logical positions ``(B, slots)`` of the first ``slots`` slots, of the first head where heads differ.

        Heads differ in which tokens of the past they hold, not in how many: a mask that hides filler and the future is the
        same for all.
        """
        return self.entries(slots)[:, 0]

    def find(self, sample: int, logical: Tensor) -> Tensor:
        """Slots of a sample's tokens at ``logical (N,)`` or ``(heads, N)``, which must be there.

        All heads hold equally many entries: a token that none of them has lost is at the same slot in each.
        """
        held, logical = self.prefix[sample], logical.to(self.prefix.device)
        if logical.ndim == 1:
            return self._search(held[0], logical)
        return self._search(held.expand(logical.shape[0], -1), logical)

    def _search(self, held: Tensor, logical: Tensor) -> Tensor:
        behind = logical - self.base + self.prefix.shape[2]
        return torch.where(logical >= self.base, behind, torch.searchsorted(held.contiguous(), logical.contiguous()))

    def fix(self, slots: int) -> None:
        """Keeps what a cache of constant size needs at hand as tensors: compiled decode steps read no number that changes."""
        columns = self.columns(slots)
        self.shift = torch.full((), self.dropped, device=columns.device)
        self.fixed = columns.clamp(0, slots - 1), (columns >= 0) & (columns < slots)

    def extended(self, rows: Tensor | None, past: int, length: int, filler: bool) -> RowMap:
        """The map after ``length`` more logical tokens, of which only ``rows`` were stored (None: all of them)."""
        head = self.entries(past - self.dropped)
        if rows is None:
            rows = torch.arange(length, device=head.device).expand(head.shape[0], -1)
        new = torch.where(rows < 0, FILLER, rows + past).to(head.device)
        return RowMap(torch.cat([head, new[:, None].expand(-1, head.shape[1], -1)], 2), past + length, self.filler or filler)

    @classmethod
    def identity(cls, batch: int, past: int, device: torch.device) -> RowMap:
        """A map of ``past`` tokens of which none was dropped."""
        return cls(torch.arange(past, device=device).expand(batch, 1, -1), past, filler=False)

    def select(self, samples: Tensor) -> None:
        """Reorders, repeats or drops samples of the batch, as the cache does for beams."""
        samples = samples.to(self.prefix.device)
        self.prefix = self.prefix[samples]
        if self.fixed is not None:
            self.fixed = self.fixed[0][samples], self.fixed[1][samples]

    def crop(self, length: int) -> None:
        """Forgets logical positions from ``length`` on. They must lie behind every dropped token."""
        excess = self.base - length
        if excess <= 0:
            return
        tail = torch.arange(length, self.base, device=self.prefix.device)
        held = self.prefix[:, :, -excess:]
        if excess > self.prefix.shape[2] or not torch.equal(held, tail.expand_as(held)):
            raise IncompatibleCacheError(
                f"the cache cannot be cropped to {length} tokens: tokens behind that position were pruned. "
                "Crop to a length behind the image, or start from an empty cache."
            )
        self.prefix, self.base = self.prefix[:, :, :-excess], length
