"""A patched model can be copied, saved, dispatched, wrapped, compiled and interrupted like any other."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import vlprune
from tests import zoo
from tests.test_laws import snapshot

FAMILIES = ["llava", "llava_next"]
METHOD: dict[str, Any] = {"method": "hired", "budget": 0.4}


class Broken(vlprune.Method):
    def select(self, image: Any) -> Any:
        raise ZeroDivisionError


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return zoo.build(family)


@pytest.fixture
def inputs(family: str) -> dict[str, Tensor]:
    return zoo.prompt(family, **zoo.SCENARIOS["batch"])


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a short generation."""
    head, raw = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, out: raw.append(out[:, -1].detach().clone()))
    try:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[zoo.IMAGE])
    finally:
        handle.remove()
    return torch.stack(raw, 1)


def same(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-4)


@pytest.fixture
def plain(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the model gives without a method."""
    return run(model, inputs)


@pytest.fixture
def pruned(model: Any, inputs: dict[str, Tensor], plain: Tensor) -> Tensor:
    """What it gives with :data:`METHOD`."""
    with vlprune.applied(model, **METHOD):
        logits = run(model, inputs)
    assert not same(logits, plain)
    return logits


# ------------------------------------------------------------------ applying and removing


def test_applying_twice_replaces(model, inputs, plain, pruned):
    vlprune.apply(model, "random", budget=3)
    vlprune.apply(model, **METHOD)
    assert torch.equal(run(model, inputs), pruned)
    vlprune.remove(model)
    assert torch.equal(run(model, inputs), plain)
    with pytest.raises(vlprune.NotAppliedError):
        vlprune.remove(model)


def test_applied_puts_the_method_before_back(model, inputs, plain, pruned):
    """Also when the block ends with an exception."""
    vlprune.apply(model, **METHOD)
    with pytest.raises(ZeroDivisionError), vlprune.applied(model, Broken(budget=3)):
        run(model, inputs)
    assert torch.equal(run(model, inputs), pruned)
    vlprune.remove(model)
    assert torch.equal(run(model, inputs), plain)


def test_two_models_do_not_see_each_other(family, model, inputs, plain, pruned):
    """One pruned, one not, one with another method, used in turn."""
    other, third = zoo.build(family), zoo.build(family)
    vlprune.apply(model, **METHOD)
    vlprune.apply(third, "random", budget=3)
    alone = run(third, inputs)
    for _ in range(2):
        assert torch.equal(run(model, inputs), pruned)
        assert torch.equal(run(other, inputs), plain)
        assert torch.equal(run(third, inputs), alone)
    assert {image.tokens_out for image in vlprune.report(third).images} == {3}
    vlprune.remove(third)
    assert torch.equal(run(model, inputs), pruned)


@pytest.mark.parametrize("failure", [{"method": "hired", "budget": 0}, {"method": "nothing"}, {"method": "hired", "x": 1}])
def test_a_failing_apply_changes_nothing(model, inputs, failure):
    """Neither a plain model nor one with a method."""
    before = snapshot(model)
    with pytest.raises(vlprune.VLPruneError):
        vlprune.apply(model, **failure)
    assert snapshot(model) == before
    vlprune.apply(model, **METHOD)
    before = snapshot(model)
    with pytest.raises(vlprune.VLPruneError):
        vlprune.apply(model, **failure)
    assert snapshot(model) == before


# ------------------------------------------------------------------ copies and files


def test_a_deep_copy_is_pruned_and_independent(model, inputs, plain, pruned):
    """Made before or after the model has run; with weights of its own."""
    vlprune.apply(model, **METHOD)
    first = copy.deepcopy(model)
    run(model, inputs)
    second = copy.deepcopy(model)
    vlprune.remove(model)
    assert torch.equal(run(model, inputs), plain)
    for copied in (first, second):
        assert torch.equal(run(copied, inputs), pruned)
        with torch.no_grad():
            copied.model.language_model.layers[0].mlp.up_proj.weight.zero_()
        assert not same(run(copied, inputs), pruned)
        vlprune.remove(copied)
    assert torch.equal(run(model, inputs), plain)


def test_a_deep_copy_can_be_rid_of_the_method_alone(model, inputs, plain, pruned):
    vlprune.apply(model, **METHOD)
    copied = copy.deepcopy(model)
    vlprune.remove(copied)
    assert torch.equal(run(copied, inputs), plain)
    assert torch.equal(run(model, inputs), pruned)


def test_a_whole_model_is_saved_and_loaded(family, inputs, plain, pruned):
    """torch.save of the module, not of its weights: pruned when it comes back, and removable.

    Before it has run: from 5.2 on, transformers itself adds hooks that cannot be pickled to a model that has.
    """
    file = io.BytesIO()
    torch.save(vlprune.apply(zoo.build(family), **METHOD), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(loaded, inputs), pruned)
    vlprune.remove(loaded)
    assert torch.equal(run(loaded, inputs), plain)


def test_weights_are_saved_without_the_method(model, inputs, plain, tmp_path):
    """save_pretrained of a pruned model writes the files of a plain one, which load as a plain one."""
    model.save_pretrained(tmp_path / "plain")
    vlprune.apply(model, **METHOD)
    assert model.state_dict().keys() == zoo.build(model.config.model_type).state_dict().keys()
    model.save_pretrained(tmp_path / "pruned")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "pruned" / file.name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    assert same(run(loaded, inputs), plain)
    with pytest.raises(vlprune.NotAppliedError):
        vlprune.remove(loaded)


def test_a_state_dict_loads_into_a_pruned_model(family, model, inputs, pruned):
    other = zoo.build(family, seed=5)
    vlprune.apply(other, **METHOD)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, inputs), pruned)


@pytest.mark.parametrize(("name", "options"), zoo.method_cases())
def test_methods_are_pickled_and_described(name, options):
    """Through pickle, deepcopy and a plain dict."""
    method = vlprune.methods()[name](budget=7, **options)
    for other in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method), vlprune.from_dict(method.to_dict())):
        assert other == method
        assert type(other) is type(method)


# ------------------------------------------------------------------ accelerate and PEFT


def dispatched(model: Any, folder: Any) -> Any:
    """Some layers live on disk and are fetched for each forward."""
    from accelerate import dispatch_model

    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "language_model"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_parameters(recurse=False)}
    text = model.model.language_model
    places |= {f"model.language_model.{name}": "cpu" for name, _ in text.named_children() if name != "layers"}
    places |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(text.layers))}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def test_dispatched_after_apply(model, inputs, pruned, tmp_path):
    vlprune.apply(model, **METHOD)
    assert same(run(dispatched(model, tmp_path), inputs), pruned)


def test_dispatched_before_apply(model, inputs, plain, pruned, tmp_path):
    dispatched(model, tmp_path)
    before = snapshot(model)
    vlprune.apply(model, **METHOD)
    assert same(run(model, inputs), pruned)
    vlprune.remove(model)
    assert same(run(model, inputs), plain)
    assert [entry[:2] for entry in snapshot(model)[:-4]] == [entry[:2] for entry in before[:-4]]


def test_the_hooks_of_accelerate_leave_without_the_method(model, inputs, pruned):
    """Hooks that accelerate adds after apply() and removes again."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules

    vlprune.apply(model, **METHOD)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    assert same(run(model, inputs), pruned)
    remove_hook_from_submodules(model)
    assert same(run(model, inputs), pruned)


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()


def test_lora_around_a_pruned_model(model, inputs, plain, pruned):
    """New adapters change nothing, so the logits stay; merged and unloaded, the model is pruned still."""
    vlprune.apply(model, **METHOD)
    wrapped = lora(model)
    assert same(run(wrapped, inputs), pruned)
    merged = wrapped.merge_and_unload()
    assert same(run(merged, inputs), pruned)
    vlprune.remove(merged)
    assert same(run(merged, inputs), plain)


def test_apply_looks_through_peft(model, inputs, plain, pruned):
    """Applied to the wrapper; with adapters that have learnt something, the projections of the encoder included."""
    wrapped = lora(model)
    assert vlprune.apply(wrapped, **METHOD) is wrapped
    assert same(run(wrapped, inputs), pruned)
    assert vlprune.report(wrapped).entering < vlprune.report(wrapped).total
    vlprune.remove(wrapped)
    assert same(run(wrapped, inputs), plain)


def test_signals_follow_trained_adapters(model, inputs):
    """Adapters on the encoder's projections: the same choice as in the model into which they are merged."""
    wrapped = lora(model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    vlprune.apply(wrapped, **METHOD)
    logits = run(wrapped, inputs)
    merged = wrapped.merge_and_unload()
    vlprune.apply(merged, **METHOD)
    assert same(run(merged, inputs), logits)


# ------------------------------------------------------------------ torch.compile


def decode(model: Any, step: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of a prefill by ``model``, then of one ``step`` for each of ``tokens``, on a static cache."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    mask = inputs["attention_mask"]
    start = mask.shape[1]
    with torch.no_grad():
        steps = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
        for i, token in enumerate(tokens):
            allowed = (torch.arange(64) <= start + i)[None, None, None]
            position = torch.tensor([start + i])
            arguments: dict[str, Any] = {"position_ids": position[None]}
            if zoo.VERSION < (5, 4):
                arguments["cache_position"] = position
            out = step(input_ids=token.view(1, 1), attention_mask=allowed, past_key_values=cache, use_cache=True, **arguments)
            steps.append(out.logits[:, -1])
    return torch.stack(steps, 1)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_compiled_decode_step_is_compiled_once(model, family):
    """One graph for all steps and for every number of kept tokens."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    dynamo.reset()
    inputs = zoo.prompt(family, words=(4,))
    tokens = torch.arange(5, 10)
    counter = CompileCounter()
    compiled = torch.compile(model.__call__, backend=counter, dynamic=False)
    vlprune.apply(model, "hired", budget=0.5)
    expected = decode(model, model, inputs, tokens)
    torch.testing.assert_close(decode(model, compiled, inputs, tokens), expected, atol=1e-4, rtol=0)
    frames = counter.frame_count
    assert frames >= 1
    for budget in (0.5, 3, 9):
        _method(model).budget = budget
        logits = decode(model, compiled, inputs, tokens)
        torch.testing.assert_close(logits, decode(model, model, inputs, tokens), atol=1e-4, rtol=0)
    assert counter.frame_count == frames
    dynamo.reset()


def _method(model: Any) -> Any:
    from vlprune.engine.patch import patch_of

    patch = patch_of(model)
    assert patch is not None
    return patch.method


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_apply_looks_through_a_compiled_wrapper(model, inputs, plain, pruned):
    """torch.compile(model), then apply: the wrapper is pruned, and plain again after remove()."""
    import torch._dynamo as dynamo

    dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(**inputs).logits
        assert vlprune.apply(compiled, **METHOD) is compiled
        torch.testing.assert_close(compiled(**inputs).logits[:, -1], pruned[:, 0], atol=1e-4, rtol=0)
        vlprune.remove(compiled)
        torch.testing.assert_close(compiled(**inputs).logits, before, atol=1e-5, rtol=0)
    dynamo.reset()


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_apply_to_a_model_compiled_in_place(model, inputs, pruned):
    """model.compile(), then apply."""
    import torch._dynamo as dynamo

    dynamo.reset()
    model.compile(backend="eager")
    with torch.no_grad():
        before = model(**inputs).logits
        vlprune.apply(model, **METHOD)
        torch.testing.assert_close(model(**inputs).logits[:, -1], pruned[:, 0], atol=1e-4, rtol=0)
        vlprune.remove(model)
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=0)
    dynamo.reset()


# ------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "place", ["model.vision_tower", "model.multi_modal_projector", "model.language_model.layers.2", "lm_head"]
)
def test_a_forward_that_breaks_off_leaves_nothing_behind(model, family, inputs, pruned, place, error):
    """Text alone, the same prompt and another one are right afterwards."""
    text = zoo.prompt(family, (0, 0), (7, 4))
    expected_text = run(model, text)
    single = zoo.prompt(family, seed=4)
    with vlprune.applied(model, **METHOD):
        expected_single = run(model, single)
    vlprune.apply(model, **METHOD)

    def fail(module: Any, args: Any) -> None:
        raise error

    for after, expected in ((text, expected_text), (inputs, pruned), (single, expected_single)):
        handle = model.get_submodule(place).register_forward_pre_hook(fail)
        with pytest.raises(error):
            run(model, inputs)
        handle.remove()
        assert torch.equal(run(model, after), expected)


def test_a_method_that_breaks_leaves_nothing_behind(model, inputs, pruned):
    vlprune.apply(model, Broken(budget=3))
    with pytest.raises(ZeroDivisionError):
        run(model, inputs)
    vlprune.apply(model, **METHOD)
    assert torch.equal(run(model, inputs), pruned)
