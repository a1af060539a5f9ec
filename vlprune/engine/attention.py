"""Watches attention modules at work, and computes single rows and column means of attention beside their kernels.

transformers looks the kernel up by name each time. While somebody watches, the entry of that name is one that notes queries,
keys and values of watched modules and hands everything on; afterwards the table is as it was. Modules run eagerly get their
kernel from their own source file, so there the entry is that file's.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.kernels import attention_columns, attention_rows

BLOCK = 256
"""Queries whose attention is held at a time, and up to which rows are summed rather than columns."""


@dataclass(frozen=True, eq=False)
class Call:
    """What an attention kernel was called with.

    ``query (B, heads, q, head_dim)``; ``key``, ``value (B, kv_heads, k, head_dim)``, those of the cache included, rotated
    and normalised. ``mask``: None, ``(B, k)`` for flash attention, ``(B, 1, q, k)`` bool or additive, or a flex block mask.
    ``options``: everything else.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    causal: bool
    flash: bool
    options: dict[str, Any]

    @property
    def scaling(self) -> float:
        scaling = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling


Watcher = Callable[[Call], None]
_watchers: dict[nn.Module, list[Watcher]] = {}
_tables: dict[tuple[int, str], _Entry] = {}
_lock = threading.Lock()


@dataclass(eq=False)
class _Entry:
    """An exchanged entry of a table of kernels. ``users``: how many watch at the moment."""

    table: dict[str, Any]
    name: str
    kernel: Any
    was_local: bool
    users: int = 0

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        for watcher in _watchers.get(module, ()):
            mask = args[0] if args else kwargs.get("attention_mask")
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            watcher(Call(query.detach(), key.detach(), value.detach(), mask, bool(causal), "flash" in self.name, kwargs))
        return self.kernel(module, query, key, value, *args, **kwargs)


def _place(module: Any) -> tuple[dict[str, Any], str, Any, bool]:
    """Where the kernel of an attention module stands: table, name, the kernel, whether the entry is the table's own."""
    # Imported here, since it takes seconds, and `import vlprune` must not.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation or "eager"
    if name == "eager":
        table = inspect.unwrap(type(module).forward).__globals__
        return table, "eager_attention_forward", table["eager_attention_forward"], True
    table = ALL_ATTENTION_FUNCTIONS._local_mapping
    return table, name, ALL_ATTENTION_FUNCTIONS[name], name in table


@contextmanager
def watching(watchers: Mapping[nn.Module, Watcher]) -> Iterator[None]:
    """Inside the block ``watchers[module]`` is told of each call that an attention module makes to its kernel."""
    with ExitStack() as stack:
        for module, watcher in watchers.items():
            stack.callback(_leave, module, watcher, _enter(module, watcher))
        yield


def _enter(module: nn.Module, watcher: Watcher) -> _Entry:
    with _lock:
        table, name, kernel, was_local = _place(module)
        entry = _tables.get((id(table), name))
        if entry is None:
            entry = _tables[id(table), name] = _Entry(table, name, kernel, was_local)
            table[name] = entry
        entry.users += 1
        _watchers.setdefault(module, []).append(watcher)
        return entry


def _leave(module: nn.Module, watcher: Watcher, entry: _Entry) -> None:
    with _lock:
        _watchers[module].remove(watcher)
        if not _watchers[module]:
            del _watchers[module]
        entry.users -= 1
        if entry.users == 0:
            del _tables[id(entry.table), entry.name]
            if entry.was_local:
                entry.table[entry.name] = entry.kernel
            else:
                del entry.table[entry.name]


class _Called(Exception):
    """Ends a run of an attention module at its kernel."""


def call_of(module: nn.Module, kwargs: dict[str, Any]) -> Call:
    """What ``module`` would call its kernel with, given ``kwargs`` but no mask and no cache. The kernel does not run."""
    calls: list[Call] = []

    def note(call: Call) -> None:
        calls.append(call)
        raise _Called

    others = _watchers.pop(module, None)
    try:
        with watching({module: note}):
            past = {name: None for name in kwargs if name.startswith("past_key_value")}
            # Not by calling the module: its hooks belong to the real run.
            module.forward(**{**kwargs, **past, "attention_mask": None})
    except _Called:
        pass
    finally:
        if others is not None:
            _watchers[module] = others
    return calls[0]


# ------------------------------------------------------------------ attention beside the kernel


def rows(call: Call, queries: Tensor) -> Tensor:
    """Softmax attention ``(B, heads, R, k)`` float32 of the queries at ``queries (B, R)``; rows of negative ones are zero."""
    causal_shift, valid, mask = _seen(call)
    query = call.query
    if call.mask is not None and not torch.is_tensor(call.mask):
        # A block mask of flex attention tells about single pairs: those of the chosen queries are asked for.
        mask, query = _pairs(call, queries), _chosen(call.query, queries)
        queries = torch.where(queries < 0, queries, torch.arange(queries.shape[1], device=queries.device))
    return attention_rows(
        query,
        call.key,
        queries,
        scaling=call.scaling,
        causal_shift=causal_shift,
        valid=valid,
        mask=mask,
        softcap=call.options.get("softcap"),
    )


def received(call: Call, queries: Tensor) -> Tensor:
    """Attention ``(B, heads, k)`` float32 that each key receives, averaged over the queries at ``queries (B, R)``.

    Negative queries do not count.
    """
    real = queries >= 0
    return columns(call, queries, real / real.sum(1).clamp(min=1)[:, None])


def columns(call: Call, queries: Tensor, weights: Tensor) -> Tensor:
    """Attention ``(B, heads, k)`` float32 that each key receives from the queries at ``queries (B, R)``, times their
    ``weights (B, R)``, summed.

    Negative queries do not count. Memory is linear in the number of keys.
    """
    causal_shift, valid, mask = _seen(call)
    if queries.shape[1] <= BLOCK or mask is not None or not (call.mask is None or torch.is_tensor(call.mask)):
        blocks = zip(queries.split(BLOCK, dim=1), weights.float().split(BLOCK, dim=1), strict=True)
        total = call.query.new_zeros(*call.query.shape[:2], call.key.shape[2], dtype=torch.float32)
        return sum(((weight[:, None, None] @ rows(call, block))[:, :, 0] for block, weight in blocks), total)
    length, real = call.query.shape[2], queries >= 0
    of_rows = torch.zeros(queries.shape[0], length + 1, device=queries.device)
    of_rows = of_rows.scatter_add(1, torch.where(real, queries, length), weights.float())[:, :length]
    return attention_columns(
        call.query,
        call.key,
        of_rows,
        scaling=call.scaling,
        causal_shift=causal_shift,
        valid=valid,
        softcap=call.options.get("softcap"),
    )


def perturbed(call: Call, temperature: float, noise: Tensor | None) -> Call:
    """The call whose scores have ``noise (B, kv_heads, k)`` added and are divided by ``temperature``.

    The noise is one more channel of the keys, so whatever computes attention computes this, too. (A cap on scores caps
    their sum with the noise.)
    """
    query, key = call.query.float() / temperature, call.key.float()
    if noise is not None:
        unit = query.new_full((*query.shape[:3], 1), 1 / (temperature * call.scaling))
        query, key = torch.cat([query, unit], 3), torch.cat([key, noise[..., None]], 3)
    return replace(call, query=query, key=key, options={**call.options, "scaling": call.scaling})


def _seen(call: Call) -> tuple[int | None, Tensor | None, Tensor | None]:
    """What the queries of a call may see: causal shift, real keys ``(B, k)``, and a mask ``(B or 1, heads or 1, q, k)``."""
    mask, keys = call.mask, call.key.shape[2]
    if mask is not None and not torch.is_tensor(mask):
        return None, None, None
    if mask is not None and mask.ndim == 4:
        return None, None, mask[..., :keys]
    causal_shift = None
    if call.causal and call.query.shape[2] > 1:
        # Without a mask SDPA counts from the first key, flash attention from the last. A single query sees all.
        causal_shift = keys - call.query.shape[2] if call.flash else 0
    if mask is None:
        return causal_shift, None, None
    real = mask[:, -keys:].bool()
    return causal_shift, torch.nn.functional.pad(real, (0, keys - real.shape[-1])), None


def _pairs(call: Call, queries: Tensor) -> Tensor:
    """Which keys the queries at ``queries (B, R)`` see by a flex block mask: bool ``(B, 1, R, k)``."""
    index = queries.clamp(min=0)
    keys = torch.arange(call.key.shape[2], device=index.device)
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    pairs = call.mask.mask_mod(batch, torch.zeros_like(batch), index[:, :, None], keys)
    return pairs.expand(*index.shape, keys.shape[0])[:, None]


def _chosen(query: Tensor, queries: Tensor) -> Tensor:
    """Queries ``(B, heads, R, head_dim)`` at ``queries (B, R)``."""
    index = queries.clamp(min=0)[:, None, :, None]
    return query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
