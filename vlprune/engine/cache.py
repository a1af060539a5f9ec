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
from vlprune.kernels import compact_cache, compact_cache_


class PrunedCache:
    """Mixed into a cache class: lengths include the tokens that were dropped.

    ``row_maps``: one a layer, None where the layer holds every token; layers that hold the same tokens share one.
    ``groups``: a number a layer, the same for layers that share one, -1 for None. ``ledger``: the images in the cache, for
    methods that go on evicting while text is generated.
    """

    row_maps: list[RowMap | None]
    groups: list[int]
    ledger: Any
    layers: list[Any]

    def physical_length(self, layer_idx: int = 0) -> int:
        """Entries that the layer really holds for a sample, filler included."""
        return int(super().get_seq_length(layer_idx))  # pyright: ignore[reportAttributeAccessIssue]

    def dropped(self, layer_idx: int) -> int:
        held = self.row_maps[layer_idx]
        return 0 if held is None else held.dropped

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> Any:
        return super().get_seq_length(layer_idx, *args) + self.dropped(layer_idx)  # pyright: ignore[reportAttributeAccessIssue]

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query, layer_idx)  # pyright: ignore[reportAttributeAccessIssue]
        if is_static(self) or self.row_maps[layer_idx] is None:
            return length, offset
        if is_sliding(self, layer_idx):
            # The whole width: the decoder layers keep the columns of entries that are still stored.
            queries = query if isinstance(query, int) else query.shape[0]
            return int(self.get_seq_length(layer_idx)) + queries, 0
        return length + self.dropped(layer_idx), offset

    def maps(self) -> list[RowMap]:
        return list({id(held): held for held in self.row_maps if held is not None}.values())

    def _select(self, samples: Tensor) -> None:
        for held in self.maps():
            held.select(samples)
        if self.ledger is not None:
            self.ledger.select(samples.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        self._select(torch.arange(self.maps()[0].prefix.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._select(indices)

    def crop(self, length: int) -> None:
        """Negative: tokens to remove (transformers 5.14 and newer). Positive: logical length to keep (before)."""
        seen = int(self.get_seq_length())
        remove = -length if length <= 0 else max(seen - length, 0)
        if remove:
            for held in self.maps():
                held.crop(seen - remove)
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
    if cache is None:
        return
    allowed = ", ".join(cls.__name__ for cls in _PRUNED)
    what = None
    if type(cache) not in _PRUNED and not isinstance(cache, PrunedCache):
        what = f"of type {type(cache).__name__}"
    elif getattr(cache, "offloading", False):
        what = "with offloading"
    elif is_static(cache) and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        what = "of constant size with sliding-window layers"
    if what is not None:
        raise IncompatibleCacheError(
            f"past_key_values {what} cannot hold a pruned sequence; allowed are {allowed}. "
            "Pass one of these, or vlprune.remove(model) first."
        )


def row_map(cache: Any, layer: int) -> RowMap | None:
    """The map of a layer of a pruned cache; None where every token is held."""
    return cache.row_maps[layer] if isinstance(cache, PrunedCache) else None


def adopt(cache: Any, row_maps: list[RowMap | None]) -> None:
    """Makes ``cache`` answer in the logical lengths of ``row_maps``."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _PRUNED[type(cache)]
        cache.ledger = None
    cache.row_maps = row_maps
    numbers: dict[int, int] = {}
    cache.groups = [-1 if held is None else numbers.setdefault(id(held), len(numbers)) for held in row_maps]
    if is_static(cache):
        for held in cache.maps():
            held.fix(slots(cache))


def release(cache: Any) -> None:
    """Makes an emptied cache an ordinary one again."""
    del cache.row_maps, cache.groups, cache.ledger
    cache.__class__ = _PLAIN[type(cache)]


def keep_rows(store: Any, rows: Tensor) -> None:
    """Leaves a layer with the entries at ``rows (B, 1 or heads, n)``; filler holds the first entry."""
    rows, stores = rows.to(store.keys.device), [store.keys, store.values]
    if is_static_layer(store):
        compact_cache_(stores, rows)
    else:
        store.keys, store.values = compact_cache(stores, rows)
    if hasattr(store, "cumulative_length"):
        store.cumulative_length.fill_(rows.shape[2])


def is_sliding(cache: Any, layer: int) -> bool:
    """Whether a layer of the cache forgets what lies behind its window."""
    return layer < len(cache.layers) and bool(getattr(cache.layers[layer], "is_sliding", False))


def stored(cache: Any, layer: int) -> int:
    """Entries that a sliding-window layer holds."""
    keys = getattr(cache.layers[layer], "keys", None)
    return 0 if keys is None or keys.numel() == 0 else keys.shape[-2]


def is_static(cache: Any) -> bool:
    """Whether the cache has a constant size."""
    return isinstance(cache, cache_utils.StaticCache)


def is_static_layer(store: Any) -> bool:
    """Whether a layer of a cache has a constant size."""
    return isinstance(store, cache_utils.StaticLayer)


def slots(cache: Any) -> int:
    """Entries that a static cache has room for."""
    return cache.layers[0].max_cache_len
