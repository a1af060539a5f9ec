"""What a report claims, against independent counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlprune
from tests import zoo


@dataclass(kw_only=True)
class FirstHalf(vlprune.Method):
    """Half of each tile leaves after vision block 1, and no computation chooses it."""

    adaptive: ClassVar[bool] = True
    name: ClassVar[str] = "first half"

    def encode_layers(self, layout: Any, shape: Any) -> tuple[int, ...]:
        return (1,)

    def encode(self, tokens: vlprune.VisionTokens) -> vlprune.Selection:
        tiles, count = tokens.patches.shape
        return vlprune.Selection(torch.arange(count // 2).expand(tiles, -1))


OPTIONS = {"snapkv": {"window": 1, "kernel": 1}}
"""A method's own computations are not reported, and a window of many tokens is much beside models as small as these."""


def counted(family: str, method: Any, scenario: dict[str, Any], **options: Any) -> tuple[vlprune.Report, float]:
    """What is reported of an eager run, and what torch counts in it: it counts nothing for the CPU's fused attention."""
    model = zoo.build(family, "eager")
    inputs = zoo.prompt(family, **scenario)
    with vlprune.applied(model, method, **OPTIONS.get(str(method), {}), **options), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model.model(**inputs)
        report = vlprune.report(model)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return report, counter.get_total_flops() - unneeded(by_module, inputs)


def unneeded(by_module: dict[str, int], inputs: dict[str, Any]) -> float:
    """FLOPs that are counted, and that the model would not need: they are reported of no run."""
    # A SigLIP tower may run its pooling head as well, whose output nobody uses.
    head = sum(count for name, count in by_module.items() if name.endswith(("vision_tower.head", "vision_model.head")))
    # Pixtral's convolution that makes patches runs over the padding of images, too.
    patches = sum(count for name, count in by_module.items() if name.endswith("patch_conv"))
    if not patches:
        return head
    images, _, height, width = inputs["pixel_values"].shape
    return head + patches * (1 - inputs["image_sizes"].prod(-1).sum().item() / (images * height * width))


def agrees(report: vlprune.Report, expected: float) -> None:
    assert report.flops == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("method", ["uniform", "resize", "fastv", "snapkv"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_flops_are_those_that_torch_counts(family: str, method: str):
    if (family, method) not in {(f, m) for f, m, _ in zoo.combinations()}:
        pytest.skip("the two do not go together")
    # A mask hides the images of a batch from each other in Pixtral, and all pairs are computed for that.
    scenarios = [zoo.SCENARIOS["single" if family == "mistral3" else "batch"]]
    if zoo.FAMILIES[family].video:
        scenarios.append(zoo.VIDEOS["videos and images"])
    for scenario in scenarios:
        report, expected = counted(family, method, scenario, budget=0.8)
        assert report.flops <= report.flops_unpruned
        agrees(report, expected)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f != "llava_onevision"])
def test_flops_where_the_encoder_drops(family: str):
    """Its later blocks, and projectors that take single tokens, get less to do. OneVision's has no such stage."""
    report, expected = counted(family, FirstHalf(), zoo.SCENARIOS["single"])
    assert report.flops < report.flops_unpruned
    agrees(report, expected)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_flops_of_a_budget_that_keeps_all(family: str):
    report, expected = counted(family, "uniform", zoo.SCENARIOS["single"], budget=1.0)
    assert report.flops == report.flops_unpruned
    agrees(report, expected)


@pytest.mark.parametrize("method", ["uniform", "fastv", "snapkv"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_cache_bytes_are_those_of_the_cache(family: str, method: str):
    model = zoo.build(family)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["single"])
    with vlprune.applied(model, method, budget=0.8, **OPTIONS.get(method, {})), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        report = vlprune.report(model)
    # A layer with a sliding window holds less than is reported, which takes no account of windows.
    full = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    held = sum(t.numel() * t.element_size() for layer in full for t in (layer.keys, layer.values))
    if len(full) == len(cache.layers):
        assert report.kv_bytes == held
        text = inputs["input_ids"].numel() - report.total
        entries = sum(layer.keys.shape[-2] for layer in cache.layers) / len(cache.layers)
        assert report.cached == pytest.approx(entries - text)
    assert report.kv_bytes < report.kv_bytes_unpruned


def test_a_report_says_what_was_kept_where():
    model = zoo.build("llava_next")
    with vlprune.applied(model, "uniform", budget=10):
        zoo.generate(model, zoo.prompt("llava_next", images=(1, 2), words=(4, 6)))
        report = vlprune.report(model)
    assert [image.tokens_out for image in report.images] == [10, 10, 10]
    assert (report.entering, report.leaving, report.layer_mean, report.cached) == (30, 30, 30.0, 30.0)
    for image in report.images:
        (stage,) = image.stages
        assert (stage.name, stage.layer, stage.tokens_in, stage.tokens_out) == ("select", None, image.total, 10)
        assert stage.seconds > 0
    assert json.loads(json.dumps(report.to_dict()))["images"][0]["kept"] == report.images[0].kept
    assert "10" in str(report)
