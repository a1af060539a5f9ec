"""Errors say what was given, what is allowed and what to do, and the model is as it was before."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    QuantizedCache,
    Qwen2Config,
    StaticCache,
)

import vlprune
from tests import zoo
from tests.test_laws import snapshot

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("llava")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return zoo.prompt("llava", **zoo.SCENARIOS["batch"])


def bert() -> Any:
    return BertModel(BertConfig(**{**SMALL, "num_key_value_heads": None}))


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def refuses(model: Any, error: type[Exception], *parts: str, **options: Any) -> None:
    """``apply`` raises ``error`` with all ``parts`` in its text, and leaves the model alone."""
    before = snapshot(model) if isinstance(model, torch.nn.Module) and hasattr(model, "config") else None
    with pytest.raises(error) as caught:
        vlprune.apply(model, **options)
    assert isinstance(caught.value, vlprune.VLPruneError)
    for part in parts:
        assert part in str(caught.value)
    assert before is None or snapshot(model) == before


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (bert, "BertModel (model type 'bert')"),
        (llama, "LlamaForCausalLM (model type 'llama')"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: "llava", "str"),
        (lambda: None, "NoneType"),
    ],
)
def test_a_model_of_no_known_family(make, named):
    """Named with the families that are supported."""
    refuses(make(), vlprune.UnsupportedModelError, named, "supported are", "LLaVA-NeXT (llava_next)")


def test_a_base_model_without_its_language_head(model):
    refuses(model.model, vlprune.UnsupportedModelError, "LlavaModel has no", "language head")


def test_a_language_model_with_sliding_windows():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**zoo.VISION),
        text_config=Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        image_token_index=zoo.IMAGE,
    )
    refuses(LlavaForConditionalGeneration(config), vlprune.UnsupportedModelError, "sliding-window", "sliding_window=None")


def test_a_language_model_whose_config_names_a_window_and_no_layers():
    """Mistral's: all of its layers slide."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**zoo.VISION),
        text_config=MistralConfig(**SMALL, sliding_window=8),
        image_token_index=zoo.IMAGE,
    )
    refuses(LlavaForConditionalGeneration(config), vlprune.UnsupportedModelError, "sliding-window", "sliding_window=None")


@pytest.mark.parametrize("make", [lambda: zoo.build("llava"), llama], ids=["known family", "unknown family"])
def test_a_language_model_with_recurrent_layers(make):
    """The reason is named, also where the family is not known: no registration would help."""
    model = make()
    model.config.get_text_config().layer_types = ["linear_attention", "full_attention"]
    refuses(model, vlprune.UnsupportedModelError, "layers of type linear_attention", "full attention", "mix the tokens")


def test_windows_under_flash_attention():
    """The kernel counts the rows of a window: with rows gone it would reach too far back."""
    model = zoo.build("gemma3")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    refuses(model, vlprune.UnsupportedModelError, "sliding-window", "flash_attention_2", "attn_implementation='sdpa'")


def test_a_smaller_image_for_an_encoder_that_cannot_see_one():
    model = zoo.build("gemma3")
    refuses(model, vlprune.UnsupportedMethodError, "resize", "smaller image", "Gemma 3", "uniform", method="resize")


def test_a_method_that_needs_cls_on_an_encoder_without_one():
    """Names the encoder, and the methods that do without."""

    class Cls(vlprune.Method):
        name = "cls"
        needs = (vlprune.ClsAttention(layer=-2),)

    model = zoo.build("llava_siglip")
    needed = ("cls needs the attention of [CLS]", "siglip_vision_model", "hired", "random", "uniform")
    refuses(model, vlprune.UnsupportedMethodError, *needed, method=Cls(budget=3))


def test_a_layer_that_the_encoder_does_not_have(model):
    class Deep(vlprune.Method):
        needs = (vlprune.ClsAttention(layer=40),)

    refuses(model, vlprune.UnsupportedMethodError, "vision layer 40", "layers 0 to 3", method=Deep(budget=3))


def test_a_stage_that_the_family_does_not_have():
    """LLaVA-OneVision resizes features, so none may be missing."""

    class Early(vlprune.Method):
        name = "early"
        stages = ("encode",)

    needed = ("early acts in the stage encode", "select, prefill, evict only")
    refuses(zoo.build("llava_onevision"), vlprune.UnsupportedMethodError, *needed, method=Early(budget=3))


def test_a_method_that_a_family_cannot_run_is_refused_with_some_that_it_can():
    """The matrices of the laws run all others. ToMe stands for those that merge in encoders of known architectures."""
    fitting: dict[str, set[str]] = {family: set() for family in zoo.FAMILIES}
    for family, name, _ in zoo.combinations():
        fitting[family].add(name)
    unknown = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "mistral3")
    refused = [(family, name) for family, fit in fitting.items() for name in vlprune.methods() if name not in fit]
    for family, name in [*refused, *((family, "tome") for family in unknown)]:
        with pytest.raises((vlprune.UnsupportedMethodError, vlprune.UnsupportedModelError)) as caught:
            vlprune.apply(zoo.build(family), name)
        words = set(re.findall(r"[a-z0-9+-]+", str(caught.value)))
        assert name in words
        assert fitting[family] & words - {name}
    assert ("llava_onevision", "flowcut") in refused


# ------------------------------------------------------------------ methods, options, budgets

BUDGETS = [0, -1, 0.0, -0.5, 1.5, 200.0, math.nan, math.inf, -math.inf, "half", True, False, None, [0.5], 1j]


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_a_budget_that_is_none(model, budget):
    """Named with what is allowed; both a BudgetError and a ValueError."""
    refuses(model, vlprune.BudgetError, f"budget={budget!r}", "int >= 1", "float in (0, 1]", budget=budget)
    refuses(model, ValueError, budget=budget)


def test_a_count_written_as_a_float(model):
    """The likely slip is named."""
    refuses(model, vlprune.BudgetError, "for 64 tokens write budget=64", budget=64.0)


@pytest.mark.parametrize(("given", "near"), [("hierd", "hired"), ("HiRED", "hired"), ("unifrom", "uniform")])
def test_an_unknown_method_names_the_nearest(model, given, near):
    refuses(model, vlprune.UnsupportedMethodError, repr(given), f"did you mean {near!r}?", "Known methods:", method=given)


@pytest.mark.parametrize("given", [5, 0.5, dict, object()], ids=["int", "float", "class", "object"])
def test_something_that_is_no_method(model, given):
    refuses(model, vlprune.UnsupportedMethodError, repr(given), "a method's name", "allowed", method=given)


def test_an_unknown_option_names_the_nearest(model):
    """It is a TypeError too, as for any wrong keyword."""
    refuses(model, vlprune.OptionError, "'alhpa'", "did you mean 'alpha'?", "allocation", method="hired", alhpa=0.1)
    refuses(model, TypeError, method=vlprune.HiRED(), alhpa=0.1)


@pytest.mark.parametrize(("option", "value"), [("alpha", 1.5), ("alpha", -0.1), ("allocation", "fair")])
def test_an_option_out_of_range(model, option, value):
    refuses(model, vlprune.OptionError, f"{option}={value!r}", "allowed", method="hired", **{option: value})


def test_a_method_that_misses_its_own_budget(model, inputs):
    """A contract of Method.select; the model works afterwards."""

    class Greedy(vlprune.Method):
        def select(self, image: Any) -> Any:
            return vlprune.Selection(torch.arange(5))

    with vlprune.applied(model, Greedy(budget=3)), pytest.raises(vlprune.BudgetError, match="kept 5 .* exactly 3 of 16"):
        model(**inputs)
    works(model, inputs)


# ------------------------------------------------------------------ remove and report


@pytest.mark.parametrize("ask", [vlprune.remove, vlprune.report])
def test_a_plain_model_has_nothing_to_remove_or_report(model, ask):
    with pytest.raises(vlprune.NotAppliedError, match=r"no method is applied .*vlprune\.apply\(model\)"):
        ask(model)


def test_a_report_before_any_image(model):
    """Text alone is nothing to report either."""
    with vlprune.applied(model, "hired"), torch.no_grad():
        for _ in range(2):
            with pytest.raises(vlprune.NotAppliedError, match="has not seen an image.*run it first"):
                vlprune.report(model)
            model(**zoo.prompt("llava", (0,)))


# ------------------------------------------------------------------ inputs


def works(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Pruned again, the model gives what a fresh one gives."""
    expected = vlprune.apply(zoo.build("llava"), "hired", budget=0.4)
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)


class CustomCache(DynamicCache):
    pass


@pytest.mark.parametrize(
    "make", [CustomCache, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())], ids=["custom", "encoder_decoder"]
)
def test_a_cache_that_cannot_be_pruned(model, inputs, make):
    """Refused before it holds anything, and nothing is left of the forward."""
    cache = make()
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        with pytest.raises(vlprune.IncompatibleCacheError, match="allowed are DynamicCache, StaticCache") as caught:
            model(**inputs, past_key_values=cache, use_cache=True)
        assert type(cache).__name__ in str(caught.value)
        assert cache.get_seq_length() == 0
        model(**zoo.prompt("llava", (0,)))
    works(model, inputs)


def offloaded(config: Any) -> Any:
    """As if made with offloading=True, which wants a GPU."""
    cache = DynamicCache(config=config)
    cache.offloading = True
    return cache


REFUSED: dict[str, tuple[str, Any, str]] = {
    "quantised": ("llava", lambda config: object.__new__(QuantizedCache), "of type QuantizedCache"),
    "offloaded": ("llava", offloaded, "with offloading"),
    "static with windows": (
        "gemma3",
        lambda config: StaticCache(config=config, max_cache_len=64),
        "constant size with sliding-window",
    ),
}


@pytest.mark.parametrize("method", ["random", "fastv", "snapkv"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_cache_is_refused_before_the_encoder_runs(kind, method):
    """Whatever the method's stage, by what is the matter with it."""
    family, make, said = REFUSED[kind]
    model, ran = zoo.build(family), []
    model.model.vision_tower.register_forward_hook(lambda *_: ran.append(1))
    cache = make(model.config.get_text_config())
    with vlprune.applied(model, method, budget=0.8), torch.no_grad():
        with pytest.raises(
            vlprune.IncompatibleCacheError, match=f"{said}.*allowed are DynamicCache, StaticCache.*Pass one of"
        ):
            model(**zoo.prompt(family), past_key_values=cache, use_cache=True)
        assert not ran


def test_a_cache_that_generate_makes_is_refused_before_the_first_token():
    model, heads = zoo.build("gemma3"), []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    with vlprune.applied(model, "random", budget=2), pytest.raises(vlprune.IncompatibleCacheError, match="sliding-window"):
        zoo.generate(model, zoo.prompt("gemma3"), cache_implementation="static")
    assert not heads


@pytest.mark.parametrize("images", [0, 1])
def test_a_cache_is_not_looked_at_where_nothing_is_to_be_dropped(images):
    """Text alone, and a budget of 1.0: bit-identical."""
    model, inputs = zoo.build("llava"), zoo.prompt("llava", (images,))
    with torch.no_grad():
        expected = model(**inputs, past_key_values=CustomCache()).logits
        with vlprune.applied(model, "random", budget=1.0 if images else 3):
            assert torch.equal(model(**inputs, past_key_values=CustomCache()).logits, expected)


def test_a_budget_that_fastv_cannot_reach(inputs):
    """Named with the range that it can: its ends work, and nothing below does."""
    model, single = zoo.build("llava"), zoo.prompt("llava")
    with torch.no_grad():
        with vlprune.applied(model, "fastv", budget=2), pytest.raises(vlprune.BudgetError, match="allows 9 to 16.*0.562 to 1"):
            model(**single)
        for budget in (9, 0.563, 16, 1.0):
            with vlprune.applied(model, "fastv", budget=budget):
                model(**single)
        with (
            vlprune.applied(model, "fastv", budget=8),
            pytest.raises(vlprune.BudgetError, match="allows 8 of .*raise the budget"),
        ):
            model(**single)


@pytest.mark.parametrize("layer", [4, 99])
def test_a_layer_of_the_llm_that_is_not_there(layer):
    """Said before the encoder runs."""
    model, ran = zoo.build("llava"), []
    model.model.vision_tower.register_forward_hook(lambda *_: ran.append(1))
    said = f"layer={layer}: this model's LLM has layers 0 to 3"
    with vlprune.applied(model, vlprune.FastV(layer=layer, keep=0.5)), pytest.raises(vlprune.OptionError, match=said):
        model(**zoo.prompt("llava"))
    assert not ran


@pytest.mark.parametrize("missing", [True, False])
def test_images_and_placeholders_that_disagree(model, inputs, missing):
    """Upstream's own error comes through, and the next forward is right."""
    pixels = inputs["pixel_values"]
    wrong = {**inputs, "pixel_values": pixels[:-1] if missing else torch.cat([pixels, pixels[:1]])}
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        with pytest.raises(Exception, match="(?i)image features and image tokens do not match"):
            model(**wrong)
        model(**zoo.prompt("llava", (0,)))
    works(model, inputs)


def test_a_prefill_in_chunks_that_cut_an_image(model, inputs):
    """Refused by name where generate() cuts features itself, by transformers where it does not."""
    single = zoo.prompt("llava")
    expected, text = (vlprune.VLPruneError, "in chunks") if zoo.VERSION >= (5, 18) else (ValueError, "do not match")
    with vlprune.applied(model, "hired", budget=0.4), pytest.raises(expected, match=text):
        model.generate(**single, max_new_tokens=2, prefill_chunk_size=8)
    works(model, inputs)


if zoo.VERSION >= (5, 18):

    def test_features_encoded_before_the_method_was_applied(model, inputs):
        with torch.no_grad():
            features = model.model.get_image_features(inputs["pixel_values"])
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with vlprune.applied(model, "hired"), pytest.raises(vlprune.VLPruneError, match="before the method .*encode them"):
                model(**text, mm_encoder_outputs={"image": features})
        works(model, inputs)


# ------------------------------------------------------------------ registering


def test_a_name_that_is_taken():
    with pytest.raises(vlprune.VLPruneError, match=r"'hired' is taken by vlprune\.methods\.hired\.HiRED"):

        @vlprune.register("hired")
        class Other(vlprune.Method):
            pass


@pytest.mark.parametrize("name", ["", "Two Words", "9lives"])
def test_a_name_that_cannot_be(name):
    with pytest.raises(vlprune.VLPruneError, match="allowed are lower-case letters"):
        vlprune.register(name)(type("Nameless", (vlprune.Method,), {}))


def test_a_class_that_is_no_method():
    with pytest.raises(vlprune.VLPruneError, match="not a subclass of vlprune.Method"):
        vlprune.register("thing")(dict)  # pyright: ignore
