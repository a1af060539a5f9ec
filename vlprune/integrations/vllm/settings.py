"""Which method a server is to prune with, and whether vLLM can give what it needs. Runs without vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from vlprune.errors import OptionError, UnsupportedMethodError, VLPruneError
from vlprune.integrations.vllm.tower import Tower
from vlprune.method import Method, from_dict, methods
from vlprune.signals import ClsAttention, ClsValues, GlobalAttention, Keys, MeanAttention, ReceivedAttention, Values

KEY = "vlprune"
VARIABLE = "VLPRUNE_VLLM"
EXAMPLE = '{"method": "hired", "budget": 0.2}'
MEASURED = (ClsAttention, ClsValues, GlobalAttention, Keys, MeanAttention, ReceivedAttention, Values)
"""Signals that can be computed from what vLLM's vision encoders give their attention kernels."""


def configured(additional: Any) -> Method | None:
    """The method that ``--additional-config`` or else the environment names, in the form of ``Method.to_dict()``.

    None if neither does.
    """
    if isinstance(additional, Mapping) and KEY in additional:
        return _method(f"--additional-config, key {KEY!r}", additional[KEY])
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{VARIABLE}={text!r} is no JSON ({error}); write {EXAMPLE}") from error
    return _method(VARIABLE, given)


def _method(source: str, given: Any) -> Method:
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise OptionError(f"{source}: {given!r} names no method; write {EXAMPLE}")
    try:
        return from_dict(dict(given))
    except VLPruneError as error:
        raise type(error)(f"{source}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{source}: {given!r} is no method's to_dict() ({error!r}); write {EXAMPLE}") from error


def check(method: Method, tower: Tower) -> None:
    """Raises :class:`UnsupportedMethodError` where ``method`` cannot choose from what vLLM can give it."""
    reason = _unserved(method)
    if reason:
        served = [name for name, known in methods().items() if not _unserved(known())]
        raise UnsupportedMethodError(f"{method.name} {reason}. Methods that vLLM can serve with: {', '.join(served)}")
    for signal in method.wants(tower.shape):
        if not isinstance(signal, MEASURED) or signal.layer is None:
            raise UnsupportedMethodError(f"{method.name} needs {signal}, which cannot be measured in vLLM's vision encoders")
        if isinstance(signal, ClsAttention) and not tower.parts.has_cls:
            raise UnsupportedMethodError(
                f"{method.name} needs the attention of [CLS], which this vision encoder does not have"
            )
        layers, layer = tower.shape.vision_layers, signal.layer
        if not 0 <= (layer if layer >= 0 else layers + layer) < tower.built:
            raise UnsupportedMethodError(
                f"{method.name} needs vision block {layer}, but of {layers} vLLM builds the first {tower.built}: "
                "those that the projector's features come from"
            )


def _unserved(method: Method) -> str:
    """Why vLLM cannot serve with a method, whatever the model; empty if it can."""
    if method.stages != ("select",):
        return f"acts in {', '.join(method.stages)}, but in vLLM tokens can only be chosen between encoder and LLM (select)"
    if method.resizes:
        return "shows the encoder another image, while vLLM's encoders see the processor's"
    if method.adaptive:
        return "keeps a number of tokens that depends on the image, while vLLM must know it before the encoder has run"
    return ""
