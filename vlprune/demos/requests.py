"""What people send: checked before a model sees it, and refused with a message that says what is wrong and what to do."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from vlprune.errors import VLPruneError
from vlprune.method import Method, make

UPLOAD = "10mb"
"""The largest file that is taken, as the server is told."""
PIXELS = 40_000_000
"""Width times height of the largest image that is taken."""
SIDE = 2048
"""Pixels of the longer side that is worked with: larger images are made smaller."""
LONGEST = 500
"""Characters of a question."""
UNPRUNED = "unpruned"


def image(path: str | None) -> Image.Image:
    """The image of an uploaded file, RGB, turned as its camera was."""
    if not path:
        raise VLPruneError("There is no image yet: upload one, or pick an example below.")
    try:
        with warnings.catch_warnings():
            # Its size is checked below, from its header, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(Path(path))
        width, height = opened.size
        if width * height > PIXELS:
            raise _too_large(width, height)
        # A JPEG is decoded at about the size that is needed.
        opened.draft("RGB", (SIDE, SIDE))
        opened = ImageOps.exif_transpose(opened).convert("RGB")
    except Image.DecompressionBombError:
        raise VLPruneError(f"This image is enormous; allowed are {PIXELS // 10**6} megapixels. Make it smaller.") from None
    except VLPruneError:
        raise
    except Exception as error:
        raise VLPruneError("This file cannot be read as an image. PNG, JPEG, WebP, GIF and BMP can.") from error
    if min(opened.size) < 8 or max(opened.size) > 20 * min(opened.size):
        raise VLPruneError(f"An image of {width} x {height} pixels is too thin to be looked at; crop it.")
    opened.thumbnail((SIDE, SIDE))
    return opened


def _too_large(width: int, height: int) -> VLPruneError:
    return VLPruneError(
        f"This image has {width} x {height} pixels, which is {width * height / 1e6:.0f} megapixels; "
        f"allowed are {PIXELS // 10**6}. Make it smaller."
    )


def question(text: str | None) -> str:
    text = (text or "").strip()
    if not text:
        raise VLPruneError("Ask a question first: the field is empty.")
    if len(text) > LONGEST:
        raise VLPruneError(f"This question has {len(text)} characters; allowed are {LONGEST}.")
    return text


def method(name: str, percent: float) -> Method | None:
    """The method at a budget of ``percent`` of an image's visual tokens; None for the unpruned model."""
    return None if name == UNPRUNED else make(name, budget=round(percent / 100, 4))


def label(name: str, percent: float) -> str:
    return name if name == UNPRUNED else f"{name}, {percent:g} %"
