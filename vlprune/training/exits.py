"""Fits DyVTE's routers: at which layer would a model have given the same answer without the image from there on?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.api import applied
from vlprune.image import ImageLayout, LayerTokens, ModelShape
from vlprune.method import Method, Plan, Selection
from vlprune.methods.dyvte import text_state, verdict
from vlprune.methods.exit import VisualExit, everything


@dataclass(kw_only=True)
class _Listener(Method):
    """Keeps all tokens, and what a router would see before each layer."""

    adaptive = True
    states: dict[int, Tensor] = field(default_factory=dict)

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(layout.total, dict.fromkeys(range(1, shape.text_layers), layout.total))

    def prefill(self, tokens: LayerTokens) -> Selection:
        self.states[tokens.layer] = text_state(tokens).cpu()
        return everything(tokens)


def fit_exits(
    model: nn.Module,
    samples: Iterable[tuple[dict[str, Tensor], Tensor]],
    out: str | Path,
    *,
    width: int = 2048,
    steps: int = 300,
    rate: float = 1e-3,
    seed: int = 0,
    agreement: float = 0.99,
    loss_ratio: float = 1.03,
) -> dict[int, dict[str, float]]:
    """Trains a router for each layer of ``model``'s LLM but the first, the model frozen, and saves them to ``out``.

    Args:
        samples: the inputs of one prompt with one image, as its processor makes them, and the tokens ``(A,)`` of its answer.
        out: a safetensors file for ``DyVTE(router=...)``.
        width: of the routers; 2048 in the paper.
        agreement, loss_ratio: an exit is right where more than this share of the answer's most likely tokens is what it is
            with the image, and the answer's loss is less than so many times that with it.

    Returns: layer -> ``exits``, the share of samples in which an exit is right, and ``accuracy``, that of the router on them.
    """
    states: dict[int, list[Tensor]] = {}
    labels: dict[int, list[bool]] = {}
    for inputs, answer in samples:
        seen, right = _labelled(model, inputs, answer, agreement, loss_ratio)
        for layer, state in seen.items():
            states.setdefault(layer, []).append(state)
            labels.setdefault(layer, []).append(right[layer])
    routers: dict[str, Tensor] = {}
    told: dict[int, dict[str, float]] = {}
    for layer, seen in states.items():
        target = torch.tensor(labels[layer]).long()
        inner, outer = _router(torch.stack(seen), target, width, steps, rate, seed)
        routers |= {f"{layer}.inner": inner, f"{layer}.outer": outer}
        right = verdict(torch.stack(seen), inner, outer).argmax(-1) == target
        told[layer] = {"exits": target.double().mean().item(), "accuracy": right.double().mean().item()}
    from safetensors.torch import save_file

    save_file(routers, str(out))
    return told


def _labelled(
    model: nn.Module, inputs: dict[str, Tensor], answer: Tensor, agreement: float, loss_ratio: float
) -> tuple[dict[int, Tensor], dict[int, bool]]:
    """Layer -> what a router sees before it, and whether an exit there gives the same answer."""
    fed = _answered(inputs, answer)

    def scored() -> Tensor:
        with torch.no_grad():
            return model(**fed, logits_to_keep=len(answer) + 1).logits[0, -len(answer) - 1 : -1].float()

    listener = _Listener()
    with applied(model, listener):
        whole = scored()
    loss = nn.functional.cross_entropy(whole, answer)
    right = {}
    for layer in listener.states:
        with applied(model, VisualExit(layer=layer)):
            logits = scored()
        same = (logits.argmax(-1) == whole.argmax(-1)).float().mean()
        right[layer] = bool(same > agreement) and bool(nn.functional.cross_entropy(logits, answer) < loss_ratio * loss)
    return listener.states, right


def _answered(inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Any]:
    """The inputs with the answer behind the prompt."""
    ids = inputs["input_ids"]
    fed: dict[str, Any] = dict(inputs)
    for name, value in inputs.items():
        if value.shape == ids.shape:
            more = answer[None] if name == "input_ids" else torch.full_like(answer[None], int(name == "attention_mask"))
            fed[name] = torch.cat([value, more.to(value)], 1)
    return fed


def _router(states: Tensor, labels: Tensor, width: int, steps: int, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(width, states.shape[1], generator=generator) / states.shape[1] ** 0.5
    outer = torch.randn(2, width, generator=generator) / width**0.5
    maps = [nn.Parameter(inner), nn.Parameter(outer)]
    optimizer = torch.optim.AdamW(maps, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(verdict(states, *maps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return maps[0].detach(), maps[1].detach()
