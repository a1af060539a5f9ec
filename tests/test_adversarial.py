"""Every method that there is, on images that are hard to choose from: a method joins by registering."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vlprune
from tests import inside, zoo
from tests.adversarial import CONTENTS, LAYOUTS, SHAPES, Answer, Journey
from vlprune.method import Merge, Method

BUDGETS = (1, 0.5, 10_000)


@pytest.fixture(scope="module")
def router(tmp_path_factory) -> str:
    """A router as wide as the hidden states made by hand."""
    file = tmp_path_factory.mktemp("router") / "router.safetensors"
    noise = torch.Generator().manual_seed(0)
    maps = {f"{layer}.inner": torch.randn(3, 2 * inside.WIDTH, generator=noise) for layer in (1, 4)}
    save_file(maps | {f"{layer}.outer": torch.randn(2, 3, generator=noise) for layer in (1, 4)}, file)
    return str(file)


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("llava", dtype=torch.float64)


def check(method: Method, answer: Answer, count: int | None) -> None:
    """Distinct indices in ascending order, as many as planned, and nothing but numbers."""
    keep = answer.selection.keep
    assert keep.dtype == torch.long
    assert (keep.diff(dim=-1) > 0).all()
    assert not keep.numel() or (keep.amin() >= 0 and keep.amax() < answer.rows)
    assert count is None or keep.shape[-1] == count
    merge = answer.selection.merge
    if isinstance(merge, Merge):
        assert merge.target.amin() >= -1
        assert merge.target.amax() < keep.shape[-1]


def planned(journey: Journey, answer: Answer) -> int | None:
    """How many rows the plan leaves where the method was asked; None where the content decides."""
    plan = journey.plan
    if journey.method.adaptive or answer.stage == "encode":
        return None
    if answer.stage == "select":
        return plan.entering
    assert answer.layer is not None
    return (plan.prefill if answer.stage == "prefill" else plan.cached)[answer.layer]


@pytest.mark.parametrize(("name", "options"), zoo.method_cases())
def test_a_method_keeps_its_count_whatever_it_sees(name, options, router):
    """Ties, zeros, constants, one dominant token, no numbers; one token, a budget above all; and the same when asked again."""
    if "router" in options:
        options = {**options, "router": router}
    asked = 0
    for layout, shape, budget in product([make() for make in LAYOUTS.values()], SHAPES.values(), BUDGETS):
        method = vlprune.methods()[name](budget=budget, **options)
        for content in CONTENTS:
            try:
                journey = Journey(method, layout, content, shape)
            except vlprune.BudgetError:
                assert {"prefill", "evict"} & set(method.stages)
                break
            answers = journey.run()
            for answer in answers:
                check(method, answer, planned(journey, answer))
                assert content == "no numbers" or all(t.isfinite().all() for t in (*answer.tensors(), answer.changed))
            asked += len(answers)
            if budget == 0.5:
                again = Journey(method, layout, content, shape).run()
                assert all(a.same(b) for a, b in zip(answers, again, strict=True))
            if budget == 10_000:
                assert method.adaptive or not answers
    assert asked or name == "none"


def hard_images() -> torch.Tensor:
    """Black, grey, one bright patch, two equal halves: ``(4, 3, 28, 28)``."""
    pixels = torch.zeros(4, 3, 28, 28, dtype=torch.float64)
    pixels[1], pixels[2, :, 7:14, 14:21] = 0.5, 8.0
    half = torch.randn(3, 28, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels[3] = torch.cat([half, half], 2)
    return pixels


@pytest.mark.parametrize(("name", "options"), zoo.method_cases())
def test_a_hard_image_is_chosen_from_in_a_batch_as_alone(name, options, model):
    inputs = zoo.prompt("llava", images=(1,) * 4, words=(5,) * 4) | {"pixel_values": hard_images()}
    with vlprune.applied(model, name, budget=zoo.least(name) or 5, **options), torch.no_grad():
        model(**inputs)
        together = vlprune.report(model).images
        for i, image in enumerate(together):
            model(**{key: value[i : i + 1] for key, value in inputs.items()})
            (alone,) = vlprune.report(model).images
            assert [stage.kept for stage in image.stages] == [stage.kept for stage in alone.stages]
            assert image.kept == alone.kept
