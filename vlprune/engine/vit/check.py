"""What is found out about a model's blocks when a method is applied, by running them on a few random rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.vit.architecture import VitShape
from vlprune.engine.vit.blocks import original
from vlprune.engine.vit.layout import Layout
from vlprune.engine.vit.run import key_bias
from vlprune.errors import UnsupportedModelError

ROWS, COPIES = 8, 6
"""Rows besides protected ones, and how many of the last one there are."""


def residuals(name: str, block: nn.Module, layout: Layout, shape: VitShape) -> bool:
    """Whether the block hands on a tuple.

    Raises :class:`UnsupportedModelError` unless its two branches give, bit for bit, what the block itself does.
    """
    x, options = _rows(block, shape, 1), tried_options(block, layout, shape, 1)
    with _quiet(block):
        forward = original(type(block)).forward
        named = {**_blank(forward, 2), **_tables(block, layout, shape, 1)}
        out = forward(block, x.transpose(0, 1) if shape.sequence_first else x, **named)
        whole = out[0] if isinstance(out, tuple) else out
        whole = whole.transpose(0, 1) if shape.sequence_first else whole
        between = x + layout.attend(block, x, None, options)
        parts = between + layout.feed(block, between)
    if not torch.equal(whole, parts):
        raise UnsupportedModelError(
            f"{type(block).__name__} of this {name} model does not compute what its parts in their known order compute; "
            "its residual layout is unknown, so rows cannot be merged between attention and MLP"
        )
    return isinstance(out, tuple)


def proportional(name: str, block: nn.Module, layout: Layout, shape: VitShape) -> None:
    """Raises :class:`UnsupportedModelError` unless a row of size s gets the attention that s equal rows get."""
    x, copies = _rows(block, shape, 1), _rows(block, shape, COPIES)
    rows = x.shape[1]
    sizes = torch.ones(1, rows, device=x.device)
    sizes[:, -1] = COPIES
    options, of_copies = (tried_options(block, layout, shape, n) for n in (1, COPIES))
    with _quiet(block):
        expected = layout.attend(block, copies, None, of_copies)[:, :rows].float()
        plain = layout.attend(block, x, None, options).float()
        sized = layout.attend(block, x, key_bias(sizes.log(), x.dtype), options).float()
    rounding = 64 * torch.finfo(x.dtype).eps * expected.abs().amax()
    if not (sized - expected).abs().amax() <= 0.25 * (plain - expected).abs().amax() + rounding:
        raise UnsupportedModelError(
            f"the attention of this {name} model ({type(block.get_submodule(layout.attention)).__name__}) does not add the "
            "mask that it is given to its logits; use its fused kernel (transformers: attn_implementation='sdpa', timm: "
            "fused_attn), or apply the method with proportional=False"
        )


def tried_options(block: nn.Module, layout: Layout, shape: VitShape, copies: int) -> dict[str, Any]:
    """What the block's attention is given besides rows and mask when it is tried."""
    return {**blank_options(block, layout), **_tables(block, layout, shape, copies)}


def _tables(block: nn.Module, layout: Layout, shape: VitShape, copies: int) -> dict[str, Any]:
    """Rotary tables of the rows, the last one ``copies`` times."""
    if layout.rotary is None:
        return {}
    generator = torch.Generator().manual_seed(1)
    width = getattr(layout.attention_of(block), "head_dim", shape.width // shape.heads)
    angles = torch.randn(ROWS, width // 2, generator=generator)
    angles = torch.cat([angles, angles[-1:].expand(copies - 1, -1)]).to(next(block.parameters()))
    return {layout.rotary.argument: layout.rotary.example(angles)}


def blank_options(block: nn.Module, layout: Layout) -> dict[str, None]:
    """What the attention asks for besides rows and mask, each None."""
    named = _blank(type(block.get_submodule(layout.attention)).forward, 2)
    named.pop(layout.mask, None)
    return named


def _blank(forward: Any, behind: int) -> dict[str, None]:
    parameters = list(inspect.signature(forward).parameters.values())[behind:]
    return {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _rows(block: nn.Module, shape: VitShape, copies: int) -> Tensor:
    """Random rows ``(1, N, C)``, the last one ``copies`` times."""
    weight = next(block.parameters())
    x = torch.randn(1, shape.prefix + ROWS, shape.width, generator=torch.Generator().manual_seed(0))
    return torch.cat([x, *[x[:, -1:]] * (copies - 1)], 1).to(weight.device, weight.dtype)


@contextmanager
def _quiet(block: nn.Module) -> Iterator[None]:
    """Without gradients, dropout, autocast or PyTorch's fused encoder kernels; the block is as before behind it."""
    training = {module: module.training for module in block.modules()}
    block.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.autocast(next(block.parameters()).device.type, enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training.items():
            module.training = flag
