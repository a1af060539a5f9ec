"""A method for vision transformers inside of a vision-language model: applied to its image tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from tests import zoo
from vlprune.integrations.llava import single

METHODS: dict[str, Any] = {name: method for name, method in vlprune.methods("vit").items() if not hasattr(method, "heads")}


def fits(name, tower):
    return not METHODS[name].needs_cls or "Siglip" not in type(tower).__name__


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
def test_the_tower_computes_fewer_rows_and_the_language_model_sees_as_many(family):
    """A budget of 1.0 gives identical bits, another one the same shapes; removed, all is as it was."""
    model, inputs = zoo.build(family), zoo.prompt(family)
    tower = model.model.vision_tower
    before = model(**inputs).logits
    for name in METHODS:
        if not fits(name, tower):
            with pytest.raises(vlprune.UnsupportedMethodError, match="CLS"):
                vlprune.apply(tower, name)
            continue
        with vlprune.applied(tower, name, budget=1.0):
            assert torch.equal(model(**inputs).logits, before), name
        with vlprune.applied(tower, name, budget=0.7):
            after = model(**inputs).logits
            assert vlprune.report(tower).layer_mean <= 0.7 * vlprune.report(tower).total
        with vlprune.applied(model, name, budget=0.7):
            assert torch.equal(model(**inputs).logits, after), f"{name} is the same through the whole model"
        assert after.shape == before.shape
        assert after.isfinite().all()
        assert not torch.equal(after, before), name
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_method_behind_the_encoder_goes_by_what_the_tower_gives():
    """DivPrune behind a tower that merges keeps what DivPrune keeps of that tower's features, as generation goes."""
    model, inputs = zoo.build("llava"), zoo.prompt("llava")
    tower = model.model.vision_tower
    with vlprune.applied(tower, "pitome", budget=0.7):
        features = model.get_image_features(inputs["pixel_values"])
        features = getattr(features, "pooler_output", features)
        with vlprune.applied(model, "divprune", budget=6):
            answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            kept = vlprune.report(model).images[0].kept
    chosen = vlprune.DivPrune(budget=6)
    image = vlprune.ImageTokens(features[0], single(4), 6)
    assert chosen.select(image).keep.tolist() == kept
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_a_method_that_looks_into_the_encoder_is_refused_while_the_tower_merges():
    model, inputs = zoo.build("llava"), zoo.prompt("llava")
    tower = model.model.vision_tower
    vlprune.apply(tower, "tome", budget=0.7)
    for name in ("fastervlm", "flowcut"):
        vlprune.apply(model, name, budget=0.5)
        with pytest.raises(vlprune.UnsupportedMethodError, match=f"{name} looks into.*tome.*divprune"):
            model(**inputs)
    vlprune.remove(tower)
    model(**inputs)
    assert len(vlprune.report(model).images[0].kept) == 8
