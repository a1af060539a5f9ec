"""The page of changed answers shows what changed, and where tokens were kept."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlprune
from vlprune.evals import gallery, journal, kept
from vlprune.evals.benchmarks.base import Example
from vlprune.evals.journal import Row
from vlprune.evals.settings import Setting
from vlprune.report import ImageReport, StageReport

from . import small


def stage(name: str, layer: int | None, chosen: list) -> StageReport:
    return StageReport(name, layer, 0, 0, 0.0, chosen)


def test_levels_are_shares_of_layers_and_heads():
    """Token 3 never enters; 2 leaves before layer 2 of 4; of layer 3's two heads one forgets token 1; 0 stays everywhere."""
    stages = [stage("prefill", 2, [0, 1]), stage("evict", 3, [[0, 1], [0]]), stage("evict", 3, [0])]
    image = ImageReport(4, [0, 1, 2], stages)
    assert kept.levels(image, 4).tolist() == [15, round(15 * 3.5 / 4), round(15 / 2), 0]


@pytest.mark.parametrize("total", [0, 1, 2, 7, 2880])
def test_levels_survive_packing(total: int):
    levels = np.random.default_rng(0).integers(0, 16, total).astype(np.uint8)
    assert kept.unpack(kept.pack(levels), total).tolist() == levels.tolist()


def test_images_of_a_batch_find_their_samples():
    images = [{"total": count} for count in (5, 3, 2)]
    assert kept.by_sample(images, [5, 5]) == [images[:1], images[1:]]
    assert kept.by_sample(images, [5, 0, 5]) == [images[:1], [], images[1:]]
    assert kept.by_sample(images, [4, 6]) is None
    assert kept.by_sample(images, [5, 3]) is None


def test_rows_tell_which_tokens_were_kept(tmp_path: Path):
    """Those that the report of a forward names, at their places in thumbnail and crops."""
    model, processor = small.parts()
    rows = small.run(tmp_path, model=model, processor=processor, settings=[Setting("none"), Setting("hired", 24)])
    pruned = [row for row in rows if row["method"] == "hired"]
    assert all(row["kept"] is None for row in rows if row["method"] == "none")
    example = small.EXAMPLES[0]
    from vlprune.evals.answering import make_inputs

    with vlprune.applied(model, "hired", budget=24), torch.inference_mode():
        model(**make_inputs(model, processor, [example]))
        (image,) = vlprune.report(model).images
    (stored,) = pruned[0]["kept"]
    assert np.flatnonzero(kept.unpack(stored["levels"], 336)).tolist() == image.kept
    thumbnail, crops = gallery.maps_of(stored)
    assert (thumbnail.shape, crops.shape) == ((8, 8), (16, 16))
    assert (thumbnail > 0).sum() + (crops > 0).sum() == 24
    inside = [place for place in image.kept if place < 64]
    assert np.flatnonzero(thumbnail).tolist() == inside


def row(method: str, budget: float, prediction: str | None, score: float, **more) -> Row:
    told = {"id": "1", "category": "text", "question": "What <b>?", "answers": ["K7", "K7"], "benchmark": "own"}
    return told | {"method": method, "budget": budget, "prediction": prediction, "score": score, "error": None} | more


def test_the_page_shows_changes_only_the_worst_first():
    none = [row("none", 1.0, "K7", 1.0), row("none", 1.0, "yes", 1.0, id="2"), row("none", 1.0, "3", 0.0, id="3")]
    same = [row("hired", 0.2, "K7", 1.0), row("hired", 0.2, "yes", 1.0, id="2"), row("hired", 0.2, "4", 0.0, id="3")]
    worse = [row("pool", 0.2, "<script>", 0.0), row("pool", 0.2, None, 0.0, id="2", error="ValueError: no")]
    found = gallery.changes(none + same + worse)
    assert [[(one["id"], one["method"]) for one in sample] for sample in found] == [
        [("1", "none"), ("1", "pool")],
        [("2", "none"), ("2", "pool")],
        [("3", "none"), ("3", "hired")],
    ]
    page = gallery.page("A <model>", {"own": none + same + worse}, {}, 2)
    assert "2 of 3 samples" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "ValueError: no" in page
    assert "\ud800" not in gallery.page("", {"own": [*none, row("pool", 0.2, "\ud800", 0.0)]}, {}, 9)


def test_what_left_is_dark_on_the_image():
    example = Example("1", "text", "?", ("K7",), Image.new("RGB", (640, 320), "white"))
    levels = np.array([15, 0, 7, 15, 15, 15, 0, 0], dtype=np.uint8)
    image = {"total": 8, "levels": kept.pack(levels), "regions": [[0, 4, 2, 4]]}
    rows = [row("none", 1.0, "K7", 1.0), row("pool", 0.2, "no", 0.0, kept=[image])]
    page = gallery.page("", {"own": rows}, {"own": {"1": example}}, 9)
    shade = Image.open(io.BytesIO(base64.b64decode(re.findall(r"image/png;base64,([^']+)", page)[0])))
    assert shade.size == (4, 2)
    assert np.asarray(shade)[..., 1].tolist() == [[0, 215, 115, 0], [0, 0, 215, 215]]
    assert len(re.findall("image/jpeg", page)) == 2
    assert len(re.findall("aspect-ratio: 420 / 210", page)) == 2


def test_an_image_that_cannot_be_read_leaves_its_sample_on_the_page():
    rows = [row("none", 1.0, "K7", 1.0), row("pool", 0.2, "no", 0.0)]
    page = gallery.page("", {"own": rows}, {"own": {"1": Example("1", "", "?", (), b"no image")}}, 9)
    assert "What &lt;b&gt;?" in page
    assert "image/jpeg" not in page


def test_a_run_has_its_page(tmp_path: Path):
    from vlprune.evals import outputs
    from vlprune.evals.report import Run

    small.run(tmp_path, settings=[Setting("none"), Setting("resize", 0.1)])
    run = Run.read(tmp_path)
    changed = len(gallery.changes(journal.read_rows(tmp_path)))
    assert changed
    paths = outputs.write(run, run.summaries(), changes=2)
    assert paths[-1].name == "changes.html"
    page = paths[-1].read_text()
    assert f"{min(2, changed)} of {changed} samples" in page
    assert "image/jpeg" in page
