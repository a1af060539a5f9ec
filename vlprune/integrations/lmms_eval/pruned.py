"""A model of lmms-eval whose visual tokens are pruned."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from accelerate import PartialState
from lmms_eval.api.model import lmms
from loguru import logger

import vlprune
from vlprune import presets
from vlprune.api import chosen
from vlprune.method import make

UNPRUNED = "none"
ONEVISION = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


class Pruned(lmms):
    """Stands in front of a model class of lmms-eval: takes the method's arguments, lets that class load the model, prunes it.

    Arguments that the class has itself go there. Of the others ``method`` is a method's name, the JSON of
    ``Method.to_dict()``, or ``none`` for the model as it is; all that is left are the method's options, ``budget`` first.
    """

    pretrained_by_default: str | None = None

    def __init__(self, method: str | None = None, **arguments: Any) -> None:
        own = inspect.signature(super().__init__).parameters
        theirs = {name: value for name, value in arguments.items() if name in own}
        options = {name: value for name, value in arguments.items() if name not in own}
        # Before the weights are loaded, which takes minutes: an error in the method's options is known without them.
        self.method = _method(method, options)
        if self.pretrained_by_default:
            theirs.setdefault("pretrained", self.pretrained_by_default)
        if own["device_map"].default == "" and PartialState().num_processes == 1:
            # The default of LlavaHf, which transformers refuses. With several processes LlavaHf itself fills in the device.
            theirs["device_map"] = theirs.get("device_map") or theirs.get("device", own["device"].default)
        super().__init__(**theirs)
        if method is None:
            self.method = chosen(self.model, **options)  # pyright: ignore[reportAttributeAccessIssue]
        if self.method is not None:
            vlprune.apply(self.model, self.method)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers of the requests.

        Raises the errors that vlprune raises on purpose. Some of lmms-eval's models note an error and take an empty answer
        instead, and an evaluation of a setting that the model cannot have would end with a score.
        """
        with _errors_kept(self.model) as errors:  # pyright: ignore[reportAttributeAccessIssue]
            answers = super().generate_until(requests)
        if errors:
            raise errors[0]
        self._log_report()
        return answers

    def _log_report(self) -> None:
        """What the last request kept, so that a log shows that the model was pruned, and how far."""
        if self.method is None:
            return
        try:
            report = vlprune.report(self.model)  # pyright: ignore[reportAttributeAccessIssue]
        except vlprune.NotAppliedError:
            logger.warning("vlprune: no request had an image, so nothing was pruned")
        else:
            logger.info(f"vlprune, the last request with images:\n{report}")


@contextmanager
def _errors_kept(model: Any) -> Iterator[list[vlprune.VLPruneError]]:
    """Notes the errors of vlprune that leave ``model.generate``, whoever catches them outside."""
    errors: list[vlprune.VLPruneError] = []
    generate = model.generate

    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except vlprune.VLPruneError as error:
            errors.append(error)
            raise

    model.generate = noting
    try:
        yield errors
    finally:
        del model.generate


# ------------------------------------------------------------------ arguments


def _method(method: str | None, options: dict[str, Any]) -> vlprune.Method | None:
    """The method that ``--model_args`` name; None for the unpruned model."""
    if method == UNPRUNED:
        if options:
            raise vlprune.OptionError(f"method={UNPRUNED} is the model as it is; it takes no {', '.join(options)}")
        return None
    if method is None:
        # Which one it is the model decides; the budget is an option of all.
        return presets.preset(presets.PLAIN).make(**options)
    if method.startswith("{"):
        return make(_from_json(method), **options)
    known = vlprune.methods().get(method)
    hints = get_type_hints(known) if known else {}
    return make(method, **{name: _typed(value, hints.get(name)) for name, value in options.items()})


def _from_json(text: str) -> vlprune.Method:
    try:
        return vlprune.from_dict(json.loads(text))
    except (ValueError, KeyError) as error:
        raise vlprune.OptionError(f"method={text}: allowed is the JSON of a method's to_dict(): {error!r}") from error


def _typed(value: Any, kind: Any) -> Any:
    """What lmms-eval reads as a text or a float, as the list, None or negative integer that the method's field wants."""
    if isinstance(value, str) and value.startswith("["):
        return json.loads(value)
    kinds = set(get_args(kind) if isinstance(kind, types.UnionType) else [kind])
    if types.NoneType in kinds and str(value).lower() == "none":
        return None
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    return value
