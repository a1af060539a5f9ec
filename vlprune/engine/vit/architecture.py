"""What describes a vision transformer, and the registry of those that are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import nn

from vlprune.errors import UnsupportedModelError, VLPruneError

COMPANIONS = {
    "k_proj": {"queries": ("q_proj",), "values": ("v_proj",)},
    "key": {"queries": ("query",), "values": ("value",)},
    "k_norm": {"queries": ("q_norm",), "values": ("v_proj", "qkv")},
}
"""By the last name of the module that hands out keys: those beside it for queries and values."""


@dataclass(frozen=True)
class Layout:
    """The two residual branches of a block, as the names of its submodules in the order in which they are called.

    ``x + after(attention(norm(x)))``, then ``x + mlp(x)``; a parameter among them scales. ``mask`` is the name of the
    attention's argument for what is added to its logits, ``key`` the module whose output are its keys, ``(B, N, heads x d)``
    or ``(B, heads, N, d)``; those of its queries and values have names that go with it.
    """

    norm: str
    attention: str
    key: str
    after: tuple[str, ...]
    mlp: tuple[str, ...]
    mask: str = "attention_mask"

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.norm, self.attention, self.key, *self.after, *self.mlp)

    def source(self, block: nn.Module, what: str) -> str | None:
        """The name of the module that hands out the block's ``"queries"``, ``"keys"`` or ``"values"``, None if none does.

        A fused projection hands out values as the last third of its output, unless a bias is added outside of it.
        """
        if what == "keys":
            return self.key
        front, _, last = self.key.rpartition(".")
        outside = getattr(_part(block, self.attention), "q_bias", None) is not None
        names = [name for name in COMPANIONS.get(last, {}).get(what, ()) if not (name == "qkv" and outside)]
        paths = (f"{front}.{name}".lstrip(".") for name in names)
        return next((path for path in paths if _has(block, path) and _part(block, path) is not None), None)

    def scaling(self, block: nn.Module) -> float | None:
        """What the block's attention multiplies its logits by, None if it does not say: then ``d ** -0.5``."""
        attention = _part(block, self.attention)
        said = getattr(attention, "scale", getattr(attention, "scaling", None))
        return said if isinstance(said, float) else None

    def fits(self, block: nn.Module) -> bool:
        """Whether the block has all these parts and no others, and its attention takes the mask."""
        if not all(_has(block, path) for path in self.paths):
            return False
        known = {path.split(".")[0] for path in self.paths}
        own = [*block.named_children(), *block.named_parameters(recurse=False)]
        takes = inspect.signature(type(_part(block, self.attention)).forward).parameters
        return known.issuperset(name for name, _ in own) and self.mask in takes

    def attend(self, block: nn.Module, x: Any, bias: Any, options: dict[str, Any]) -> Any:
        """What the attention branch adds to ``x (B, N, C)``; ``bias`` None or broadcastable to ``(B, heads, N, N)``."""
        out = _part(block, self.attention)(_part(block, self.norm)(x), **{**options, self.mask: bias})
        return _through(block, self.after, out[0] if isinstance(out, tuple) else out)

    def feed(self, block: nn.Module, x: Any) -> Any:
        """What the MLP branch adds to ``x (B, N, C)``."""
        return _through(block, self.mlp, x)


def _through(block: nn.Module, paths: tuple[str, ...], x: Any) -> Any:
    """``x`` through modules; parameters scale it, and a part that is None does nothing."""
    for path in paths:
        part = _part(block, path)
        if part is not None:
            x = part(x) if isinstance(part, nn.Module) else part * x
    return x


def _part(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name)
    return block


def _has(block: nn.Module, path: str) -> bool:
    try:
        _part(block, path)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True)
class VitShape:
    """``width`` of a row, attention ``heads``, ``prefix``: protected rows in front, ``attention``: its implementation.

    ``cls``: whether the first of the protected rows is [CLS].
    """

    width: int
    heads: int
    prefix: int
    attention: str = "sdpa"
    cls: bool = True


@dataclass(frozen=True)
class Architecture:
    """A kind of vision transformer.

    ``model_types``: of its config in transformers; of other libraries the package and the class, ``timm.VisionTransformer``.
    ``blocks``: paths to the list of its blocks, the first that exists counts. ``layouts``: of a block, by version of the
    library. ``shape``: of a model. ``refused``: parts of names of classes whose outputs cannot be put back together.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    layouts: tuple[Layout, ...]
    shape: Callable[[Any], VitShape]
    refused: tuple[str, ...] = field(default=("Backbone", "MaskedImageModeling"))

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The model's blocks. Raises :class:`UnsupportedModelError` for a model that has none where they should be."""
        if any(part in type(model).__name__ for part in self.refused):
            raise UnsupportedModelError(
                f"{type(model).__name__} hands out the rows of blocks as a grid, which merged rows do not form; "
                f"allowed are models of {self.name} with one output behind the last block"
            )
        for path in self.blocks:
            try:
                return list(attrgetter(path)(model))
            except AttributeError:
                continue
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks of {self.name} at {', '.join(self.blocks)}")

    def layout_of(self, block: nn.Module) -> Layout:
        """Raises :class:`UnsupportedModelError` for a block with parts that no layout knows."""
        for layout in self.layouts:
            if layout.fits(block):
                return layout
        parts = ", ".join(name for name, _ in block.named_children())
        raise UnsupportedModelError(
            f"{type(block).__name__} of this {self.name} model has the parts {parts}, which is no known residual layout; "
            "a version of transformers that is not supported, or a model that was changed"
        )


# ------------------------------------------------------------------ registry

_architectures: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Makes an architecture known. Its model types must not be taken by another one."""
    for model_type in architecture.model_types:
        known = _architectures.get(model_type)
        if known is not None and known.name != architecture.name:
            raise VLPruneError(f"model type {model_type!r} is taken by the architecture {known.name!r}")
    _architectures.update(dict.fromkeys(architecture.model_types, architecture))
    return architecture


def architectures() -> list[Architecture]:
    return list({a.name: a for a in _architectures.values()}.values())


def architecture_of(model: Any) -> Architecture | None:
    """By the model type of the model's config, or by its class; None for one that is no known vision transformer."""
    names = [getattr(getattr(model, "config", None), "model_type", None)]
    names += [f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__]
    return next((_architectures[name] for name in names if name in _architectures), None)
