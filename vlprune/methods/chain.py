"""Several methods, one behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlprune.errors import OptionError
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens
from vlprune.method import STAGES, Method, Plan, Selection
from vlprune.signals import Signal


def chain(*methods: Method) -> Method:
    """One method out of several, each of which sees the visual tokens that those before it have left.

    >>> chain(HiRED(budget=192), FastV(layer=2, budget=96), SnapKV(budget=0.5))

    The first may choose before the LLM (``encode``, ``select``), the last may evict; between them any number may drop before
    LLM layers, each before layers of its own. A budget that is a fraction is one of the tokens that reach the method.

    Raises :class:`OptionError` for an order in which they cannot stand.
    """
    return Chain(methods=methods)


@dataclass(kw_only=True)
class Chain(Method):
    """See :func:`chain`. ``budget`` has no meaning of its own."""

    name = "chain"
    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or not all(isinstance(member, Method) for member in self.methods):
            raise OptionError(f"chain() takes objects of methods, such as vlprune.HiRED(budget=0.2), not {self.methods!r}")
        for member in self.methods[1:]:
            if {"encode", "select"} & set(member.stages):
                raise OptionError(f"{member.name} chooses what enters the LLM, so it stands first in a chain")
        for member in self.methods[:-1]:
            if "evict" in member.stages:
                raise OptionError(f"{member.name} evicts what the prompt has left in the cache, so it stands last in a chain")

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(stage for stage in STAGES if any(stage in member.stages for member in self.methods))

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(member.adaptive for member in self.methods)

    @property
    def every(self) -> int | None:
        return self.methods[-1].every

    @property
    def waits(self) -> bool:
        return self.methods[-1].waits

    def left(self, count: int, new_tokens: int) -> int:
        return self.methods[-1].left(count, new_tokens)

    @property
    def resizes(self) -> bool:
        return self.methods[0].resizes

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(signal for member in self.methods for signal in member.wants(shape)))

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        plans = self._plans(layout, shape)
        merged = {layer: count for plan in plans for layer, count in plan.prefill.items()}
        if len(merged) < sum(len(plan.prefill) for plan in plans):
            raise OptionError(f"two methods of the chain drop before the same LLM layer: {[list(p.prefill) for p in plans]}")
        if list(merged) != sorted(merged):
            raise OptionError(f"the methods of a chain stand in the order of their LLM layers, not {list(merged)}")
        return Plan(plans[0].entering, merged, plans[-1].cached)

    def _plans(self, layout: ImageLayout, shape: ModelShape) -> list[Plan]:
        """The plan of each method, made for what those before it leave."""
        plans: list[Plan] = []
        for member in self.methods:
            plans.append(member.plan(layout, shape))
            layout = replace(layout, total=plans[-1].at_layers(shape.text_layers)[-1])
        return plans

    def encode_layers(self, layout: ImageLayout, shape: ModelShape) -> Sequence[int]:
        return self.methods[0].encode_layers(layout, shape)

    def encode(self, tokens: VisionTokens) -> Selection | None:
        return self.methods[0].encode(tokens)

    def select(self, image: ImageTokens) -> Selection:
        return self.methods[0].select(image)

    def encoder_grid(self, layout: ImageLayout) -> tuple[int, int]:
        return self.methods[0].encoder_grid(layout)

    def prefill(self, tokens: LayerTokens) -> Selection:
        plans = self._plans(tokens.layout, tokens.shape)
        owner = next(m for m, plan in zip(self.methods, plans, strict=True) if tokens.layer in plan.prefill)
        return owner.prefill(tokens)

    def evict(self, tokens: CacheTokens) -> Selection:
        return self.methods[-1].evict(tokens)

    def inactive_heads(self) -> Mapping[int, Sequence[int]]:
        found: dict[int, set[int]] = {}
        for member in self.methods:
            for layer, heads in member.inactive_heads().items():
                found.setdefault(layer, set()).update(heads)
        return {layer: sorted(heads) for layer, heads in found.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "methods": [member.to_dict() for member in self.methods]}
