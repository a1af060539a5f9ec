"""A page of samples whose answer pruning changed: what was asked and answered, and which tokens were kept, on the image.

One HTML file without scripts that refers to nothing outside. A token is as bright as the share of the LLM's layers whose
cache held it once the prompt had been read, see :mod:`vlprune.evals.kept`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from vlprune.evals.benchmarks.base import Example
from vlprune.evals.journal import Row, label_of
from vlprune.evals.kept import TOP, unpack
from vlprune.evals.settings import UNPRUNED
from vlprune.visualize.drawing import shade

SIDE = 420
"""Pixels of an image's longer side on the page."""
MOST_TEXT = 600
"""Characters of a question or an answer that are shown."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1a1a1a; }
section { border-top: 1px solid #ccc; padding: 1rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 15rem; }
figcaption { overflow-wrap: anywhere; }
.view { position: relative; background-size: 100% 100%; background-color: #eee; margin-bottom: .3rem; }
.view img { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
.right { color: #00695c; } .wrong { color: #b3261e; } .quiet { color: #666; }
"""


def page(title: str, rows: Mapping[str, Sequence[Row]], examples: Mapping[str, Mapping[str, Example]], most: int) -> str:
    """The page: of each benchmark up to ``most`` samples, those with a change from right to wrong first."""
    parts = [f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1><p>{LEGEND}</p>")
    for name, of_benchmark in rows.items():
        found = changes(of_benchmark)
        parts.append(f"<h2>{escape(name)}: {min(most, len(found))} of {len(found)} samples with another answer</h2>")
        for sample in found[:most]:
            parts.append(_section(sample, examples.get(name, {}).get(sample[0]["id"])))
    return "\n".join([*parts, "</html>"])


LEGEND = (
    "Samples that at least one method answers otherwise than the unpruned model; only those methods are shown. "
    "Dark: tokens that were left out; half dark: left out in some layers only."
)


def changes(rows: Sequence[Row]) -> list[list[Row]]:
    """For each sample with a changed answer: the unpruned row, then the rows that differ from it; the worst changes first."""
    unpruned = {row["id"]: row for row in rows if row["method"] == UNPRUNED}
    found = {key: [row] for key, row in unpruned.items()}
    for row in rows:
        if row["id"] in found and row["prediction"] != unpruned[row["id"]]["prediction"]:
            found[row["id"]].append(row)
    changed = [sample for sample in found.values() if len(sample) > 1]
    return sorted(changed, key=lambda sample: -max(abs(row["score"] - sample[0]["score"]) for row in sample))


def _section(sample: list[Row], example: Example | None) -> str:
    first = sample[0]
    answers = ", ".join(dict.fromkeys(map(str, first["answers"])))
    head = (
        f"<p><b>{_text(first['question'])}</b><br><span class='quiet'>{_text(first['id'])}, {_text(first['category'] or '')}, "
    )
    head += f"expected: {_text(answers)}</span></p>"
    picture = _picture(example)
    figures = "".join(_figure(row, picture) for row in sample)
    return f"<section>{head}<div class='row'>{figures}</div></section>"


def _figure(row: Row, picture: Image.Image | None) -> str:
    verdict = "right" if row["score"] >= 0.5 else "wrong"
    said = _text(row["error"] or row["prediction"] or "(nothing)")
    caption = f"{_text(label_of(row))}: <span class='{verdict}'>{said}</span> <span class='quiet'>{row['score']:.2f}</span>"
    return f"<figure>{''.join(_views(row.get('kept'), picture))}<figcaption>{caption}</figcaption></figure>"


# ------------------------------------------------------------------ images


def _views(kept: Sequence[Mapping[str, Any]] | None, picture: Image.Image | None) -> list[str]:
    """The image under each map of tokens; maps alone where they do not show all of the image."""
    if kept is None:
        return [_view(picture, None)] if picture else []
    maps = [levels for image in kept for levels in maps_of(image)]
    # With more than two maps each is a tile, and it is not known here which part of the image it shows.
    whole = picture if len(maps) <= 2 and len(kept) == 1 else None
    return [_view(whole, levels) for levels in maps]


def maps_of(image: Mapping[str, Any]) -> list[np.ndarray]:
    """Levels ``(rows, columns)`` of the regions of an image."""
    levels = unpack(image["levels"], image["total"])
    return [
        levels[first + stride * np.arange(rows)[:, None] + np.arange(columns)]
        for first, stride, rows, columns in image["regions"]
    ]


def _view(picture: Image.Image | None, levels: np.ndarray | None) -> str:
    if picture is not None:
        width, height = picture.size
    else:
        height, width = levels.shape if levels is not None else (1, 1)
    style = f"aspect-ratio: {width} / {height};"
    if picture is not None:
        style += f" background-image: url({_encoded(picture, 'JPEG')});"
    dark = f"<img alt='kept tokens' src='{_encoded(shade(levels / TOP), 'PNG')}'>" if levels is not None else ""
    return f"<div class='view' style='{style}'>{dark}</div>"


def _picture(example: Example | None) -> Image.Image | None:
    """None where there is no image, or one that cannot be read, which the sample's answer tells."""
    try:
        if example is None:
            return None
        picture = example.image
        picture.thumbnail((SIDE, SIDE))
        return picture
    except Exception:
        return None


def _encoded(picture: Image.Image, kind: str) -> str:
    content = io.BytesIO()
    picture.save(content, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def _text(text: str) -> str:
    shown = text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}… ({len(text)} characters)"
    # Half of a surrogate pair, as a model may produce it, has no UTF-8.
    return escape(shown.encode("utf-8", "backslashreplace").decode("utf-8"))
