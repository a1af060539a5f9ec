"""Draws docs/images/how-it-works.svg: where a token leaves, and the logical and the physical sequence.

Usage: ``python docs/site/diagram.py``. The example is that of docs/architecture.md.
"""

from __future__ import annotations

from pathlib import Path

INK, FAINT, TEXT, VISUAL, STAGE = "#1d2b30", "#c9d4d8", "#e9eef0", "#0f5c6e", "#d9622b"
PROMPT = "avvvvvbc"
"""One character a token: ``v`` is a visual one."""
ALIVE = {
    "logical, outside of the layers": range(8),
    "physical, layers 0 and 1": (0, 1, 4, 6, 7),
    "physical, from layer 2": (0, 1, 6, 7),
}
PARTS = [
    ("pixels", 84, None),
    ("vision encoder", 146, ("encode", "drop, merge")),
    ("projector", 104, None),
    ("prompt", 84, ("select", "drop, merge")),
    ("LLM layers", 130, ("prefill", "drop, merge")),
    ("KV cache", 110, ("evict", "drop, head by head")),
    ("text", 70, None),
]
WIDTH, GAP, TOP = 960, 26, 62


def main() -> None:
    shapes = [*_pipeline(), *_sequences(236)]
    page = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 470" font-family="system-ui, sans-serif">\n'
        "<title>Where a visual token leaves, and the logical and the physical sequence</title>\n"
        f'<rect width="{WIDTH}" height="470" rx="8" fill="#fff"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )
    (Path(__file__).parents[1] / "images" / "how-it-works.svg").write_text(page, encoding="utf-8")


def _text(x: float, y: float, text: str, colour: str = INK, size: int = 18, anchor: str = "middle", weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'
    )


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"{dash}/>'


def _arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    flat = y == to_y
    head = f"{to_x - 7},{y - 5} {to_x},{y} {to_x - 7},{y + 5}" if flat else f"{x - 5},{to_y + 7} {x},{to_y} {x + 5},{to_y + 7}"
    line = f'<path d="M{x} {y}L{to_x} {to_y}" stroke="{colour}" stroke-width="2"/>'
    return f'{line}<polygon points="{head}" fill="{colour}"/>'


def _pipeline() -> list[str]:
    """The parts of a model from left to right, the stages below those that they belong to."""
    shapes = [_text(30, 34, "Where a visual token may leave", size=20, anchor="start", weight=600)]
    x = (WIDTH - sum(width for _, width, _ in PARTS) - GAP * (len(PARTS) - 1)) / 2
    for place, (name, width, stage) in enumerate(PARTS):
        if place:
            shapes.append(_arrow(x - GAP + 3, TOP + 25, x - 3, TOP + 25, INK))
        shapes += [_box(x, TOP, width, 50, TEXT, FAINT), _text(x + width / 2, TOP + 30, name)]
        if stage:
            middle = x + width / 2
            shapes += [
                _arrow(middle, TOP + 90, middle, TOP + 56, STAGE),
                _text(middle, TOP + 109, stage[0], STAGE, 19, weight=600),
                _text(middle, TOP + 128, stage[1], size=15),
            ]
        x += width + GAP
    return shapes


def _sequences(top: float) -> list[str]:
    """A row of cells for each view of the prompt; what left is an outline."""
    shapes = [_text(30, top + 4, "Logical and physical: one prompt of eight tokens", size=20, anchor="start", weight=600)]
    left, cell, y = 320, 62, top + 26
    for name, alive in ALIVE.items():
        shapes.append(_text(left - 22, y + 26, name, anchor="end"))
        for place, kind in enumerate(PROMPT):
            x = left + place * cell
            here, visual = place in alive, kind == "v"
            fill = (VISUAL if visual else TEXT) if here else "none"
            shapes.append(_box(x, y, cell - 8, 40, fill, FAINT, dashed=not here))
            if here:
                shapes.append(_text(x + cell / 2 - 4, y + 26, f"{kind} {place}", "#fff" if visual else INK))
        y += 52
    note = "Numbers are positions: kept tokens keep theirs. generate() sees the first row, layers and caches what is alive."
    return [*shapes, _text(30, y + 22, note, size=16, anchor="start")]


if __name__ == "__main__":
    main()
