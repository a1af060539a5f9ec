"""Settings of methods from JSON files, those that ``vlprune calibrate`` wrote and those that come along; trained weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.method import Method, from_dict

FOLDER = Path(__file__).parent / "configs"
"""For TinyVLM and its sibling: calibrated settings (``MODEL-METHOD.json``), trained weights (``MODEL-METHOD.safetensors``)."""


def shipped() -> list[str]:
    """Names that :func:`read` takes beside paths."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def trained(model: str, method: str) -> str | None:
    """Name of the weights of ``method`` that come with vlprune for ``model`` ("tinyvlm"); None where there are none."""
    name = f"{model}-{method}"
    return name if name in _weights() else None


def weights(name: str) -> str:
    """The file of weights that come with vlprune under ``name``; anything else is a path."""
    return str(_weights().get(name, name))


@cache
def _weights() -> dict[str, Path]:
    return {path.stem: path for path in FOLDER.glob("*.safetensors")}


def read(config: str | Path) -> Method:
    """The method of a JSON file, or of a name in :func:`shipped`.

    The file holds what ``Method.to_dict()`` gives, alone or, beside what else there is to tell, under ``settings``.

    Raises:
        OptionError: there is no such file or name, or it holds something else.
    """
    path = FOLDER / f"{config}.json" if str(config) in shipped() else Path(config)
    if not path.is_file():
        raise OptionError(f"config={str(config)!r}: no such file; those that come with vlprune: {', '.join(shipped())}")
    try:
        data: Any = json.loads(path.read_text())
        settings = data.get("settings", data)
        if not isinstance(settings.get("method"), str):
            raise OptionError(f"config={str(config)!r} names no method; allowed is the JSON of a method's to_dict()")
    except (ValueError, AttributeError) as error:
        raise OptionError(f"config={str(config)!r} is no JSON of a method's settings: {error}") from error
    return from_dict(settings)
