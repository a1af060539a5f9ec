"""Heads of the LLM that are inactive for images: no token takes anything of a visual one in them, and no visual one anything.

Attention goes on as it is, whatever kernel computes it: what is zero are the values of visual rows, when they are projected,
and what attention gives visual rows, in front of the output projection. So the softmax still counts visual tokens, which is
YOPO's mask behind it; and since values are zero in the cache, too, decoding needs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.devices import to_device
from vlprune.engine.family import Parts
from vlprune.errors import OptionError, UnsupportedMethodError
from vlprune.method import Method

VISUAL = "vlprune_visual"
"""The keyword argument by which a decoder layer hands its attention module which rows ``(B, n, 1)`` bool are visual."""


class InactiveHeads:
    """Hooks on one attention module, and on its projections of values and of the output.

    ``heads (kv_heads,)`` bool: heads of keys that are inactive, with all heads of queries that read them. ``visual``: the rows
    that are, while the module runs; None where there are no images. They come as an argument, since checkpointing runs the
    layer again, with the same arguments, when other forwards may have been.
    """

    def __init__(self, attention: nn.Module, values: nn.Module, output: nn.Module, heads: Tensor):
        self.attention, self.projections, self.heads = attention, (values, output), heads
        self.visual: Tensor | None = None

    def install(self) -> list[Any]:
        values, output = self.projections
        return [
            self.attention.register_forward_pre_hook(self.enter, with_kwargs=True),
            values.register_forward_hook(self.project),
            output.register_forward_pre_hook(self.give),
        ]

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.visual = kwargs.get(VISUAL)
        return args, {name: value for name, value in kwargs.items() if name != VISUAL}

    def project(self, module: nn.Module, args: tuple, values: Tensor) -> Tensor | None:
        """Values ``(B, n, kv_heads x head_dim)`` without those of visual rows."""
        return None if self.visual is None else self._silenced(values)

    def give(self, module: nn.Module, args: tuple) -> Any:
        """What attention gives ``(B, n, heads x head_dim)``, without what it gives visual rows."""
        return None if self.visual is None else (self._silenced(args[0]), *args[1:])

    def _silenced(self, rows: Tensor) -> Tensor:
        assert self.visual is not None
        self.heads = to_device(self.heads, rows.device)
        channels = self.heads.repeat_interleave(rows.shape[-1] // len(self.heads))
        return rows.masked_fill(self.visual.to(rows.device) & channels, 0.0)


def inactive(method: Method, parts: Parts) -> dict[int, InactiveHeads]:
    """LLM layer -> its hooks; raises :class:`OptionError` where ``method`` names heads that the model does not have."""
    config, found = parts.text.config, {}
    count = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for layer, heads in method.inactive_heads().items():
        if layer >= len(parts.text_layers) or max(heads) >= count:
            raise OptionError(
                f"{method.name}: inactive heads {list(heads)} of layer {layer}, but this model's LLM has layers 0 to "
                f"{len(parts.text_layers) - 1} and heads of keys 0 to {count - 1}"
            )
        found[layer] = InactiveHeads(parts.text_attention(layer), *_projections(method, parts, layer), _flags(heads, count))
    return found


def _flags(heads: Sequence[int], count: int) -> Tensor:
    return torch.tensor([head in heads for head in range(count)])


def _projections(method: Method, parts: Parts, layer: int) -> tuple[nn.Module, nn.Module]:
    attention, family = parts.text_attention(layer), parts.family
    try:
        return attention.get_submodule(family.text_values), attention.get_submodule(family.text_output)
    except AttributeError as error:
        raise UnsupportedMethodError(
            f"{method.name}: heads can be inactive where an attention module projects values and its output by modules "
            f"named {family.text_values} and {family.text_output}; {type(attention).__name__} does not"
        ) from error
