"""What describes a vision transformer, and the registry of those that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlprune.engine.vit.layout import Layout, has_part, part_of
from vlprune.errors import UnsupportedModelError, VLPruneError


@dataclass(frozen=True)
class VitShape:
    """``width`` of a row, attention ``heads``, ``prefix``: protected rows in front, ``attention``: its implementation.

    ``cls``: whether the first of the protected rows is [CLS]. ``sequence_first``: whether blocks are given rows ``(N, B, C)``.
    ``padding``: whether images are padded to one number of patches, which blocks are told by their mask.
    """

    width: int
    heads: int
    prefix: int
    attention: str = "sdpa"
    cls: bool = True
    sequence_first: bool = False
    padding: bool = False


@dataclass(frozen=True)
class Architecture:
    """A kind of vision transformer.

    ``model_types``: of its config in transformers; of other libraries the package and the class, ``timm.VisionTransformer``.
    ``blocks``: paths to the list of its blocks, the first that exists counts. ``layouts``: of a block, by version of the
    library. ``shape``: of a model. ``grids``: parts of names of classes that make grids of what their blocks hand out.
    ``intermediates``: methods of the model that hand out rows between blocks.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    layouts: tuple[Layout, ...]
    shape: Callable[[Any], VitShape]
    grids: tuple[str, ...] = ("Backbone",)
    intermediates: tuple[str, ...] = ()

    def path_of(self, model: nn.Module) -> str:
        """Where the model's blocks are. Raises :class:`UnsupportedModelError` for a model that has none there."""
        for path in self.blocks:
            if has_part(model, path):
                return path
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks of {self.name} at {', '.join(self.blocks)}")

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.path_of(model)).children())

    def layout_of(self, block: nn.Module) -> Layout:
        """Raises :class:`UnsupportedModelError` for a block with parts that no layout knows."""
        for layout in self.layouts:
            if layout.fits(block):
                return layout
        parts = ", ".join(name for name, _ in block.named_children())
        raise UnsupportedModelError(
            f"{type(block).__name__} of this {self.name} model has the parts {parts}, which is no known residual layout; "
            "a version of its library that is not supported, or a model that was changed"
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
    """By the model type of its tower's config, or by its class; None for one that is no known vision transformer."""
    tower = tower_of(model)
    names = [getattr(getattr(tower, "config", None), "model_type", None), *_class_names(tower)]
    return next((_architectures[name] for name in names if name in _architectures), None)


_wrappers: dict[str, str] = {}


def register_wrapper(class_name: str, tower: str) -> None:
    """Makes a class known, ``open_clip.CLIP``, that holds a vision transformer at the path ``tower``."""
    _wrappers[class_name] = tower


def tower_of(model: Any) -> Any:
    """The vision transformer in a model that wraps it, or the model itself."""
    for name in _class_names(model):
        if name in _wrappers and has_part(model, _wrappers[name]):
            return tower_of(part_of(model, _wrappers[name]))
    return model


def _class_names(model: Any) -> list[str]:
    return [f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__]
