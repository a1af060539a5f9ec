"""What holds for every method for vision transformers: by registering it joins."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from tests.vit import given
from tests.vit.models import PATCHES, PREFIX, build, images, outputs

METHODS: dict[str, Any] = {name: method for name, method in vlprune.methods("vit").items() if not hasattr(method, "heads")}
"""Those that need no trained heads."""
KNOWN = [name for name, method in METHODS.items() if not method().adaptive]
"""Those whose counts do not depend on the images."""
PAGES = Path(__file__).parents[2] / "docs" / "methods"


def bases(name):
    """Models to try: with [CLS], with registers, and without either where the method can do that."""
    return ["dinov2", "registers"] + ["siglip"] * (not METHODS[name].needs_cls)


@pytest.mark.parametrize("name", KNOWN)
def test_budgets_are_met_exactly(name):
    method = METHODS[name]
    for tokens, blocks, budget in itertools.product((36, 197, 576), (4, 12, 24), (0.45, 0.5, 0.77, 0.9, 1.0)):
        try:
            counts = method(budget=budget).counts(tokens, blocks)
        except vlprune.BudgetError:
            assert (blocks, budget) == (4, 0.45), "half of the rows in each of three blocks leaves more"
            continue
        assert sum(counts) == math.floor(round(budget * tokens * blocks, 6))
        assert all(0 < after <= before for before, after in itertools.pairwise([tokens, *counts]))


@pytest.mark.parametrize("name", METHODS)
def test_in_a_model(name):
    """Shapes stay; nothing to do is exactly nothing; an image alone is a row of a batch; nothing is left behind."""
    for base in bases(name):
        model, pixels = build(base), images(3)
        before = outputs(model, pixels)
        vlprune.apply(model, name, budget=1.0)
        assert all(map(torch.equal, outputs(model, pixels), before))
        vlprune.apply(model, name, budget=0.55)
        batch, report = outputs(model, pixels), vlprune.report(model)
        assert [part.shape for part in batch] == [part.shape for part in before]
        assert all(part.isfinite().all() for part in batch)
        assert not torch.equal(batch[0], before[0])
        assert report.layer_mean <= 0.55 * PATCHES
        if name in KNOWN:
            assert sum(report.counts) == math.floor(0.55 * PATCHES * 4)
        for image in report.assignment:
            assert image[: PREFIX[base]] == list(range(PREFIX[base]))
            assert {row for row in image if row >= 0} <= set(range(PREFIX[base] + report.counts[-1]))
        single = outputs(model, pixels[1:2])
        assert vlprune.report(model).assignment == report.assignment[1:2]
        for alone, row in zip(single, batch, strict=True):
            torch.testing.assert_close(alone, row[1:2], atol=1e-4, rtol=1e-4)
        vlprune.remove(model)
        assert all(map(torch.equal, outputs(model, pixels), before))


@pytest.mark.parametrize("name", KNOWN)
def test_compiled_without_graph_breaks(name):
    method, seen = METHODS[name](budget=0.6), given.tokens(17, leaving=4, block=1, blocks=4)

    def step(hidden, queries, keys, values, sizes):
        attention = replace(seen.read, queries=queries, keys=keys, values=values)
        tokens = replace(seen, hidden=hidden, keys=keys.mean(1), sizes=sizes, attention=attention)
        assigned = method.reduce(tokens)
        return assigned, *method.merge(tokens, assigned, tokens.count)

    parts = (seen.hidden, seen.read.queries, seen.read.keys, seen.read.values, seen.sizes)
    torch.compiler.reset()
    for got, part in zip(torch.compile(step, backend="eager", fullgraph=True)(*parts), step(*parts), strict=True):
        torch.testing.assert_close(got, part)


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_reach_all_parameters(name):
    model = vlprune.apply(build("vit"), name, budget=0.6)
    model(pixel_values=images()).last_hidden_state.square().mean().backward()
    gradients = [p.grad for path, p in model.named_parameters() if "pooler" not in path]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_written_down_read_back_and_documented(name):
    method = METHODS[name](budget=0.7)
    assert vlprune.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    page = (PAGES / f"{name}.md").read_text()
    for field in fields(method):
        assert f"`{field.name}`" in page, f"{name}: {field.name}"
    if method.paper:
        assert re.findall(r"\d{4}\.\d{5}", method.paper)[0] in page


def test_methods_by_cls_refuse_models_without():
    for name in (name for name, method in METHODS.items() if method.needs_cls):
        with pytest.raises(vlprune.UnsupportedMethodError, match=f"{name}.*CLS.*tome"):
            vlprune.apply(build("siglip"), name)
