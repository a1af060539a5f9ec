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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
"""Queries whose attention is held at a time."""


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


# ------------------------------------------------------------------ attention beside the kernel


def rows(call: Call, queries: Tensor) -> Tensor:
    """Softmax attention ``(B, heads, R, k)`` float32 of the queries at ``queries (B, R)``; rows of negative ones are zero.

    Grouped keys are not repeated, and nothing larger than the result is built.
    """
    index = queries.clamp(min=0)
    batch, heads, _, width = call.query.shape
    query = call.query.gather(2, index[:, None, :, None].expand(batch, heads, -1, width)).float() * call.scaling
    groups = call.key.shape[1]
    grouped = query.view(batch, groups, heads // groups, -1, width)
    # In place from here on: one tensor of the result's size is all that is needed.
    scores = torch.einsum("bgirc,bgkc->bgirk", grouped, call.key.float()).flatten(1, 2)
    softcap = call.options.get("softcap")
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    _mask(scores, call, index)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    scores.div_(scores.sum(-1, keepdim=True))
    return scores.masked_fill_((queries < 0)[:, None, :, None], 0.0)


def received(call: Call, queries: Tensor) -> Tensor:
    """Attention ``(B, heads, k)`` float32 that each key receives, averaged over the queries at ``queries (B, R)``.

    Negative queries do not count. Works on blocks of queries, so memory is linear in the number of keys.
    """
    total = call.key.new_zeros(call.query.shape[0], call.query.shape[1], call.key.shape[2], dtype=torch.float32)
    for block in queries.split(BLOCK, dim=1):
        total += rows(call, block).sum(2)
    return total / (queries >= 0).sum(1).clamp(min=1)[:, None, None]


def _mask(scores: Tensor, call: Call, index: Tensor) -> None:
    """Sets ``scores (B, heads, R, k)`` of what the queries at ``index`` may not see to minus infinity."""
    mask, keys = call.mask, scores.shape[-1]
    seen = None
    if mask is None or (torch.is_tensor(mask) and mask.ndim == 2):
        if call.causal and call.query.shape[2] > 1:
            # Without a mask SDPA counts from the first key, flash attention from the last. A single query sees all.
            shift = keys - call.query.shape[2] if call.flash else 0
            seen = torch.arange(keys, device=scores.device) <= (index + shift)[:, :, None]
        if mask is not None:
            real = mask[:, -keys:].bool()[:, None]
            real = torch.nn.functional.pad(real, (0, keys - real.shape[-1]))
            seen = real if seen is None else seen & real
        if seen is not None:
            scores.masked_fill_(~seen[:, None], -torch.inf)
    elif torch.is_tensor(mask):
        chosen = mask.expand(scores.shape[0], *mask.shape[1:])[..., :keys]
        chosen = chosen.gather(2, index[:, None, :, None].expand(-1, chosen.shape[1], -1, chosen.shape[3]))
        if chosen.dtype == torch.bool:
            scores.masked_fill_(~chosen, -torch.inf)
        else:
            scores.add_(chosen)
    else:
        # A block mask of flex attention tells about single pairs.
        batch = torch.arange(scores.shape[0], device=scores.device)[:, None, None]
        pairs = mask.mask_mod(batch, torch.zeros_like(batch), index[:, :, None], torch.arange(keys, device=scores.device))
        scores.masked_fill_(~pairs.expand(scores.shape[0], index.shape[1], keys)[:, None], -torch.inf)
