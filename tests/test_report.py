"""What a report claims, against independent counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlprune
from tests import zoo


@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("method", ["uniform", "resize"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_flops_are_those_that_torch_counts(family, method, budget):
    """Within 1 %, of an eager run: torch counts nothing for the CPU's fused attention."""
    model = zoo.build(family, "eager")
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    with vlprune.applied(model, method, budget=budget), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model.model(**inputs)
        report = vlprune.report(model)
    # The SigLIP tower runs its pooling head as well, whose output no LLaVA uses.
    unused = [m for m in model.modules() if type(m).__name__ == "SiglipMultiheadAttentionPoolingHead"]
    assert report.flops <= counter.get_total_flops()
    if not unused:
        assert report.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_cache_bytes_are_those_of_the_cache(family):
    model = zoo.build(family)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    with vlprune.applied(model, "uniform", budget=0.3), torch.no_grad():
        cache = model(**inputs).past_key_values
        report = vlprune.report(model)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert report.kv_bytes == held
    assert report.kv_bytes < report.kv_bytes_unpruned


def test_a_report_says_what_was_kept_where():
    model = zoo.build("llava_next")
    with vlprune.applied(model, "uniform", budget=10):
        zoo.generate(model, zoo.prompt("llava_next", images=(1, 2), words=(4, 6)))
        report = vlprune.report(model)
    assert [image.tokens_out for image in report.images] == [10, 10, 10]
    assert (report.entering, report.leaving, report.layer_mean) == (30, 30, 30.0)
    for image in report.images:
        (stage,) = image.stages
        assert (stage.name, stage.layer, stage.tokens_in, stage.tokens_out) == ("select", None, image.total, 10)
        assert stage.seconds > 0
    assert json.loads(json.dumps(report.to_dict()))["images"][0]["kept"] == report.images[0].kept
    assert "10" in str(report)
