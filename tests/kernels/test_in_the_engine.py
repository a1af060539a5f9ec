"""A pruned model whose hot path runs on the kernels says what it says on their references."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import vlprune
from tests import zoo
from tests.kernels.common import DEVICE, needs_triton
from vlprune.kernels import using
from vlprune.method import make

pytestmark = needs_triton

CASES = {
    "hired": ("llava_next", {"budget": 0.4}, {"attention_rows", "gather_rows"}),
    "divprune": ("llava", {"budget": 0.3}, {"farthest_points", "gather_rows"}),
    "pool": ("llava", {"budget": 0.3}, {"merge_rows", "gather_rows"}),
    "fastv": ("llava", {"budget": 0.6, "layer": 1}, {"attention_rows", "gather_rows"}),
    "snapkv": ("qwen2_5_vl", {"budget": 0.5, "window": 3, "kernel": 3}, {"attention_rows", "compact_cache"}),
    "mustdrop": ("llava", {"budget": 0.5}, {"attention_rows", "gather_rows", "compact_cache"}),
}


def generated(model: Any, inputs: dict[str, Any], cache: str) -> tuple[Any, list[list[int]]]:
    out = zoo.generate(model, inputs, 3, cache_implementation=cache)
    return out, [list(image.kept) for image in vlprune.report(model).images]


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, "dynamic") for name in CASES), ("snapkv", "static"), ("mustdrop", "static")]
)
def test_kernels_and_references_give_one_model(name, cache, monkeypatch):
    family, options, expected = CASES[name]
    model = zoo.build(family).to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in zoo.prompt(family, images=(1, 2), words=(7, 4)).items()}
    vlprune.apply(model, make(name, **options))
    with using("reference"):
        plain, kept = generated(model, inputs, cache)
    ran = launches(monkeypatch)
    with using("triton"):
        fast, kept_by_kernels = generated(model, inputs, cache)
    assert kept_by_kernels == kept
    assert torch.equal(plain.sequences, fast.sequences)
    torch.testing.assert_close(fast.raw, plain.raw, atol=2e-4, rtol=1e-4)
    assert {run.removesuffix("_") for run in ran} >= expected


def launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fills with the names of kernels that have run."""
    ran: set[str] = set()
    for name in ("attention_rows", "gather_rows", "farthest_points", "merge_rows", "compact_cache", "compact_cache_"):
        module = importlib.import_module(f"vlprune.kernels.{name.removesuffix('_')}.triton")
        function = "rounds" if name == "farthest_points" else name
        original = getattr(module, function)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            ran.add(name)
            return original(*args)

        monkeypatch.setattr(module, function, noted)
    return ran
