"""Installing a method into a model, and taking it out again without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlprune.engine.decoder import DecoderHooks
from vlprune.engine.encoder import EncoderHooks
from vlprune.engine.family import Family, Parts
from vlprune.engine.forward import Prefill
from vlprune.errors import UnsupportedMethodError, UnsupportedModelError
from vlprune.image import ModelShape
from vlprune.method import Method, methods
from vlprune.report import Report
from vlprune.signals import ClsAttention

ATTRIBUTE = "_vlprune"


class Patch:
    """One method in one model. Everything it adds is a hook of an object of its own, so copies of the model work too."""

    def __init__(self, model: nn.Module, family: Family, method: Method):
        self.model, self.method = model, method
        self.parts: Parts = family.parts(model)
        check(method, self.parts)
        self.encoder = EncoderHooks(model, self.parts, method)
        self.decoder = DecoderHooks(model, self.parts, method, self.encoder)
        self.handles: list[Any] = []

    @property
    def prefill(self) -> Prefill | None:
        return self.decoder.prefill

    @property
    def ran(self) -> bool:
        """Whether a forward with images has run."""
        return self.prefill is not None

    def report(self) -> Report:
        return Report.of(self)

    def install(self) -> None:
        """Replaces a patch that is there already."""
        uninstall(self.model)
        self.model.__dict__[ATTRIBUTE] = self
        self.handles = [*self.encoder.install(), *self.decoder.install()]
        forget_compiled(self.model)

    def uninstall(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.encoder.uninstall()
        self.decoder.uninstall()
        self.model.__dict__.pop(ATTRIBUTE, None)
        forget_compiled(self.model)


def patch_of(model: nn.Module) -> Any:
    """The patch in the model, of a vision-language model or of a vision transformer; None if there is none."""
    return model.__dict__.get(ATTRIBUTE)


def uninstall(model: nn.Module) -> bool:
    """Whether there was a patch to take out."""
    patch = patch_of(model)
    if patch is not None:
        patch.uninstall()
    return patch is not None


def check(method: Method, parts: Parts) -> None:
    """Raises :class:`UnsupportedMethodError` where ``method`` needs what the model does not have.

    Raises :class:`UnsupportedModelError` where no row may leave.
    """
    missing = [stage for stage in method.stages if stage not in parts.family.stages]
    if missing:
        raise UnsupportedMethodError(
            f"{method.name} acts in the stage {', '.join(missing)}, but {parts.family.name} is supported in "
            f"{', '.join(parts.family.stages)} only; methods that act there: {', '.join(acting_in(parts.family.stages))}"
        )
    implementation = parts.text.config._attn_implementation or ""
    if "flash" in implementation and "sliding_attention" in (getattr(parts.text.config, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"this model has sliding-window layers, and its attention implementation {implementation} counts the rows of "
            "a window, not positions, so rows must not leave; load it with attn_implementation='sdpa'"
        )
    for signal in method.wants(parts.shape):
        if isinstance(signal, ClsAttention) and not parts.has_cls:
            raise UnsupportedMethodError(
                f"{method.name} needs the attention of [CLS], but the vision encoder of this model "
                f"({parts.vision.config.model_type}) has no [CLS]; methods that do without: {', '.join(_without_cls())}"
            )
        tower, layers = signal.tower, len(parts.vision_layers if signal.tower == "vision" else parts.text_layers)
        if signal.layer is not None and not -layers <= signal.layer < layers:
            raise UnsupportedMethodError(
                f"{method.name} asks for {tower} layer {signal.layer}, but this model has layers 0 to {layers - 1} there"
            )


def acting_in(stages: Sequence[str]) -> list[str]:
    """Methods for vision-language models that act in no other stage and show the encoder no other image."""
    return [name for name, cls in methods().items() if set(cls().stages) <= set(stages) and not cls().resizes]


def _without_cls() -> list[str]:
    shape = ModelShape(24, 32, 22, has_cls=False)
    return [n for n, cls in methods().items() if not any(isinstance(s, ClsAttention) for s in cls().wants(shape))]


def forget_compiled(model: nn.Module) -> None:
    """Compiled code does not notice hooks that come or go later.

    There is some after ``generate()`` with a static cache, ``model.compile()`` and ``torch.compile(model)``.
    """
    if any(getattr(model, name, None) is not None for name in ("_compiled_call", "_compiled_call_impl", "_orig_mod")):
        torch.compiler.reset()
