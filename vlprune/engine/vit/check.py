"""What is found out about a model's blocks when a method is applied, by running them on a few random rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.vit.architecture import Layout
from vlprune.engine.vit.blocks import key_bias, original
from vlprune.errors import UnsupportedModelError

ROWS, COPIES = 8, 6


def residuals(name: str, block: nn.Module, layout: Layout, width: int) -> bool:
    """Whether the block hands on a tuple.

    Raises :class:`UnsupportedModelError` unless its two branches give, bit for bit, what the block itself does.
    """
    x = _rows(block, width)
    with _quiet(block):
        forward = original(type(block)).forward
        out = forward(block, x, **_blank(forward, 2))
        whole = out[0] if isinstance(out, tuple) else out
        between = x + layout.attend(block, x, None, blank_options(block, layout))
        parts = between + layout.feed(block, between)
    if not torch.equal(whole, parts):
        raise UnsupportedModelError(
            f"{type(block).__name__} of this {name} model does not compute what its parts in their known order compute; "
            "its residual layout is unknown, so rows cannot be merged between attention and MLP"
        )
    return isinstance(out, tuple)


def proportional(name: str, block: nn.Module, layout: Layout, width: int) -> None:
    """Raises :class:`UnsupportedModelError` unless a row of size s gets the attention that s equal rows get."""
    x = _rows(block, width)
    sizes = torch.ones(1, ROWS, device=x.device)
    sizes[:, -1] = COPIES
    options = blank_options(block, layout)
    with _quiet(block):
        copies = torch.cat([x, *[x[:, -1:]] * (COPIES - 1)], 1)
        expected = layout.attend(block, copies, None, options)[:, :ROWS].float()
        plain = layout.attend(block, x, None, options).float()
        sized = layout.attend(block, x, key_bias(sizes.log(), x.dtype), options).float()
    rounding = 64 * torch.finfo(x.dtype).eps * expected.abs().amax()
    if not (sized - expected).abs().amax() <= 0.25 * (plain - expected).abs().amax() + rounding:
        raise UnsupportedModelError(
            f"the attention of this {name} model ({type(block.get_submodule(layout.attention)).__name__}) does not add the "
            "mask that it is given to its logits; load it with attn_implementation='sdpa', or apply the method with "
            "proportional=False"
        )


def blank_options(block: nn.Module, layout: Layout) -> dict[str, None]:
    """What the attention asks for besides rows and mask, each None."""
    named = _blank(type(block.get_submodule(layout.attention)).forward, 2)
    named.pop(layout.mask, None)
    return named


def _blank(forward: Any, behind: int) -> dict[str, None]:
    parameters = list(inspect.signature(forward).parameters.values())[behind:]
    return {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _rows(block: nn.Module, width: int) -> Tensor:
    weight = next(block.parameters())
    return torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)


@contextmanager
def _quiet(block: nn.Module) -> Iterator[None]:
    """Without gradients, dropout or autocast; the block is as before behind it."""
    training = {module: module.training for module in block.modules()}
    block.eval()
    try:
        with torch.no_grad(), torch.autocast(next(block.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
