"""Nobody waits for the device: tensors without values, of which none can be asked for one, are chosen from, too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlprune
from tests import zoo
from tests.between import LAYOUTS, SHAPES, image
from tests.inside import before_layer
from vlprune.image import ImageTokens, LayerTokens


def nowhere(values: dict) -> dict:
    return {name: value.to("meta") for name, value in values.items()}


def without_values(img: ImageTokens) -> ImageTokens:
    return replace(img, features=img.features.to("meta"), signals=nowhere(img.signals))


def layer_without_values(tokens: LayerTokens) -> LayerTokens:
    text = tokens.text.to("meta")
    return replace(
        tokens,
        hidden=tokens.hidden.to("meta"),
        visual=tokens.visual.to("meta"),
        positions=tokens.positions.to("meta"),
        signals=nowhere(tokens.signals),
        find_text=lambda: text,
    )


def choosing() -> list[str]:
    return [
        name
        for name, method in vlprune.methods().items()
        if {"encode", "select"} & set(method().stages) == {"select"} and not method().resizes
    ]


@pytest.mark.parametrize("name", choosing())
def test_between_encoder_and_llm(name):
    for layout in (LAYOUTS["padded above and below"](), LAYOUTS["frames of a video"]()):
        for shape in SHAPES.values():
            method = vlprune.methods()[name](budget=0.4)
            if method.plan(layout, shape).entering < layout.total:
                img = image(method, layout, shape=shape)
                keep = method.select(without_values(img)).keep
                assert keep.shape == (img.count,)
                assert keep.device.type == "meta"


def test_where_text_meets_the_image():
    for make in LAYOUTS.values():
        method, layout = vlprune.CDPruner(budget=0.3), make()
        if layout.total > 1:
            tokens = before_layer(method, layout, 0, torch.arange(layout.total))
            keep = method.prefill(layer_without_values(tokens)).keep
            assert keep.shape == (tokens.count,)


def test_autocast_of_the_model_does_not_reach_the_methods():
    """What a method computes of float32 features is float32, so it chooses the same."""
    seen = []

    class Probe(vlprune.Method):
        name = "probe"

        def select(self, image: ImageTokens) -> vlprune.Selection:
            seen.append((image.features.float() @ image.features.float().T).dtype)
            return vlprune.Selection(torch.arange(image.count))

        def prefill(self, tokens: LayerTokens) -> vlprune.Selection:
            seen.append((tokens.hidden.float() @ tokens.hidden.float().T).dtype)
            return vlprune.Selection(torch.arange(tokens.count))

        def plan(self, layout, shape):
            return vlprune.Plan(self.count(layout.total), {1: 1})

    model = zoo.build("llava")
    with vlprune.applied(model, Probe(budget=4)), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**zoo.prompt("llava"))
    assert seen == [torch.float32] * 2
