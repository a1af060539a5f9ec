"""``vlprune bench vit``: every variant of the same rounds, next to the unpatched model; tables and a picture of the rows."""

from __future__ import annotations

import pytest
import torch

from vlprune.bench import jobs, journal, plot, publish, suite, vit, vit_report


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "vit.csv"
    plan = vit.VitPlan(suite.variants_of("tome,evit", "0.5,0.05"), batch=2, rounds=3)
    for _ in range(2):  # the second time nothing is missing but what failed
        sink = jobs.Sink(path, vit.COLUMNS, torch.device("cpu"), resume=True)
        vit.measure(vit.SIZES["tiny"], plan, sink, torch.float32, lambda text: None)
    return journal.read(path)


def test_rows_say_what_was_measured_and_what_could_not_be(rows):
    latest = {(row["method"], row["budget"], row["repeat"]): row for row in rows}
    assert set(latest) == {
        ("none", "1.0", 0),
        ("none", "1.0", 1),
        *((method, budget, 0) for method in ("tome", "evit") for budget in ("0.5", "0.05")),
    }
    for method in ("tome", "evit"):
        assert "BudgetError" in latest[method, "0.05", 0]["error"]
        row = latest[method, "0.5", 0]
        assert (row["tokens"], row["layer_mean"], row["rounds"]) == (64, 32, 3)
        assert 1.3 < row["arithmetic_speedup"] < 2.0
        assert 0 < row["reduction_ms"] < row["forward_ms_p80"]
        assert row["images_per_s"] == pytest.approx(2000 / row["forward_ms_p50"], rel=1e-4)
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    none = latest["none", "1.0", 0]
    assert (none["speedup"], none["arithmetic_speedup"], none["layer_mean"]) == (1, 1, 64)
    assert none["parameters"] == sum(p.numel() for p in vit.SIZES["tiny"].build("cpu", torch.float32).parameters())
    assert len([row for row in rows if row["method"] == "tome" and row["budget"] == "0.5"]) == 1


def test_published_sizes_are_those_of_their_models():
    for name, parameters in (("vit-b/16", 86), ("vit-l/14-336", 304)):
        with torch.device("meta"):
            made = vit.SIZES[name].build("meta", torch.float32)
        # ViT's pooler, a further matrix, stands behind the blocks.
        found = sum(p.numel() for path, p in made.named_parameters() if "pooler" not in path) / 1e6
        assert found == pytest.approx(parameters, abs=0.6)


def test_tables_and_pictures(rows, tmp_path):
    page = vit_report.page(rows)
    assert "tiny, float32, batch 2" in page
    assert "- tome 0.05: BudgetError" in page
    assert "| evit | 0.5 | 32 |" in page
    path = tmp_path / "vit.csv"
    for row in rows:
        journal.append(path, vit.COLUMNS, row)
    assert [(draw, len(found)) for draw, found in publish.pictures([path])] == [(vit_report.draw, len(rows))]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "speed.md").write_text(f"Before {publish.BEGIN} old {publish.END} after")
    written = publish.publish(tmp_path, tmp_path / "docs")
    assert [str(one.relative_to(tmp_path / "docs")) for one in written] == [
        "results/speed-vit.md",
        "images/speed/vit.png",
        "speed.md",
    ]
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert text.startswith("Before")
    assert text.endswith("after")
    assert "Vision transformer, tiny" in text
    assert plot.draw([], tmp_path) == []
