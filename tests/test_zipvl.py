"""ZipVL's adaptive ratio: the fewest tokens that hold a share of the scores, whoever scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import vlprune
from tests import inside, zoo
from vlprune.image import ImageTokens
from vlprune.method import make
from vlprune.methods.zipvl import covering


def covering_by_hand(scores: list[float], mass: float) -> list[int]:
    """One after the other, the highest first, until they hold enough."""
    if not sum(scores):
        return list(range(len(scores)))
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if sum(scores[j] for j in kept) >= mass * sum(scores) * (1 - 1e-9):
            break
        kept.append(i)
    return sorted(kept)


@pytest.mark.parametrize("content", inside.CONTENTS)
def test_the_fewest_tokens_that_hold_the_mass(content):
    make = inside.CONTENTS[content][0]
    for n in (1, 2, 7, 50):
        scores = make(torch.Generator().manual_seed(n), n)
        for mass in (0.01, 0.5, 0.9, 0.975, 1.0):
            assert covering(scores, mass).tolist() == covering_by_hand(scores.double().tolist(), mass)


def test_what_is_no_number_counts_for_nothing():
    assert covering(torch.tensor([float("nan"), -3.0, 2.0, 1.0]), 0.5).tolist() == [2]
    assert covering(torch.tensor([float("nan"), -3.0]), 0.5).tolist() == [0, 1]
    assert covering(torch.tensor([1.0, float("inf"), 1.0]), 0.9).tolist() == [1]


@dataclass(kw_only=True)
class Loudness(vlprune.ScoreMethod):
    """Length of features."""

    def score(self, image: ImageTokens) -> Tensor:
        return image.features.norm(dim=-1)


def test_any_scorer_between_encoder_and_llm(monkeypatch):
    """Each image of a batch has a count of its own."""
    monkeypatch.setattr("vlprune.method._methods", dict(vlprune.methods()))
    vlprune.register("loudness")(Loudness)
    model, inputs = zoo.build("llava"), zoo.prompt("llava", images=(1, 2), words=(5, 5))
    features = zoo.image_features(model, inputs)
    states = getattr(features, "pooler_output", features)
    with vlprune.applied(model, "zipvl", scorer="loudness", mass=0.6), torch.no_grad():
        model(**inputs)
        images = inside.report(model).images
    for image, state in zip(images, states, strict=True):
        assert image.kept == covering_by_hand(state.double().norm(dim=-1).tolist(), 0.6)


@pytest.mark.parametrize(
    ("scorer", "layers"), [("fastv", [2]), ("pyramiddrop", [2, 4, 6]), ("transprune", [2, 3])], ids=lambda x: str(x)
)
def test_any_scorer_inside_the_llm(scorer, layers):
    """Where it drops, by its scores."""
    method, member = vlprune.ZipVL(scorer=scorer, mass=0.7), make(scorer)
    layout = inside.LAYOUTS["one tile"]()
    plan = method.plan(layout, inside.SHAPE)
    assert plan == vlprune.Plan(36, dict.fromkeys(layers, 36))
    for layer in layers:
        tokens = inside.before_layer(method, layout, layer, torch.arange(36))
        scores = member.score(replace(tokens, notes={})).double().tolist()  # pyright: ignore[reportAttributeAccessIssue]
        assert method.prefill(tokens).keep.tolist() == covering_by_hand(scores, 0.7)


def test_what_makes_no_sense():
    with pytest.raises(vlprune.OptionError, match="share above 0"):
        vlprune.ZipVL(mass=0.0)
    with pytest.raises(vlprune.UnsupportedMethodError, match="gives no scores"):
        vlprune.ZipVL(scorer="random")
    assert vlprune.from_dict(vlprune.ZipVL(options={"layer": 3}).to_dict()) == vlprune.ZipVL(options={"layer": 3})
