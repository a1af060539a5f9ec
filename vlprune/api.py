"""apply, remove, applied, report, assignment.

The engine is imported by the first call: it takes longer than everything else together, and not every process that imports
vlprune prunes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from vlprune import presets
from vlprune.config import read
from vlprune.errors import NotAppliedError, OptionError, UnsupportedMethodError
from vlprune.method import Method, make
from vlprune.report import Report

if TYPE_CHECKING:
    from vlprune.engine.family import Family
    from vlprune.engine.patch import Patch
    from vlprune.engine.vit import VitPatch
    from vlprune.engine.vit.report import VitReport

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    method: str | Method | type[Method] | None = None,
    *,
    config: str | Path | None = None,
    preset: str | None = None,
    **options: Any,
) -> Model:
    """Prunes the visual tokens of ``model`` from now on; returns the same ``model``.

    Args:
        model: a vision-language model of transformers, see :func:`supported_models`, or a vision transformer on its own
            (ViT, CLIP, SigLIP, DINOv2); PEFT and compiled wrappers are looked through. A model that is pruned already gets
            the new method instead.
        method: a method's name, see :func:`vlprune.methods`, its class, or an object of it.
        config: in its place, a JSON file of a method's settings, as ``vlprune calibrate`` writes it, or the name of one that
            comes with vlprune: ``"tinyvlm-hired"``.
        preset: in its place, ``"quality"``, ``"balanced"`` or ``"fast"``: what measurements recommend for this kind of model,
            see :mod:`vlprune.presets`. Without any of the three: ``"balanced"``.
        **options: the method's knobs; ``budget`` is the one that all have, ``without_sinks=True`` one of all that choose
            inside the LLM, see :func:`vlprune.without_sinks`.

    Raises:
        UnsupportedModelError, UnsupportedMethodError, OptionError, BudgetError: the model is then as it was before.
    """
    from vlprune.engine.patch import forget_compiled

    inner = _unwrapped(model)
    _patch(inner, _named(method, config, preset), options).install()
    forget_compiled(model)
    return model


def remove(model: Model) -> Model:
    """Puts ``model`` back exactly as it was before :func:`apply`.

    Raises:
        NotAppliedError: there is nothing to remove.
    """
    from vlprune.engine.patch import forget_compiled, uninstall

    if not uninstall(_unwrapped(model)):
        raise NotAppliedError(f"no method is applied to this {type(model).__name__}; vlprune.apply(model) applies one")
    forget_compiled(model)
    return model


@contextmanager
def applied(model: Model, method: str | Method | type[Method] | None = None, **options: Any) -> Iterator[Model]:
    """``with applied(model, ...):`` prunes inside the block; a method applied before is back in place after it.

    Its arguments are those of :func:`apply`.
    """
    from vlprune.engine.patch import forget_compiled, patch_of, uninstall

    inner = _unwrapped(model)
    before = patch_of(inner) if isinstance(inner, nn.Module) else None
    apply(model, method, **options)
    try:
        yield model
    finally:
        uninstall(inner)
        if before is not None:
            _patch(inner, before.method, {}).install()
        forget_compiled(model)


def report(model: nn.Module) -> Report | VitReport:
    """What the last forward with images kept and saved.

    A :class:`Report` for a vision-language model, a :class:`VitReport` for a vision transformer on its own.

    Raises:
        NotAppliedError: no method is applied, or none has seen an image yet.
    """
    return _ran(model).report()


def assignment(model: nn.Module, block: int = -1) -> tuple[Tensor, Tensor]:
    """Which row behind a block of a vision transformer stands for each row of the image, in the last forward.

    With :func:`vlprune.unmerge`, rows that a hook on that block has seen become dense; with :func:`vlprune.merge`, dense
    features become as few. ``block``: from 0; negative ones are counted from the last.

    Returns:
        The assignment ``(B, N)`` int64, protected rows first, -1 for a row that was dropped; and ``(B, M)`` float32, the sizes
        of the rows behind the block: how many rows of the image each stands for, as the method weighs them; 0 for padding.

    Raises:
        NotAppliedError: no method is applied, or none has seen an image yet.
        UnsupportedMethodError: the method that is applied is none for vision transformers.
        OptionError: there is no such block.
    """
    from vlprune.engine.vit import VitPatch

    patch = _ran(model)
    if not isinstance(patch, VitPatch):
        raise UnsupportedMethodError(
            f"{patch.method.name} chooses visual tokens for a language model, and merges no rows inside of a vision "
            "transformer; vlprune.report(model) tells what it kept"
        )
    return patch.assignment(block)


def supported_models() -> list[Family]:
    """The model families that :func:`apply` takes."""
    import vlprune.integrations  # noqa: F401  (registers the built-in ones)
    from vlprune.engine.family import families

    return families()


def chosen(model: nn.Module, preset: str | None = None, **options: Any) -> Method:
    """The method that :func:`apply` takes where none is named."""
    from vlprune.engine.family import family_of
    from vlprune.engine.vit import architecture_of

    supported_models()
    model = _unwrapped(model)
    if architecture_of(model) is not None:
        kind = presets.VIT
    else:
        kind = presets.CLS if family_of(model).parts(model).has_cls else presets.PLAIN
    return presets.preset(kind, preset).make(**options)


def _ran(model: Any) -> Patch | VitPatch:
    """What is applied to the model, if it has seen an image."""
    from vlprune.engine.patch import patch_of

    patch = patch_of(_unwrapped(model))
    if patch is None:
        raise NotAppliedError(f"no method is applied to this {type(model).__name__}; vlprune.apply(model) applies one")
    if not patch.ran:
        raise NotAppliedError("this model has not seen an image since the method was applied; run it first")
    return patch


@dataclass(frozen=True)
class _Preset:
    """Stands for a method until the model is known."""

    name: str | None


def _named(
    method: str | Method | type[Method] | None, config: str | Path | None, preset: str | None
) -> str | Method | type[Method] | _Preset:
    """The one of the three that was given."""
    given = {"method": method, "config": config, "preset": preset}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)} each name a method; give one of them")
    if config is not None:
        return read(config)
    return _Preset(preset) if method is None else method


def _patch(model: Any, method: str | Method | type[Method] | _Preset, options: dict[str, Any]) -> Patch | VitPatch:
    from vlprune.blocks import BlockMethod
    from vlprune.engine.family import family_of
    from vlprune.engine.patch import Patch
    from vlprune.engine.vit import VitPatch, architecture_of, tower_patch

    supported_models()
    architecture = architecture_of(model)
    family = family_of(model) if architecture is None else None
    made = chosen(model, method.name, **options) if isinstance(method, _Preset) else make(method, **options)
    if architecture is not None:
        return VitPatch(model, architecture, made)
    assert family is not None
    return tower_patch(model, family, made) if isinstance(made, BlockMethod) else Patch(model, family, made)


def _unwrapped(model: Any) -> Any:
    """The transformers model inside of wrappers by torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model
