"""What the demo's page says: answers, tables, notes, as HTML; everything that people or models wrote is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlprune.demos.answers import Answer

ROWS: tuple[tuple[str, str, float, str], ...] = (
    ("tokens", "visual tokens into the LLM", 1, "{:.0f}"),
    ("layer_tokens", "… mean over its layers", 1, "{:.0f}"),
    ("cached_tokens", "… left in the KV cache", 1, "{:.0f}"),
    ("prefill_ms", "prefill", 1, "{:.1f} ms"),
    ("decode_ms", "decoding, per token", 1, "{:.1f} ms"),
    ("flops", "arithmetic of the prefill", 1e-9, "{:.3g} GFLOPs"),
    ("cache_bytes", "KV cache", 2**-10, "{:.0f} KiB"),
    ("peak_bytes", "peak memory of the GPU", 2**-20, "{:.0f} MiB"),
)
"""Costs, what they are called, the factor to their unit, and how they are written."""
SLOWER = 1.05
"""A time or size is called worse from that ratio on: smaller differences of times are chance."""


def answers(names: Sequence[str], texts: Sequence[str | None], done: int) -> str:
    """A card for each way of answering; ``done`` of them have finished. None: not yet begun."""
    cards = []
    for place, (name, text) in enumerate(zip(names, texts, strict=True)):
        same = place > 0 and place < done and text == texts[0]
        mark = "<span class='vp-same'>same answer</span>" if same else ""
        if 0 < place < done and not same:
            mark = "<span class='vp-other'>another answer</span>"
        said = escape(text) if text else "<span class='vp-wait'>…</span>"
        said = "<i>(nothing)</i>" if text == "" and place < done else said
        who = f"<div class='vp-who'>{escape(name)}{mark}</div>"
        cards.append(f"<div class='vp-card vp-{place}'>{who}<div class='vp-said'>{said}</div></div>")
    return f"<div class='vp-cards'>{''.join(cards)}</div>"


def costs(names: Sequence[str], found: Sequence[Answer]) -> str:
    """The table of costs: the unpruned model's, then each other's with its ratio to them."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for key, label, factor, form in ROWS:
        values = [answer.costs.get(key) for answer in found]
        if all(value is None for value in values):
            continue
        cells = "".join(_cell(value, values[0], form, factor) for value in values)
        rows.append(f"<tr><th scope='row'>{label}</th>{cells}</tr>")
    return (
        f"<div class='vp-scroll'><table class='vp-table'><thead><tr><th></th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: float | None, unpruned: float | None, form: str, factor: float) -> str:
    if value is None:
        return "<td>–</td>"
    text = form.format(value * factor)
    if not unpruned or value is unpruned:
        return f"<td>{text}</td>"
    ratio = value / unpruned
    kind = "better" if ratio < 1 / SLOWER else "worse" if ratio > SLOWER else "even"
    bar = f"<span class='vp-bar'><span style='width: {min(ratio, 1):.0%}'></span></span>"
    return f"<td>{text}<span class='vp-ratio vp-{kind}'>{ratio:.0%}</span>{bar}</td>"


def note(text: str) -> str:
    return f"<p class='vp-note'>{text}</p>"


LEGEND = note(
    "<span class='vp-key vp-kept'></span>kept &ensp; <span class='vp-key vp-thumb'></span>kept in the thumbnail "
    "(half dark where in it alone) &ensp; <span class='vp-key vp-gone'></span>dropped. "
    "Drag the handle to compare with the image."
)
