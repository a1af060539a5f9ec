"""A cache that answers in logical lengths while its layers hold fewer entries.

The class of the user's own cache object is exchanged for a subclass, so the object's identity, ``isinstance``, deepcopy
and pickling are unharmed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from vlprune.engine.rows import RowMap
from vlprune.errors import IncompatibleCacheError


class PrunedCache:
    """Mixed into a cache class: lengths include the tokens that were dropped."""

    row_map: RowMap

    def physical_length(self, layer_idx: int = 0) -> int:
        """Entries that the layer really holds for a sample, filler included."""
        return int(super().get_seq_length(layer_idx))  # pyright: ignore[reportAttributeAccessIssue]

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> Any:
        return super().get_seq_length(layer_idx, *args) + self.row_map.dropped  # pyright: ignore[reportAttributeAccessIssue]

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query, layer_idx)  # pyright: ignore[reportAttributeAccessIssue]
        return (length if is_static(self) else length + self.row_map.dropped), offset

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self.row_map.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        self.row_map.select(torch.arange(self.row_map.prefix.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self.row_map.select(indices)

    def crop(self, length: int) -> None:
        """Negative: tokens to remove (transformers 5.14 and newer). Positive: logical length to keep (before)."""
        seen = int(self.get_seq_length())
        remove = -length if length <= 0 else max(seen - length, 0)
        if remove:
            self.row_map.crop(seen - remove)
            super().crop(-remove)  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        release(self)


class PrunedDynamicCache(PrunedCache, cache_utils.DynamicCache):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


class PrunedStaticCache(PrunedCache, cache_utils.StaticCache):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


_PRUNED: dict[type, type] = {
    cache_utils.DynamicCache: PrunedDynamicCache,
    cache_utils.StaticCache: PrunedStaticCache,
}
_PLAIN = {pruned: plain for plain, pruned in _PRUNED.items()}


def check(cache: Any) -> None:
    """Raises :class:`IncompatibleCacheError` for a cache that cannot hold a pruned sequence."""
    if cache is None or type(cache) in _PRUNED or isinstance(cache, PrunedCache):
        return
    allowed = ", ".join(cls.__name__ for cls in _PRUNED)
    raise IncompatibleCacheError(
        f"past_key_values of type {type(cache).__name__} cannot hold a pruned sequence; allowed are {allowed}. "
        "Pass one of these, or vlprune.remove(model) first."
    )


def row_map(cache: Any) -> RowMap | None:
    """The map of a pruned cache; None for any other one."""
    return cache.row_map if isinstance(cache, PrunedCache) else None


def adopt(cache: Any, rows: RowMap) -> None:
    """Makes ``cache`` answer in the logical lengths of ``rows``."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _PRUNED[type(cache)]
    if is_static(cache):
        rows.fix(slots(cache))
    cache.row_map = rows


def release(cache: Any) -> None:
    """Makes an emptied cache an ordinary one again."""
    del cache.row_map
    cache.__class__ = _PLAIN[type(cache)]


def is_static(cache: Any) -> bool:
    """Whether the cache has a constant size."""
    return isinstance(cache, cache_utils.StaticCache)


def slots(cache: Any) -> int:
    """Entries that a static cache has room for."""
    return cache.layers[0].max_cache_len
