"""Which heads of an LLM retrieve: those that look a token up again when a text repeats itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import vlprune.integrations  # noqa: F401  (registers the families)
from vlprune.engine import attention
from vlprune.engine.attention import Call
from vlprune.engine.family import family_of


def retrieval_scores(model: Any, length: int = 2500, repeats: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """How much heads attend to where a token stood before (echo), and to what came after it there (induction).

    The LLM reads ``length`` random tokens, ``repeats`` times in a row, behind its first token. Both scores are ``(layers,
    kv_heads)`` float32: the attention that a query of a later repetition pays to all these places in the repetitions before,
    averaged over queries, the largest of the query heads that share a head of keys. Attention is computed beside the model's
    kernel, some queries at a time.
    """
    parts, config = family_of(model).parts(model), model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    block = torch.randint(0, config.vocab_size, (length,), generator=generator)
    start = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    ids = torch.cat([torch.tensor([start]), block.repeat(repeats)])[None].to(model.device)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def watcher(layer: int) -> attention.Watcher:
        return lambda call: found.update({layer: _scores(call, length, repeats)})

    layers = range(len(parts.text_layers))
    with torch.no_grad(), attention.watching({parts.text_attention(layer): watcher(layer) for layer in layers}):
        parts.text(input_ids=ids, use_cache=False)
    return torch.stack([found[layer][0] for layer in layers]), torch.stack([found[layer][1] for layer in layers])


def retrieval_layers(model: Any, induction: float = 0.14, echo: float = 0.01, **options: int) -> tuple[int, ...]:
    """Layers of a model's LLM that have a retrieval head, for :class:`vlprune.RazorAttention`.

    Those are the share ``induction`` of all heads of keys that have the highest induction score, and the share ``echo`` that
    have the highest echo score. ``options``: those of :func:`retrieval_scores`.
    """
    found: set[int] = set()
    for scores, share in zip(retrieval_scores(model, **options), (echo, induction), strict=True):
        best = scores.flatten().sort(descending=True, stable=True).indices[: math.ceil(share * scores.numel())]
        found |= set((best // scores.shape[1]).tolist())
    return tuple(sorted(found))


def _scores(call: Call, length: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Echo and induction of one layer's heads of keys: ``(kv_heads,)`` each."""
    echo = call.query.new_zeros(call.query.shape[1], dtype=torch.float32)
    induction = torch.zeros_like(echo)
    queries = torch.arange(1 + length, 1 + length * repeats, device=call.query.device)
    for block in queries.split(attention.BLOCK):
        weights = attention.rows(call, block[None])[0]
        for back in range(1, repeats):
            before = block - back * length
            real = before >= 1
            seen = weights.gather(2, before.clamp(min=0).expand(len(weights), -1)[..., None])[..., 0]
            after = weights.gather(2, (before + 1).clamp(min=0).expand(len(weights), -1)[..., None])[..., 0]
            echo += (seen * real).sum(1)
            induction += (after * real).sum(1)
    heads = call.key.shape[1]
    return _of_groups(echo / len(queries), heads), _of_groups(induction / len(queries), heads)


def _of_groups(scores: Tensor, heads: int) -> Tensor:
    return scores.view(heads, -1).amax(1).cpu()
