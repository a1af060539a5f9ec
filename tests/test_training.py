"""A pruned model trains: loss and gradients are those of the masked reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import vlprune
from tests import zoo
from tests.reference import hidden_positions, masked, pruned_and_masked

FAMILIES = ["llava", "llava_next"]


FIRST = 1
"""Nothing stands before the first word, so nothing predicts it."""


def batch(family: str, side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels: every word is to be learnt but those that follow a placeholder, which may be dropped."""
    inputs = zoo.prompt(family, (1, 2, 0), (7, 4, 9), dtype=torch.float64, side=side)
    labels = words(inputs)
    return inputs, labels.masked_fill((inputs["input_ids"] == zoo.IMAGE).roll(1, 1), -100)


def words(inputs: dict[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    return ids.masked_fill((ids == zoo.IMAGE) | (ids == zoo.PAD) | (ids == FIRST), -100)


def gradients(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """One backward pass; the loss counts as a gradient named ``loss``."""
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_masked_reference(family, side):
    """Of every parameter, those of the vision tower and the projector included."""
    model = zoo.build(family, dtype=torch.float64).train()
    inputs, labels = batch(family, side)
    pruned, expected = pruned_and_masked(model, inputs, lambda: gradients(model, inputs, labels))
    assert_equal(pruned, expected)
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name and gradient.any() for name, gradient in pruned.items())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_behind_a_dropped_token_is_learnt_from_the_last_kept_one(family, side):
    """As in a sequence that never had the dropped tokens."""
    model = zoo.build(family, dtype=torch.float64).train()
    inputs, _ = batch(family, side)
    labels = words(inputs)
    with vlprune.applied(model, "hired", budget=0.2):
        loss = model(**inputs, labels=labels).loss
        hidden = hidden_positions(inputs, vlprune.report(model))
    seen = inputs["attention_mask"].bool() & ~hidden
    with masked(model, inputs, hidden), torch.no_grad():
        logits = model(**inputs).logits
    losses = []
    for sample, kept in enumerate(seen):
        left, right = logits[sample, kept][:-1], labels[sample, kept][1:]
        losses.append(cross_entropy(left[right != -100], right[right != -100], reduction="none"))
    torch.testing.assert_close(loss.detach(), torch.cat(losses).mean(), check_dtype=False, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["pool", "resize", "random"])
def test_gradients_flow_through_merged_and_resized_features(method):
    """The projector learns through every way of dropping and merging."""
    model = zoo.build("llava_next", dtype=torch.float64).train()
    inputs, labels = batch("llava_next")
    with vlprune.applied(model, method, budget=0.4):
        found = gradients(model, inputs, labels)
    weight = found["model.multi_modal_projector.linear_1.weight"]
    assert weight.any()
    assert weight.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    """Layers that run a second time during backward find the rows of the first time."""
    inputs, labels = batch(family)
    model = zoo.build(family, dtype=torch.float64).train()
    with vlprune.applied(model, "hired", budget=0.4):
        expected = gradients(model, inputs, labels)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_equal(gradients(model, inputs, labels), expected)
        hidden = hidden_positions(inputs, vlprune.report(model))
    model.gradient_checkpointing_disable()
    with masked(model, inputs, hidden):
        assert_equal(gradients(model, inputs, labels), expected)


def test_two_forwards_before_the_backwards():
    """Gradient checkpointing with two losses in one graph: each layer is run again with the rows of its own forward."""
    model = zoo.build("llava", dtype=torch.float64).train()
    prompts = [zoo.prompt("llava", (1,), (n,), seed=n, dtype=torch.float64) for n in (4, 7)]
    ids = [p["input_ids"].masked_fill(p["input_ids"] == zoo.IMAGE, -100) for p in prompts]

    def total() -> Tensor:
        model.zero_grad()
        loss: Any = sum(model(**p, labels=i).loss for p, i in zip(prompts, ids, strict=True))
        loss.backward()
        return model.model.multi_modal_projector.linear_1.weight.grad.clone()

    with vlprune.applied(model, "hired", budget=0.4):
        expected = total()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.testing.assert_close(total(), expected, atol=1e-9, rtol=1e-6)


def test_a_step_of_training_lowers_the_loss():
    """An optimiser's steps on a pruned model work as ever."""
    model = zoo.build("llava").train()
    inputs, labels = batch("llava")
    inputs["pixel_values"] = inputs["pixel_values"].float()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with vlprune.applied(model, "hired", budget=0.4):
        for _ in range(4):
            optimiser.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
