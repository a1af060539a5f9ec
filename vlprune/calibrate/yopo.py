"""YOPO's inactive heads: those of the LLM that pay visual tokens little attention, on the user's data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlprune
import vlprune.integrations
from vlprune.engine import attention
from vlprune.engine.attention import Call
from vlprune.engine.family import family_of
from vlprune.methods.yopo import YOPO

NEVER = 2
"""Layers at the bottom of the LLM all of whose heads stay active."""


def yopo(
    model: Any,
    batches: Sequence[Any],
    out: str | Path,
    *,
    budget: float | int = 0.75,
    threshold: float = 0.07,
    votes: float = 0.4,
    notes: dict[str, Any] | None = None,
) -> YOPO:
    """Finds heads that are inactive for images and writes settings to ``out``, which ``apply(..., config=out)`` takes.

    ``batches``: inputs of ``model.generate``. A head of queries is inactive on a prompt where its :func:`ratios` is below
    ``threshold``, and altogether if it is on more than the share ``votes`` of the prompts; a head of keys if all heads that
    read it are. ``budget`` decides on the exit. ``notes`` go into the file. The model is the same afterwards.
    """
    found = torch.cat([ratios(model, batch) for batch in batches])  # (prompts, layers, heads)
    heads = inactive(found, _heads_of_keys(model), threshold, votes)
    method = YOPO(budget=budget, heads=heads.nonzero().tolist())
    told = {"method": method.name, "budget": budget, **(notes or {}), "threshold": threshold, "votes": votes}
    told |= {"prompts with images": len(found), "inactive heads": int(heads.sum()), "heads": heads.numel()}
    told["all inactive from layer"] = _from_layer(heads)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({"settings": method.to_dict(), "calibrated": told}, indent=2) + "\n")
    return method


def ratios(model: Any, inputs: Any) -> Tensor:
    """Attention to visual tokens by that to all others, of the prompt's last token: ``(prompts, layers, heads)`` float32.

    That token is the one which the answer's first is read from. Prompts without an image are left out. Attention is computed
    beside the model's kernel, one row of it.
    """
    family = family_of(model)
    parts, mask = family.parts(model), inputs["attention_mask"]
    visual = family.placeholders(model, inputs["input_ids"], None) > 0
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1, keepdim=True)
    found: dict[int, Tensor] = {}

    def watcher(layer: int) -> attention.Watcher:
        def watch(call: Call) -> None:
            weights = attention.rows(call, last.to(call.query.device))[:, :, 0]  # (prompts, heads, tokens)
            here = visual.to(weights.device)[:, None]
            found[layer] = ((weights * here).sum(-1) / (weights * ~here).sum(-1)).cpu()

        return watch

    layers = range(len(parts.text_layers))
    watchers = {parts.text_attention(layer): watcher(layer) for layer in layers}
    # "uniform" stands in the place of what may be applied; it changes nothing.
    with torch.inference_mode(), vlprune.applied(model, "uniform", budget=1.0), attention.watching(watchers):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([found[layer] for layer in layers], 1)[visual.any(1).cpu()]


def inactive(found: Tensor, heads_of_keys: int, threshold: float, votes: float) -> Tensor:
    """Which heads of keys are inactive ``(layers, heads_of_keys)`` bool, by :func:`ratios` of all prompts."""
    of_queries = (found < threshold).float().mean(0) > votes
    of_keys = of_queries.unflatten(1, (heads_of_keys, -1)).all(2)
    of_keys[:NEVER] = False
    return of_keys


def _heads_of_keys(model: Any) -> int:
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _from_layer(heads: Tensor) -> int | None:
    """The first layer of those at the end all of whose heads are inactive: an exit there changes least. None for no such."""
    whole = heads.all(1).long().flip(0).cumprod(0).sum().item()
    return len(heads) - int(whole) if whole else None
