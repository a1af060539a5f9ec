"""Signals of the vision encoder, against maps of all rows by all rows that the tests compute from the blocks' own inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlprune
from tests import zoo
from tests.encoders import parts_of, token_rows
from vlprune.engine.family import IMAGE
from vlprune.signals import (
    ClsAttention,
    ClsValues,
    GlobalAttention,
    Hidden,
    Keys,
    MeanAttention,
    ModuleDelta,
    ReceivedAttention,
    Values,
)

KINDS: list[Any] = [MeanAttention, ReceivedAttention, Keys, Values, Hidden, ModuleDelta]
CLS: list[Any] = [ClsAttention, ClsValues]
LAYERS = (0, 2, -1)


@dataclass(kw_only=True)
class Reader(vlprune.Method):
    """Asks for everything, and keeps what it got."""

    name = "reader"
    seen: ClassVar[list[Any]] = []

    def wants(self, shape):
        kinds = KINDS + (CLS if shape.has_cls else [])
        more = [(ModuleDelta(layer, module="mlp"), GlobalAttention(layer, threshold=1.2)) for layer in LAYERS]
        return *(kind(layer) for kind in kinds for layer in LAYERS), *(signal for pair in more for signal in pair)

    def select(self, image):
        type(self).seen.append(image)
        return vlprune.Selection(torch.arange(image.count))


# ------------------------------------------------------------------ a stand-in for flash attention


def flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a kernel of FlashAttention is told: a mask of keys ``(B, k)`` or bounds of stretches, never a mask of pairs."""
    assert not (module.is_causal if is_causal is None else is_causal)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        assert attention_mask.shape == (key.shape[0], key.shape[2])
        scores = scores.masked_fill(~attention_mask.bool()[:, None, None], -torch.inf)
    if cu_seq_lens_q is not None:
        assert attention_mask is None
        assert cu_seq_lens_q.dtype == torch.int32
        assert cu_seq_lens_q[-1] == query.shape[2]
        assert int(max_length_q) >= int(cu_seq_lens_q.diff().max())
        stretch = torch.arange(len(cu_seq_lens_q) - 1).repeat_interleave(cu_seq_lens_q.diff().long())
        scores = scores.masked_fill(stretch[:, None] != stretch, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@contextmanager
def flash_vision(model: Any) -> Iterator[Any]:
    """Inside the block the vision encoder runs what it takes for FlashAttention 2."""
    config = parts_of(model).vision.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
    config._attn_implementation = "flash_attention_2"
    try:
        yield model
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


# ------------------------------------------------------------------ the reference


class Reference:
    """One block of an unpatched encoder: what went into and came out of it, ``(B, L, D)``, and what follows from that."""

    def __init__(self, parts: Any, layer: int):
        family, block = parts.family, parts.vision_layers[layer]
        self.attention, self.prefix, self.packed = parts.vision_attention(layer), parts.prefix, family.packed
        self.states: dict[str, Tensor] = {}
        mlp = block.get_submodule(family.vision_mlp)
        self.handles = [
            module.register_forward_hook(self._note(name), with_kwargs=True)
            for name, module in (("block", block), ("attention", self.attention), ("mlp", mlp))
        ]

    def _note(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            out = out[0] if isinstance(out, tuple) else out
            self.states[f"{name} in"], self.states[name] = (t.detach().view(-1, *t.shape[-2:]) for t in (given, out))
            if name == "attention":
                self.options = kwargs

        return hook

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, heads, L, head_dim)``."""
        given, module = self.states["attention in"], self.attention
        heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
        if hasattr(module, "qkv"):
            query, key, value = module.qkv(given).chunk(3, -1)
        else:
            query, key, value = (getattr(module, f"{name}_proj")(given) for name in "qkv")
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        tables = self.options.get("position_embeddings")
        return (query, key, value) if tables is None else (_rotated(query, *tables), _rotated(key, *tables), value)

    def map(self) -> Tensor:
        """Attention ``(B, heads, L, L)``."""
        query, key, _ = self.projections()
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.masked_fill(self.stretch()[:, None] != self.stretch(), -torch.inf).softmax(-1)

    def stretch(self) -> Tensor:
        """Which stretch of rows that attend to each other a row belongs to ``(L,)``."""
        length = self.states["block"].shape[1]
        bounds = self.options.get("cu_seqlens", self.options.get("cu_seq_lens_q"))
        mask = self.options.get("attention_mask")
        if bounds is not None:
            return torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff().long())
        return torch.zeros(length) if mask is None else (mask[0, 0] == 0).int().argmax(-1)

    def signal(self, signal: Any, batch: Tensor, rows: Tensor) -> Tensor:
        """A signal of the image with tokens ``rows (tiles, n, k)`` in row ``batch (tiles,)`` of the batch."""
        index = batch[:, None, None], rows
        if isinstance(signal, Hidden):
            return self.states["block"][index].mean(2)
        if isinstance(signal, ModuleDelta):
            return torch.stack([self.states[f"{signal.module} in"][index], self.states[signal.module][index]]).mean(3)
        query, key, value = self.projections()
        if isinstance(signal, ClsValues):
            return value[batch, :, 0]
        if isinstance(signal, (Keys, Values)):
            return (key if isinstance(signal, Keys) else value).transpose(1, 2)[index].mean(2).transpose(1, 2)
        if isinstance(signal, ClsAttention):
            values = self.map()[:, :, 0]
        elif isinstance(signal, ReceivedAttention):
            peers = (self.stretch()[:, None] == self.stretch()).sum(0)
            values = self.map().sum(2) / peers
        elif isinstance(signal, GlobalAttention):
            values = self.from_hubs(signal.threshold)
        else:
            own = query.transpose(1, 2)[index].flatten(1, 2), key.transpose(1, 2)[index].flatten(1, 2)
            scores = torch.einsum("thc,tnhc->tnh", own[0].mean(1), own[1]) * query.shape[-1] ** -0.5
            return scores.softmax(1).unflatten(1, rows.shape[1:]).mean(2).transpose(1, 2)
        return values.transpose(1, 2)[index].mean(2).transpose(1, 2)

    def from_hubs(self, threshold: float) -> Tensor:
        """``(B, heads, L)``: the mean row of those that receive more than ``threshold`` times the mean, else of all."""
        found = torch.zeros_like(self.map()[:, :, 0])
        for one, tile in enumerate(self.map()):
            for stretch in self.stretch().unique():
                mine = (self.stretch() == stretch).nonzero()[:, 0]
                own = tile[:, mine][:, :, mine]
                level = own.mean((0, 1))
                hubs = (level > threshold * level.mean()).nonzero()[:, 0]
                found[one, :, mine] = own[:, hubs if len(hubs) else slice(None)].mean(1)
        return found


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * cos + half * sin


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_signals_equal_maps_of_all_rows_by_all_rows(family, attention):
    """Every signal, of several images, to 1e-5 in float32."""
    model = zoo.build(family, "sdpa" if attention == "flash" else attention)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    if family == "mistral3" and attention == "flash" and zoo.VERSION < (5, 0):
        pytest.skip("Pixtral tells the kernel of positions, not of bounds")
    Reader.seen.clear()
    parts = parts_of(model)
    layers = [range(parts.shape.vision_layers)[layer] for layer in LAYERS]
    with flash_vision(model) if attention == "flash" else torch.no_grad(), torch.no_grad():
        with vlprune.applied(model, Reader(budget=0.5)):
            zoo.image_features(model, inputs)
        references = {layer: Reference(parts, number) for layer, number in zip(LAYERS, layers, strict=True)}
        zoo.image_features(model, inputs)
    assert len(Reader.seen) == zoo.choices(family, zoo.SCENARIOS["batch"]["images"])
    first = 0
    for image in Reader.seen:
        rows = token_rows(parts, image.layout, inputs, first)
        batch = torch.zeros(image.layout.tiles, dtype=torch.long)
        length = references[0].states["block"].shape[1]
        if parts.family.packed:
            first += rows.numel()
        else:
            batch = torch.arange(first // length, first // length + image.layout.tiles)
            rows = token_rows(parts, image.layout, inputs, 0)[:1].expand(image.layout.tiles, -1, -1)
            first += image.layout.tiles * length
        assert set(image.signals) == set(Reader().wants(parts.shape))
        for signal, value in image.signals.items():
            assert value.dtype == torch.float32
            assert not value.requires_grad
            expected = references[signal.layer].signal(signal, batch, rows)
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=lambda text, s=signal: f"{s}: {text}")
    for reference in references.values():
        for handle in reference.handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next"])
def test_attention_equals_what_transformers_itself_reports(family):
    """``output_attentions`` of an eager model, for encoders that have it."""
    model = zoo.build(family)
    eager = zoo.build(family, "eager")
    inputs = zoo.prompt(family)
    Reader.seen.clear()
    with vlprune.applied(model, Reader(budget=0.5)), torch.no_grad():
        zoo.image_features(model, inputs)
    (image,) = Reader.seen
    pixels = inputs["pixel_values"].flatten(0, -4)[: image.layout.tiles]
    with torch.no_grad():
        maps = eager.model.vision_tower(pixels, output_attentions=True).attentions
    prefix = int(zoo.FAMILIES[family].cls)
    for layer in LAYERS:
        expected = maps[layer].mean(2)[:, :, prefix:]
        torch.testing.assert_close(image[ReceivedAttention(layer)], expected, atol=1e-5, rtol=0)
        if prefix:
            torch.testing.assert_close(image[ClsAttention(layer)], maps[layer][:, :, 0, 1:], atol=1e-5, rtol=0)


def test_what_nobody_asks_for_is_not_measured():
    """A method without signals leaves no hook in the vision encoder, and the table of kernels stays as it was."""
    model = zoo.build("llava")
    inputs = zoo.prompt("llava")
    parts = parts_of(model)
    table = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    seen: list[Any] = []

    class Looking(vlprune.Method):
        name = "looking"

        def select(self, image):
            seen.append((dict(ALL_ATTENTION_FUNCTIONS._local_mapping), image.signals))
            return vlprune.Selection(torch.arange(image.count))

    with vlprune.applied(model, Looking(budget=0.5)):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in parts.vision_layers[0].modules())
        zoo.image_features(model, inputs)
        assert len(vlprune.engine.patch.patch_of(model).encoder.latest[IMAGE]) == 1
    assert seen == [(table, {})]
