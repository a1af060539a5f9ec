"""Methods that merge rows, in the vision encoder of a vision-language model.

Merging changes features, so dropping does not equal masking here. What holds instead: the language model is handed what the
same encoder gives when it is patched alone, at every place, and all behind it is the model's own.
"""

from __future__ import annotations

import copy

import pytest
import torch

import vlprune
import vlprune.integrations  # registers families
from tests import zoo
from tests.media import features, pieces
from vlprune.engine.family import family_of

FAMILIES = ("llava", "llava_siglip", "llava_next", "llava_onevision", "internvl", "gemma3")


def joined(model, inputs):
    return torch.cat([piece.flatten(0, -2) for piece in pieces(features(model, inputs))])


def tower_of(model):
    return family_of(model).parts(model).vision


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_the_encoder_patched_alone(family):
    model = zoo.build(family)
    inputs = zoo.prompt(family, images=(1, 2), words=(4, 7))
    before, logits = joined(model, inputs), model(**inputs).logits
    vlprune.apply(tower_of(model), "tome", budget=0.6)
    alone = joined(model, inputs)
    vlprune.remove(tower_of(model))
    vlprune.apply(model, "tome", r=0)
    assert torch.equal(model(**inputs).logits, logits)
    vlprune.apply(model, "tome", budget=0.6)
    assert torch.equal(joined(model, inputs), alone)
    assert alone.shape == before.shape
    assert not torch.allclose(alone, before, atol=1e-3)
    report = vlprune.report(model)
    assert abs(report.layer_mean / report.total - 0.6) < 0.1
    tokens = zoo.generate(model, inputs).sequences
    copied = copy.deepcopy(model)
    vlprune.remove(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(zoo.generate(copied, inputs).sequences, tokens)
