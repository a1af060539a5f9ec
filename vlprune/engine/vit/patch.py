"""Installing a method into a vision transformer, and taking it out again without a trace."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.blocks import BlockMethod
from vlprune.engine.family import Family
from vlprune.engine.patch import ATTRIBUTE, acting_in, forget_compiled, patch_of, uninstall
from vlprune.engine.vit import check
from vlprune.engine.vit.architecture import Architecture, architecture_of, architectures, tower_of
from vlprune.engine.vit.blocks import STATE, BlockState, Tap, install, shadowed
from vlprune.engine.vit.blocks import uninstall as uninstall_block
from vlprune.engine.vit.layout import Layout
from vlprune.engine.vit.looking import look, look_away
from vlprune.engine.vit.report import VitReport
from vlprune.engine.vit.run import Run
from vlprune.errors import OptionError, UnsupportedMethodError, UnsupportedModelError
from vlprune.method import Method, methods


class VitPatch:
    """One method in one vision transformer: its blocks are of a subclass of their class, and a hook reads their keys."""

    def __init__(self, model: nn.Module, architecture: Architecture, method: Method, tower: nn.Module | None = None):
        if not isinstance(method, BlockMethod):
            raise UnsupportedMethodError(
                f"{method.name} prunes the visual tokens of a vision-language model, and {type(model).__name__} is a vision "
                f"transformer on its own; methods for those: {', '.join(methods('vit'))}"
            )
        self.model, self.architecture, self.method = model, architecture, method
        self.tower = tower_of(model) if tower is None else tower
        self.blocks = architecture.blocks_of(self.tower)
        layouts = [architecture.layout_of(block) for block in self.blocks]
        self.shape = architecture.shape(self.tower)
        self._check_whole()
        self._check_cls()
        self.run = Run(method, self.shape.prefix, len(self.blocks))
        self.states = [
            self._checked(index, block, layout) for index, (block, layout) in enumerate(zip(self.blocks, layouts, strict=True))
        ]
        self.handles: list[Any] = []

    def _checked(self, index: int, block: nn.Module, layout: Layout) -> BlockState:
        name = self.architecture.name
        state = BlockState(self.run, index, layout, self.shape, block)
        state.as_tuple = check.residuals(name, block, layout, self.shape)
        state.required = tuple(check.blank_options(block, layout))
        reads = () if layout.by_hand else self.method.reads
        if unread := [what for what in reads if layout.source(block, what) is None]:
            raise UnsupportedMethodError(
                f"{self.method.name} wants {' and '.join(unread)} of the blocks' attention, which {type(block).__name__} of "
                f"this {name} model does not hand out"
            )
        if self.method.proportional or self.method.adaptive or self.shape.padding:
            self._check_attention()
            check.proportional(name, block, layout, self.shape)
        return state

    def _check_whole(self) -> None:
        """Raises :class:`UnsupportedModelError` if a method is applied to a part of the model, or to what the model is in."""
        own = getattr(patch_of(self.model), "run", None)
        if any(STATE in block.__dict__ and block.__dict__[STATE].run is not own for block in self.blocks):
            raise UnsupportedModelError(
                f"a method is applied to a part of this {type(self.model).__name__}, or to a model that it is a part of; "
                "vlprune.remove it there first"
            )
        if any(map(shadowed, self.blocks)):
            raise UnsupportedModelError(
                f"somebody has replaced forward of blocks of this {type(self.model).__name__}; apply the method before that"
            )

    def _check_cls(self) -> None:
        if self.method.needs_cls and not (self.shape.prefix and self.shape.cls):
            others = [name for name, cls in methods("vit").items() if not getattr(cls, "needs_cls", False)]
            raise UnsupportedMethodError(
                f"{self.method.name} goes by the attention of [CLS], which {type(self.model).__name__} does not have; methods "
                f"that do without: {', '.join(others)}"
            )

    def _check_attention(self) -> None:
        implementation = self.shape.attention
        if "flash" in implementation or "flex" in implementation:
            raise UnsupportedModelError(
                f"the attention implementation {implementation} takes no weights of keys; load the model with "
                "attn_implementation='sdpa', or apply a method that merges with proportional=False"
            )

    @property
    def ran(self) -> bool:
        """Whether a forward has run."""
        return bool(self.run.rows)

    def report(self) -> VitReport:
        return VitReport.of(self)

    def assignment(self, block: int) -> tuple[Tensor, Tensor]:
        """What the rows behind a block stand for, see :func:`vlprune.assignment`."""
        if not -len(self.blocks) <= block < len(self.blocks):
            raise OptionError(f"block={block!r}: allowed are {-len(self.blocks)} to {len(self.blocks) - 1}")
        return self.run.assignment(block % len(self.blocks) + 1, next(self.tower.parameters()).device)

    def install(self) -> None:
        """Replaces a patch that is there already."""
        uninstall(self.model)
        self.model.__dict__[ATTRIBUTE] = self
        for block, state in zip(self.blocks, self.states, strict=True):
            for what in () if state.layout.by_hand else ("keys", *self.method.reads):
                source = state.layout.source(block, what)
                assert source is not None
                tap = Tap(self.run, state.index, what, third=source.endswith("qkv"))
                self.handles.append(block.get_submodule(source).register_forward_hook(tap))
            install(block, state)
        self.handles += look(self.run, self.architecture, self.tower)
        forget_compiled(self.model)

    def uninstall(self) -> None:
        for handle in self.handles:
            handle.remove()
        for block in self.blocks:
            uninstall_block(block)
        look_away(self.architecture, self.tower)
        self.model.__dict__.pop(ATTRIBUTE, None)
        forget_compiled(self.model)


def tower_patch(model: nn.Module, family: Family, method: Method) -> VitPatch:
    """``method`` in the vision encoder of a vision-language model; the language model gets as many features as ever.

    Raises :class:`UnsupportedModelError` for an encoder that is no known vision transformer.
    """
    tower = family.parts(model).vision
    architecture = architecture_of(tower)
    if architecture is None:
        known = ", ".join(known.name for known in architectures())
        raise UnsupportedModelError(
            f"{method.name} merges rows inside the vision encoder, and that of {family.name} ({type(tower).__name__}) is no "
            f"architecture that it knows; known are {known}. Methods for vision-language models that can prune this one: "
            f"{', '.join(acting_in(family.stages))}"
        )
    patch = VitPatch(model, architecture, method, tower)
    feature, blocks = getattr(model.config, "vision_feature_layer", None), len(patch.blocks)
    features = feature if isinstance(feature, (list, tuple)) else [-1 if feature is None else feature]
    patch.run.shown = frozenset(number if number >= 0 else blocks + 1 + number for number in features)
    return patch
