"""YOPO: inactive heads against a mask behind an eager softmax, and the calibration that finds them against its definition."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import vlprune
from tests import flash, inside, zoo
from tests.reference import dropped, masked, text_layers
from tests.test_laws import snapshot
from vlprune import calibrate, cli, shell
from vlprune.calibrate.yopo import inactive, ratios
from vlprune.engine import heads as inactive_heads
from vlprune.engine.family import family_of
from vlprune.engine.patch import patch_of
from vlprune.evals.settings import Setting

HEADS = ((0, 1), (1, 0), (1, 1), (2, 0))
"""Of four layers with two heads of keys each. In layer 1 nobody reads an image."""


@contextmanager
def behind_the_softmax(model: Any, inputs: dict[str, Tensor], heads: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Inside the block weights of visual tokens are zero in ``heads``, and so is what visual tokens get there.

    Of an unpatched model with eager attention, in its dtype, a head of queries after the other.
    """
    visual = (inputs["input_ids"] == zoo.IMAGE) | (inputs["input_ids"] == zoo.VIDEO)
    modules = {layer.self_attn: index for index, layer in enumerate(text_layers(model))}
    seen = dict.fromkeys(modules, 0)
    table = inspect.unwrap(type(next(iter(modules))).forward).__globals__
    original = table["eager_attention_forward"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        if module not in modules:
            return original(module, query, key, value, attention_mask, **options)
        mask = attention_mask
        prompt = query.shape[2] == visual.shape[1]
        seen[module] = query.shape[2] if prompt else seen[module] + query.shape[2]
        columns = torch.nn.functional.pad(visual, (0, seen[module] - visual.shape[1]))[:, -key.shape[2] :]
        given = torch.zeros_like(query)
        for head in range(query.shape[1]):
            of_keys = head * key.shape[1] // query.shape[1]
            scores = query[:, head] @ key[:, of_keys].mT * options["scaling"]
            weights = (scores if mask is None else scores + mask[:, min(head, mask.shape[1] - 1)]).softmax(-1)
            if (modules[module], of_keys) in heads:
                weights = weights * ~columns[:, None]
            given[:, head] = weights @ value[:, of_keys]
            if (modules[module], of_keys) in heads and prompt:
                given[:, head] *= ~visual[..., None]
        return given.transpose(1, 2).contiguous(), None

    table["eager_attention_forward"] = attend
    try:
        yield model
    finally:
        table["eager_attention_forward"] = original


def compared(model: Any, method: vlprune.Method, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    """What a pruned model generates, and the unpruned one with everything masked that is to be."""
    with vlprune.applied(model, method):
        pruned = zoo.generate(model, inputs, **options)
        gone = dropped(model, inputs, inside.report(model))
    kernel = model.config._attn_implementation
    with behind_the_softmax(flash.switch(model, "eager"), inputs, HEADS), masked(model, inputs, gone):
        expected = zoo.generate(model, inputs)
    flash.switch(model, kernel)
    return pruned, expected


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_inactive_heads_are_a_mask_behind_the_softmax(family):
    """In float64, in a batch with padding, several images and none, and all that is generated behind it; with the exit."""
    model = zoo.build(family, dtype=torch.float64)
    scenario = zoo.scenarios(family).get("videos and images", zoo.SCENARIOS["batch"])
    inputs = zoo.prompt(family, **scenario, dtype=torch.float64)
    pruned, expected = compared(model, vlprune.YOPO(layer=3, heads=HEADS), inputs)
    with vlprune.applied(model, "exit", layer=3):
        bare = zoo.generate(model, inputs)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=2e-5, rtol=0)
    images = (inputs["input_ids"] == zoo.IMAGE).any(1) | (inputs["input_ids"] == zoo.VIDEO).any(1)
    for changed, image in zip((pruned.raw - bare.raw).abs().amax((1, 2)), images, strict=True):
        assert changed > 1e-3 if image else changed == 0


def test_they_are_so_with_every_kernel_and_cache_behind_other_methods_and_without_an_exit():
    inputs = zoo.prompt("llava_next", **zoo.SCENARIOS["batch"])
    alone = vlprune.YOPO(budget=1.0, heads=HEADS)
    behind = vlprune.chain(vlprune.HiRED(budget=0.5), vlprune.YOPO(budget=0.75, heads=HEADS), vlprune.SnapKV(budget=0.5))
    dynamic, static = {}, {"cache_implementation": "static"}
    # Flash attention with a static cache does not run in all versions of transformers, without vlprune either.
    for kernel, caches in (("sdpa", (dynamic, static)), ("eager", (static,)), (flash.FLASH, (dynamic,))):
        for method, cache in product((alone, behind), caches):
            with flash.registered():
                model = flash.switch(zoo.build("llava_next"), kernel)
                pruned, expected = compared(model, method, inputs, **cache)
            torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-4, rtol=0)


def test_nothing_is_left_of_them_and_copies_have_their_own():
    model, inputs = zoo.build("llava"), zoo.prompt("llava", **zoo.SCENARIOS["batch"])
    text = zoo.prompt("llava", images=(0, 0), words=(7, 4))
    method = vlprune.YOPO(budget=1.0, heads=HEADS)
    vlprune.apply(model, method)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    vlprune.remove(model)
    zoo.generate(model, inputs)
    before, of_text = snapshot(model), zoo.generate(model, text).raw
    with vlprune.applied(model, method):
        expected = zoo.generate(model, inputs).raw
        assert torch.equal(zoo.generate(model, text).raw, of_text)
    assert snapshot(model) == before
    assert not torch.equal(zoo.generate(model, inputs).raw, expected)
    for copied in copies:
        assert torch.equal(zoo.generate(copied, inputs).raw, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_when_layers_run_again_in_the_backward_pass(reentrant):
    model, inputs = zoo.build("llava").train(), zoo.prompt("llava", **zoo.SCENARIOS["batch"])
    vlprune.apply(model, vlprune.YOPO(layer=3, heads=HEADS))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.model.language_model.parameters() if p.grad is not None])
    assert len(found[0]) > 30
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_ratios_are_those_of_the_attention_map(family):
    """Of the last row, on either side of padding, without prompts that have no image."""
    model = zoo.build(family, "eager")
    for side in ("left", "right"):
        inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"], side=side)
        found = ratios(model, inputs)
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
        expected = []
        for sample in (0, 1):
            ids, real = inputs["input_ids"][sample].tolist(), inputs["attention_mask"][sample].tolist()
            last = max(place for place, there in enumerate(real) if there)
            for attention in maps:
                for row in attention[sample, :, last].double().tolist():
                    visual = sum(weight for weight, token in zip(row, ids, strict=True) if token == zoo.IMAGE)
                    expected.append(visual / (sum(row) - visual))
        assert found.shape == (2, 4, 4)
        torch.testing.assert_close(found.flatten().double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-4)


def test_heads_are_inactive_by_majority_with_their_group_and_never_in_the_first_layers():
    low, high = 0.01, 0.5
    votes = torch.tensor([[low] * 4, [low, low, low, high], [low, high, high, high]])  # prompts x heads of queries
    found = votes[:, None].expand(3, 4, 4).clone()
    found[:, 3] = high
    # Low on 3, 2, 2 and 1 of 3 prompts; heads 0 and 1 share keys, and so do 2 and 3.
    assert inactive(found, 4, 0.07, 0.4).tolist() == [[False] * 4, [False] * 4, [True, True, True, False], [False] * 4]
    assert inactive(found, 2, 0.07, 0.4).tolist() == [[False] * 2, [False] * 2, [True, False], [False] * 2]
    # More than the share: 2 of 3 are not more than two thirds. And below the threshold, not at it.
    assert inactive(found, 4, 0.07, 2 / 3).tolist()[2] == [True, False, False, False]
    assert not inactive(found, 4, 0.01, 0.0).any()


def test_what_was_found_is_written_and_applied(tmp_path):
    model = zoo.build("llava_next")
    batches = [zoo.prompt("llava_next", images=(1, 1), words=(3, 5), seed=seed) for seed in range(2)]
    vlprune.apply(model, "hired", budget=0.5)
    applied = patch_of(model).method
    out = tmp_path / "found" / "yopo.json"
    method = calibrate.yopo(model, batches, out, budget=0.75, threshold=1.0, notes={"data": "two batches"})
    assert patch_of(model).method == applied
    vlprune.remove(model)
    wanted = inactive(torch.cat([ratios(model, batch) for batch in batches]), 2, 1.0, 0.4)
    assert method.heads == tuple(map(tuple, wanted.nonzero().tolist()))
    told = json.loads(out.read_text())["calibrated"]
    assert (told["data"], told["prompts with images"], told["heads"]) == ("two batches", 4, 8)
    assert told["inactive heads"] == len(method.heads)
    assert Setting(f"yopo[config={out}]", 0.5).make() == vlprune.YOPO(budget=0.5, heads=method.heads)
    for threshold, count, start in ((0.0, 0, None), (1e9, 4, 2)):
        assert len(calibrate.yopo(model, batches[:1], out, threshold=threshold).heads) == count
        assert json.loads(out.read_text())["calibrated"]["all inactive from layer"] == start
    assert patch_of(vlprune.apply(model, config=out)).method.heads == ((2, 0), (2, 1), (3, 0), (3, 1))


def test_the_command_on_tinyvlm(tmp_path):
    arguments = ["calibrate", "tinyvlm", "--method", "yopo", "--budget", "0.75", "--samples", "3", "--device", "cpu"]
    application = shell.application(cli.COMMANDS)
    result = CliRunner().invoke(application, [*arguments, "--out", str(tmp_path / "y.json")], prog_name="vlprune")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "y.json").read_text())
    assert f"{told['calibrated']['inactive heads']} heads of keys" in result.output
    assert (told["calibrated"]["model"], told["calibrated"]["threshold"]) == ("TinyVLM", 0.07)


# ------------------------------------------------------------------ what is refused


def test_heads_that_are_not_there_leave_the_model_as_it_is():
    for wrong in (((0,),), ((0, -1),), ((0, 1, 2),)):
        with pytest.raises(vlprune.OptionError, match="pairs of an LLM layer and a head"):
            vlprune.YOPO(heads=wrong)
    model = zoo.build("llava")
    for heads in (((4, 0),), ((0, 2),)):
        with pytest.raises(vlprune.OptionError, match="layers 0 to 3 and heads of keys 0 to 1"):
            vlprune.apply(model, "yopo", heads=heads)
        assert patch_of(model) is None
    parts = family_of(model).parts(model)
    packed = dataclasses.replace(parts, family=dataclasses.replace(parts.family, text_values="qkv_proj"))
    with pytest.raises(vlprune.UnsupportedMethodError, match="qkv_proj"):
        inactive_heads.inactive(vlprune.YOPO(heads=HEADS), packed)
    method = vlprune.YOPO(budget=0.5, heads=[[2, 1], [0, 1], [2, 1]])
    assert vlprune.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert method.heads == ((0, 1), (2, 1))
