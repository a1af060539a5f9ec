"""DyVTE: a small router, trained for a model, says before each LLM layer whether visual tokens are needed any longer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.config import weights
from vlprune.errors import OptionError, UnsupportedMethodError
from vlprune.image import ImageLayout, LayerTokens, ModelShape
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.exit import everything, nothing


@register("dyvte")
@dataclass(kw_only=True)
class DyVTE(Method):
    """DyVTE: before each LLM layer a router looks at the text; once it says so, all tokens of an image leave.

    It sees two hidden states, one behind the other: the mean of text tokens behind the image, the last one left out, and
    the last one. Two linear maps without bias and a GELU between them give two numbers; tokens leave where the second is
    larger. When that is depends on the content: the host waits before each layer until they have left. ``budget`` is not
    looked at.

    ``router``: a safetensors file with the routers of a model, from :func:`vlprune.training.fit_exits`, or ``tinyvlm-dyvte``,
    which comes along.

    Deviations from the official code: several images and any batch, each image by the text behind it; without such text but
    the last token, that one stands for the mean. The router is asked before a layer, there after the one before.
    """

    paper: ClassVar[str] = "Wu et al., Accelerating MLLMs via Dynamic Visual-Token Exit, NeurIPS 2025, arXiv:2411.19628"
    adaptive = True

    router: str | None = None

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        layers = sorted(load(self._file()))
        if layers[-1] >= shape.text_layers:
            raise OptionError(f"router={self.router!r} is of an LLM of more than {layers[-1]} layers, not {shape.text_layers}")
        return Plan(layout.total, dict.fromkeys(layers, layout.total))

    def prefill(self, tokens: LayerTokens) -> Selection:
        maps = load(self._file(), tokens.hidden.device)[tokens.layer]
        state = text_state(tokens)
        if state.shape[0] != maps[0].shape[1]:
            raise OptionError(
                f"router={self.router!r} is of an LLM of {maps[0].shape[1] // 2} channels, not {state.shape[0] // 2}"
            )
        stay, leave = verdict(state, *maps).unbind(-1)
        return nothing(tokens) if bool(stay < leave) else everything(tokens)

    def _file(self) -> str:
        if self.router is None:
            raise UnsupportedMethodError(
                "dyvte needs a router that was trained for the model: vlprune.training.fit_exits(model, samples, file) trains "
                "one, DyVTE(router=file) takes it; VisualExit(layer=...) needs none"
            )
        return weights(self.router)


def text_state(tokens: LayerTokens) -> Tensor:
    """What a router sees ``(2 D,)`` float32: mean of the text behind the image but its last token, and the last token."""
    last = tokens.hidden[tokens.last].float()
    behind = ((tokens.text > tokens.visual[-1]) & (tokens.text < tokens.last))[:, None]
    total = (tokens.hidden[tokens.text].float() * behind).sum(0)
    mean = torch.where(behind.any(), total / behind.sum().clamp(min=1), last)
    return torch.cat([mean, last])


def verdict(state: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """``(..., 2)``: how much speaks for staying and for leaving, of ``state (..., 2 D)``."""
    return torch.nn.functional.gelu(state @ inner.T) @ outer.T


@lru_cache(maxsize=8)
def load(file: str, device: torch.device | None = None) -> dict[int, tuple[Tensor, Tensor]]:
    """LLM layer -> the maps ``(width, 2 D)`` and ``(2, width)`` of the router that is asked before it."""
    from safetensors.torch import load_file

    with torch.inference_mode(False):
        found = load_file(file, device=str(device or "cpu"))
    layers = sorted({int(name.split(".")[0]) for name in found})
    return {layer: (found[f"{layer}.inner"].float(), found[f"{layer}.outer"].float()) for layer in layers}
