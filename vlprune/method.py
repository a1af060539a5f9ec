"""The contract of a method, and the registry of methods."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, overload

from torch import Tensor

from vlprune import budget as budgets
from vlprune.errors import OptionError, UnsupportedMethodError, VLPruneError
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens
from vlprune.knobs import Draw
from vlprune.signals import Signal

STAGES = ("encode", "select", "prefill", "evict")


@dataclass(frozen=True, eq=False)
class Merge:
    """How rows are merged into kept ones.

    ``target (N,)`` int64: which entry of ``Selection.keep`` a row adds to, -1 for none (a kept row names itself if it is
    to take part). ``weight (N,)`` or None for equal weights. A kept row becomes the weighted mean of the rows that name it.
    In the vision encoder both have a leading dimension ``tiles``, in the cache they may have one of ``kv_heads``.
    """

    target: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mixture:
    """How kept rows become sums of rows, each of which may be part of several.

    ``weight (T, N)`` float32: entry ``i`` of ``Selection.keep`` becomes the sum of ``weight[i, j]`` times row ``j``, so a row
    that is to stay as it is has the weight 1 for itself and 0 elsewhere. In the vision encoder it has a leading dimension
    ``tiles``. Where a row is part of one other only, :class:`Merge` needs less memory.
    """

    weight: Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """``keep`` int64, ascending: which of the rows that the method was shown stay.

    ``(tiles, T)`` for ``encode``, ``(T,)`` for the other stages; ``evict`` may also give ``(kv_heads, T)``, a choice a head.
    """

    keep: Tensor
    merge: Merge | Mixture | None = None


@dataclass(frozen=True)
class Plan:
    """How many visual tokens of an image are where; known before its pixels are seen, unless the method is adaptive.

    ``entering``: tokens that enter the LLM. ``prefill``: LLM layer -> tokens from that layer on, ascending layers.
    ``cached``: LLM layer -> entries left in that layer's cache by ``evict``; a layer that is not named keeps all.
    Adaptive methods give upper bounds.
    """

    entering: int
    prefill: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def at_layers(self, layers: int) -> list[int]:
        """Visual tokens in each of the LLM's ``layers``."""
        counts, now = [], self.entering
        for layer in range(layers):
            now = self.prefill.get(layer, now)
            counts.append(now)
        return counts


@dataclass(kw_only=True)
class Method:
    """A way to choose visual tokens: a dataclass whose fields are its knobs.

    Subclasses implement one or more of ``encode``, ``select``, ``prefill`` and ``evict``; they may ask for signals with
    ``needs``. Class attributes describe the method: ``adaptive`` says that its counts depend on the image's content, ``paper``
    where it is from, ``serves`` whether it is for vision-language models (``"vlm"``), vision transformers on their own
    (``"vit"``), or both. Both ``needs`` and ``adaptive`` may be properties.
    """

    budget: budgets.Budget = 1.0
    """Visual tokens of an image (int), or that fraction of them (float): those that enter the LLM, or, for a method that drops
    inside the LLM, the mean over its layers, or, for a method that only evicts, those left in the cache."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[Signal, ...]] = ()
    adaptive: ClassVar[bool] = False
    serves: ClassVar[tuple[str, ...]] = ("vlm",)

    def __post_init__(self) -> None:
        budgets.check(self.budget)

    @property
    def stages(self) -> tuple[str, ...]:
        """The hooks that the method implements."""
        return tuple(stage for stage in STAGES if getattr(type(self), stage) is not getattr(Method, stage))

    @property
    def resizes(self) -> bool:
        """Whether the method has the encoder see images at other sizes."""
        return type(self).encoder_grid is not Method.encoder_grid

    @property
    def every(self) -> int | None:
        """``evict`` is asked again each time so many tokens have been generated; None: only after the prompt."""
        return None

    @property
    def waits(self) -> bool:
        """Whether ``evict`` is asked only when all layers have run: they then see what belongs to each of the layers."""
        return False

    def left(self, count: int, new_tokens: int) -> int:
        """How many entries of ``count``, which the plan leaves in a cache, are left once ``new_tokens`` have been generated.

        For methods that are asked ``every`` so many tokens.
        """
        return count

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        """The signals that the method needs of a model of this shape: ``needs`` unless overridden."""
        return self.needs

    def count(self, total: int) -> int:
        """How many of ``total`` visual tokens the budget allows. Known before the pixels are seen."""
        return budgets.tokens(self.budget, total)

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        """Counts of one image. Unless overridden the budget's tokens enter the LLM; without ``encode`` and ``select``, all."""
        early = {"encode", "select"} & set(self.stages)
        return Plan(self.count(layout.total) if early else layout.total)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        """Options that ``vlprune calibrate`` may try on a model of this shape, each one drawn; none: nothing to calibrate.

        What is drawn must leave the budget as it is: it says how tokens are chosen, or where they leave, not how many.
        """
        return {}

    def encode_layers(self, layout: ImageLayout, shape: ModelShape) -> Sequence[int]:
        """Blocks of the vision encoder after which ``encode`` is asked about an image; none if nothing is to be done."""
        return ()

    def encode(self, tokens: VisionTokens) -> Selection | None:
        """Chooses the rows of one image that go on into the next block of the vision encoder; None: all of them."""
        raise NotImplementedError(f"{type(self).__name__} has no encode()")

    def select(self, image: ImageTokens) -> Selection:
        """Chooses ``image.count`` of one image's visual tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no select()")

    def prefill(self, tokens: LayerTokens) -> Selection:
        """Chooses ``tokens.count`` of one image's visual tokens that go on into LLM layer ``tokens.layer``.

        Asked before the layers that the plan names, while a prompt is read.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prefill()")

    def evict(self, tokens: CacheTokens) -> Selection:
        """Chooses ``tokens.count`` of one image's entries that stay in the cache of layer ``tokens.layer``."""
        raise NotImplementedError(f"{type(self).__name__} has no evict()")

    def encoder_grid(self, layout: ImageLayout) -> tuple[int, int]:
        """Patch rows and columns at which the vision encoder sees each tile; the layout's own grid unless overridden."""
        return layout.grid

    def inactive_heads(self) -> Mapping[int, Sequence[int]]:
        """LLM layer -> heads of keys, and with them the heads that read them, in which visual tokens count for nothing."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The method's name and knobs, ready for JSON; :func:`from_dict` reads it back."""
        return {"method": self.name, **dataclasses.asdict(self)}


@dataclass(kw_only=True)
class ScoreMethod(Method):
    """A method that scores every visual token and keeps the best ones."""

    def score(self, image: ImageTokens) -> Tensor:
        """Scores ``(N,)`` of the image's run of placeholders; higher is better."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def select(self, image: ImageTokens) -> Selection:
        from vlprune.image import top

        return Selection(top(self.score(image), image.count).sort().values)


# ------------------------------------------------------------------ registry

_methods: dict[str, type[Method]] = {}
_found_entry_points = False
M = TypeVar("M", bound=type[Method])


@overload
def register(name: str) -> Callable[[M], M]: ...
@overload
def register(name: M) -> M: ...
def register(name: Any) -> Any:
    """Class decorator that makes a method known: ``@register("name")``, or ``@register`` for the lower-cased class name."""
    if isinstance(name, type):
        return _add(name.__name__.lower(), name)
    return lambda cls: _add(name, cls)


def _add(name: str, cls: type[Method]) -> type[Method]:
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise VLPruneError(f"{cls!r} is not a subclass of vlprune.Method, so it cannot be registered as a method")
    if not re.fullmatch(r"[a-z][a-z0-9_+-]*", name):
        raise VLPruneError(f"method name {name!r}: allowed are lower-case letters, digits, '_', '+' and '-', a letter first")
    known = _methods.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise VLPruneError(f"the method name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another one")
    cls.name = name
    _methods[name] = cls
    return cls


def methods(serving: str = "vlm") -> dict[str, type[Method]]:
    """Registered methods by name, those of installed packages (entry point group ``vlprune.methods``) included.

    ``serving``: those for vision-language models (``"vlm"``), or those for vision transformers on their own (``"vit"``).
    """
    return {name: cls for name, cls in _all_methods().items() if serving in cls.serves}


def _all_methods() -> dict[str, type[Method]]:
    global _found_entry_points
    import vlprune.methods.builtin  # noqa: F401  (registers the built-in ones)

    if not _found_entry_points:
        _found_entry_points = True
        for entry in entry_points(group="vlprune.methods"):
            loaded = entry.load()
            if isinstance(loaded, type) and not loaded.__dict__.get("name"):
                _add(entry.name, loaded)
    return dict(sorted(_methods.items()))


def make(method: str | Method | type[Method], **options: Any) -> Method:
    """A method from its name or class and options; an object is taken as it is, with ``options`` changed in a copy.

    ``without_sinks=True`` is an option of every method that chooses inside the LLM: see :func:`vlprune.without_sinks`.
    """
    if "without_sinks" in options:
        return _without_sinks(options.pop("without_sinks"), make(method, **options))
    if isinstance(method, str):
        known = _all_methods()
        if method not in known:
            near = difflib.get_close_matches(method.lower(), known, n=1, cutoff=0.4)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise UnsupportedMethodError(f"unknown method {method!r}{meant} Known methods: {', '.join(known)}")
        method = known[method]
    if not isinstance(method, Method) and not (isinstance(method, type) and issubclass(method, Method)):
        raise UnsupportedMethodError(f"method={method!r}: allowed are a method's name, a Method class, an object of one")
    _check_options(method if isinstance(method, type) else type(method), options)
    if isinstance(method, Method):
        return dataclasses.replace(method, **options) if options else method
    return method(**options)


def _without_sinks(wanted: Any, method: Method) -> Method:
    from vlprune.methods.sinks import without_sinks

    if not isinstance(wanted, bool):
        raise OptionError(f"without_sinks={wanted!r}: allowed are True and False; vlprune.without_sinks() has a threshold")
    return without_sinks(method) if wanted else method


def from_dict(data: dict[str, Any]) -> Method:
    """The inverse of :meth:`Method.to_dict`."""
    options = dict(data)
    if options["method"] == "chain":
        from vlprune.methods.chain import chain

        return chain(*map(from_dict, options["methods"]))
    if options["method"] == "without-sinks":
        from vlprune.methods.sinks import without_sinks

        (wrapped,) = options.pop("methods")
        return without_sinks(from_dict(wrapped), options["threshold"], options["channels"])
    return make(options.pop("method"), **options)


def _check_options(cls: type[Method], options: dict[str, Any]) -> None:
    allowed: Sequence[str] = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"{cls.name or cls.__name__} has no option {option!r}{meant} Its options: {', '.join(allowed)}")
