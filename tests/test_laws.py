"""The laws of the library as matrices over all methods, models, attention implementations, batches and caches."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import vlprune
from tests import zoo
from tests.reference import dropped, masked

COMBINATIONS = zoo.combinations()
KNOWN = zoo.combinations(adaptive=False)
PROMPTED = [(*combination, scenario) for combination in COMBINATIONS for scenario in zoo.scenarios(combination[0])]
"""Combinations with the prompts that their families take."""
CACHED = [(*case, cache) for case in PROMPTED for cache in ("dynamic", "static") if cache in zoo.FAMILIES[case[0]].caches]
ATTENTIONS = ("sdpa", "eager")


SOME = 4
"""Families that a method meets at least where law 1 has shown all of them its selections."""


def times(cases: list[Any], *axes: tuple[Any, ...], families: int = len(zoo.FAMILIES)) -> list[Any]:
    """Every case with every combination of ``axes``, thinned out."""
    return zoo.thinned([(*case, *cell) for case in cases for cell in product(*axes)], families)


def test_thinned_matrices_meet_every_family_and_every_cell():
    """And nothing but what is in the matrix; the methods that stand for a way through the engine keep all of it."""
    whole = [(*case, attention) for case in CACHED for attention in ATTENTIONS]
    kept = zoo.thinned(whole)
    for name, options in zoo.method_cases():
        of, left = ([case for case in cases if case[1:3] == (name, options)] for cases in (whole, kept))
        assert all(case in of for case in left)
        assert {case[0] for case in left} == {case[0] for case in of}
        assert {case[3:] for case in left} == {case[3:] for case in of}
        assert len(left) == len(of) if zoo.whole(name, options) else len(left) <= len(of)


@pytest.mark.parametrize(("family", "method", "options", "scenario", "cache", "attention"), times(CACHED, ATTENTIONS))
def test_law_1_dropping_equals_masking(family, method, options, attention, scenario, cache):
    """Logits of every step within 1e-4 in float32, and the same greedy tokens."""
    model = zoo.build(family, attention)
    inputs = zoo.prompt(family, **zoo.scenarios(family)[scenario])
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    with vlprune.applied(model, method, budget=zoo.budget(method, 0.4), **options):
        pruned = zoo.generate(model, inputs, **extra)
        gone = dropped(model, inputs, vlprune.report(model))
        features = zoo.all_features(model, inputs)
    assert gone.any() == zoo.prunes(method, scenario)
    with masked(model, inputs, gone, features):
        expected = zoo.generate(model, inputs, **extra)
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "method", "options", "attention", "side"), times(COMBINATIONS, ATTENTIONS, ("left", "right"), families=SOME)
)
def test_law_1_in_a_plain_forward(family, method, options, attention, side):
    """Logits of every token that is neither padding nor dropped, under both paddings."""
    model = zoo.build(family, attention)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"], side=side)
    with vlprune.applied(model, method, budget=zoo.budget(method, 0.3), **options), torch.no_grad():
        pruned = model(**inputs).logits
        gone = dropped(model, inputs, vlprune.report(model))
        features = zoo.all_features(model, inputs)
    with masked(model, inputs, gone, features), torch.no_grad():
        expected = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~gone.reading[-1]
    assert pruned.shape == expected.shape
    torch.testing.assert_close(pruned[seen], expected[seen], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "method", "options", "scenario"), zoo.thinned(PROMPTED, SOME))
def test_law_2_nothing_to_do_is_exactly_nothing(family, method, options, scenario):
    """Budget 1.0, a prompt of text alone, and after remove(): bit-identical."""
    model = zoo.build(family)
    inputs = zoo.prompt(family, **zoo.scenarios(family)[scenario])
    text = zoo.prompt(family, images=(0, 0), words=(7, 4))
    expected, expected_text = zoo.generate(model, inputs), zoo.generate(model, text)
    if not vlprune.methods()[method](**options).adaptive:
        with vlprune.applied(model, method, **{**options, "budget": 1.0}):
            assert torch.equal(zoo.generate(model, inputs).raw, expected.raw)
    with vlprune.applied(model, method, **{**options, "budget": zoo.budget(method, 0.2)}):
        zoo.generate(model, inputs)
        assert torch.equal(zoo.generate(model, text).raw, expected_text.raw)
    assert torch.equal(zoo.generate(model, inputs).raw, expected.raw)


def snapshot(model: Any) -> list[Any]:
    """Everything that a patch could leave behind: attributes, classes and hooks of all modules, transformers' registries."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state: list[Any] = []
    for name, module in model.named_modules():
        # Qwen's models remember the positions of their last prompt.
        plain = {k: id(v) for k, v in module.__dict__.items() if not isinstance(v, dict) and k != "rope_deltas"}
        hooks = {k: dict(v) for k, v in module.__dict__.items() if "hooks" in k and isinstance(v, dict)}
        state.append((name, type(module), plain, hooks, sorted(module._modules)))
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        state.append((dict(registry._global_mapping), dict(registry._local_mapping)))
    state.append(vars(torch.nn.modules.module)["_global_forward_hooks"].copy())
    state.append({cls: set(vars(cls)) for cls in {type(m) for m in model.modules()}})
    state.append(model.config.to_dict())
    return state


@pytest.mark.parametrize(("family", "method", "options"), zoo.thinned(COMBINATIONS, SOME))
def test_law_2_nothing_is_left_behind(family, method, options):
    model = zoo.build(family)
    inputs = zoo.prompt(family)
    zoo.generate(model, inputs)
    before = snapshot(model)
    vlprune.apply(model, method, budget=zoo.budget(method, 0.3), **options)
    assert snapshot(model) != before
    zoo.generate(model, inputs)
    vlprune.remove(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "method", "options", "budget"), times(KNOWN, (0.05, 0.37, 0.9, 1, 7, 10_000)))
def test_law_4_budgets_are_met_exactly_and_known_before(family, method, options, budget):
    model = zoo.build(family)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    made = vlprune.methods()[method](budget=budget, **options)
    try:
        with vlprune.applied(model, made), torch.no_grad():
            model(**inputs)
            images, patch = vlprune.report(model).images, model._vlprune
    except vlprune.BudgetError:
        if not zoo.least(method):
            raise
        return
    plans = [made.plan(image.chosen.layout, patch.parts.shape) for image in patch.prefill.images]
    assert len(images) == len(plans) > 0
    for image, plan in zip(images, plans, strict=True):
        assert len(image.kept) == plan.entering
        assert ascending(image.kept, image.total)
        for stage in image.stages:
            heads = stage.kept if stage.kept and isinstance(stage.kept[0], list) else [stage.kept]
            planned = {"prefill": plan.prefill, "evict": plan.cached}.get(stage.name, {})
            assert {len(head) for head in heads} == {planned.get(stage.layer, stage.tokens_out)}
            assert all(ascending(head, image.total) for head in heads)


def ascending(kept: list[int], total: int) -> bool:
    return kept == sorted(set(kept)) and (not kept or (kept[0] >= 0 and kept[-1] < total))


@pytest.mark.parametrize(("family", "method", "options"), zoo.thinned(COMBINATIONS, SOME))
def test_batch_of_n_equals_n_batches_of_one(family, method, options):
    model = zoo.build(family, dtype=torch.float64)
    prompts = [zoo.prompt(family, images=(1,), words=(n,), seed=n, dtype=torch.float64) for n in (4, 7, 5)]
    longest = max(p["input_ids"].shape[1] for p in prompts)
    pad = lambda t: torch.nn.functional.pad(t, (longest - t.shape[1], 0), value=zoo.PAD)  # noqa: E731
    batch = {name: torch.cat([pad(p[name]) for p in prompts]) for name in prompts[0] if name in zoo.PER_TOKEN}
    for name in prompts[0].keys() - batch.keys():
        batch[name] = torch.cat([p[name] for p in prompts])
    with vlprune.applied(model, method, budget=zoo.least(method) or 9, **options):
        together = zoo.generate(model, batch)
        images = vlprune.report(model).images
        for i, single in enumerate(prompts):
            alone = zoo.generate(model, single)
            image = vlprune.report(model).images[0]
            assert image.kept == images[i].kept
            assert [stage.kept for stage in image.stages] == [stage.kept for stage in images[i].stages]
            torch.testing.assert_close(together.raw[i], alone.raw[0], atol=1e-9, rtol=0)
