"""Every way to generate that transformers offers goes on working, and gives what the masked reference gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import vlprune
from tests import zoo
from tests.reference import hidden_positions, masked, pruned_and_masked

FAMILIES = ["llava", "llava_next"]
IMAGES = {"one_image": (1,), "padded": (1, 1, 0), "several_images": (1, 2, 0)}
"""Images of each sample; prompts of several samples differ in length, so some are padded."""
BEAMS_OF_SEVERAL_IMAGES = zoo.VERSION >= (5, 18)
"""Before, generate() itself gives beams of a prompt with several images the wrong ones: [A, A, B, B], not [A, B, A, B]."""


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return zoo.build(family, dtype=torch.float64)


def ask(family: str, images: tuple[int, ...] = (1,), **options: Any) -> dict[str, Tensor]:
    return zoo.prompt(family, images, (7, 4, 9)[: len(images)], dtype=torch.float64, **options)


def append(ids: Tensor, inputs: dict[str, Tensor], more: Tensor, more_mask: Tensor | None = None) -> dict[str, Tensor]:
    """A prompt that goes on after ``ids``, what was generated from ``inputs``."""
    new = torch.ones(ids.shape[0], ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    more_mask = torch.ones_like(more) if more_mask is None else more_mask
    return {
        "input_ids": torch.cat([ids, more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], new, more_mask], 1),
    }


def assert_equal(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.raw, expected.raw, atol=1e-9, rtol=0)


def full_cache(model: Any, kind: str, length: int = 200) -> Any:
    config = model.config.get_text_config()
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)


# ------------------------------------------------------------------ ways to decode

MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.3},
    "several_samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled_beams": {"num_beams": 2, "do_sample": True},
    "static_beams": {"num_beams": 2, "cache_implementation": "static"},
}
EXPANDED = [
    (mode, images)
    for mode in MODES
    for images in IMAGES
    if mode == "sampling" or images != "several_images" or BEAMS_OF_SEVERAL_IMAGES
]


@pytest.mark.parametrize(("mode", "images"), EXPANDED)
def test_ways_to_decode_equal_the_masked_reference(model, family, mode, images):
    """Sampling with a seed and beam search: the same sequences, and the same logits in every step and beam."""
    inputs = ask(family, IMAGES[images])
    pruned, expected = pruned_and_masked(model, inputs, lambda: zoo.generate(model, inputs, **MODES[mode]))
    assert_equal(pruned, expected)


@pytest.mark.parametrize("images", IMAGES)
def test_without_a_cache_every_step_prunes(model, family, images):
    """use_cache=False equals the cached run and the masked reference."""
    inputs = ask(family, IMAGES[images])
    pruned, expected = pruned_and_masked(model, inputs, lambda: zoo.generate(model, inputs, use_cache=False))
    assert_equal(pruned, expected)
    with vlprune.applied(model, "hired", budget=0.4):
        assert_equal(zoo.generate(model, inputs), pruned)


def test_prompt_lookup_equals_greedy(model, family):
    """Drafts are checked, accepted and cropped from the cache as without pruning."""
    inputs = ask(family)
    inputs["input_ids"][0, -6:] = torch.tensor([5, 6, 7, 5, 6, 7])
    if zoo.VERSION < (5, 13):
        model.generation_config.eos_token_id = 98  # those versions cannot do without one
    with vlprune.applied(model, "hired", budget=0.4):
        greedy = zoo.generate(model, inputs, new_tokens=24)
        assisted = zoo.generate(model, inputs, new_tokens=24, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, assisted.sequences)
    with masked(model, inputs, hidden_positions(inputs, _report(model, inputs))):
        assert torch.equal(zoo.generate(model, inputs, new_tokens=24).sequences, greedy.sequences)


@pytest.mark.parametrize("pruned_assistant", [True, False])
def test_an_assistant_model_equals_greedy(model, family, pruned_assistant):
    """Drafts of another model, pruned or not, change nothing."""
    inputs = ask(family)
    model.generation_config.eos_token_id = 98
    assistant = copy.deepcopy(model)
    if pruned_assistant:
        vlprune.apply(assistant, "hired", budget=0.4)
    with vlprune.applied(model, "hired", budget=0.4):
        greedy = zoo.generate(model, inputs, new_tokens=8)
        assisted = zoo.generate(model, inputs, new_tokens=8, assistant_model=assistant)
    assert torch.equal(greedy.sequences, assisted.sequences)


def _report(model: Any, inputs: dict[str, Tensor]) -> vlprune.Report:
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        model(**inputs)
        return vlprune.report(model)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("images", IMAGES)
def test_a_loop_over_forward_equals_the_masked_reference(model, family, images, cache):
    """Prefill and decode steps called by hand, with a cache of one's own and no position_ids."""
    inputs = ask(family, IMAGES[images])

    def loop() -> Tensor:
        past, mask, steps = full_cache(model, cache), inputs["attention_mask"], []
        with torch.no_grad():
            out = model(**inputs, past_key_values=past, use_cache=True)
            for _ in range(4):
                steps.append(out.logits[:, -1])
                token = steps[-1].argmax(-1, keepdim=True)
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                out = model(input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True)
        return torch.stack([*steps, out.logits[:, -1]], 1)

    pruned, expected = pruned_and_masked(model, inputs, loop)
    torch.testing.assert_close(pruned, expected, atol=1e-9, rtol=0)


def test_a_loop_without_a_mask(model, family):
    """No attention mask given, no cache given: the model makes both."""
    inputs = ask(family)
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}

    def loop() -> Tensor:
        with torch.no_grad():
            out = model(**unmasked)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            return model(input_ids=token, past_key_values=out.past_key_values).logits

    pruned, expected = pruned_and_masked(model, inputs, loop)
    torch.testing.assert_close(pruned, expected, atol=1e-9, rtol=0)


def test_samples_of_equal_length_with_unequal_images(model):
    """No padding, but another number of visual tokens in each sample: the pruned rows differ in length."""
    row = lambda images, words: [1, 5, *([zoo.IMAGE] * 16 + [9]) * images, *range(10, 10 + words)]  # noqa: E731
    ids = torch.tensor([row(1, 24), row(2, 7)])
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if "next" in type(model).__name__.lower():
        inputs["pixel_values"], inputs["image_sizes"] = pixels[:, None].repeat(1, 5, 1, 1, 1), torch.tensor([[28, 56]] * 3)
        visual = zoo.visual_tokens("llava_next", (28, 56))
        row = lambda images, words: [1, 5, *([zoo.IMAGE] * visual + [9]) * images, *range(10, 10 + words)]  # noqa: E731
        inputs["input_ids"] = torch.tensor([row(1, 8 + visual), row(2, 7)])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    pruned, expected = pruned_and_masked(model, inputs, lambda: zoo.generate(model, inputs))
    assert_equal(pruned, expected)


def test_a_prompt_that_ends_with_an_image(model, family):
    """Its answer is predicted by the last token that is kept."""
    inputs = {k: v[:, :-9] if k in ("input_ids", "attention_mask") else v for k, v in ask(family).items()}
    assert inputs["input_ids"][0, -1] == zoo.IMAGE
    with vlprune.applied(model, "random", budget=0.1, seed=2), torch.no_grad():
        pruned = zoo.generate(model, inputs, new_tokens=4)
        hidden = hidden_positions(inputs, vlprune.report(model))
    assert hidden[0, -1]
    last = int((~hidden[0]).nonzero()[-1])
    with masked(model, inputs, hidden), torch.no_grad():
        torch.testing.assert_close(pruned.raw[:, 0], model(**inputs).logits[:, last], atol=1e-9, rtol=0)
        answered = {**inputs, "input_ids": pruned.sequences, "attention_mask": torch.ones_like(pruned.sequences)}
        logits = model(**answered).logits[:, -4:-1]
    torch.testing.assert_close(pruned.raw[:, 1:], logits, atol=1e-9, rtol=0)


# ------------------------------------------------------------------ caches that live on


@pytest.mark.parametrize("images", IMAGES)
def test_a_second_turn_on_the_kept_cache(model, family, images):
    """The next question needs no pixels: the cache of the first turn is used on, padding and all."""
    inputs = ask(family, IMAGES[images])
    more = torch.randint(3, 80, (len(IMAGES[images]), 6), generator=torch.Generator().manual_seed(5))

    def turns() -> Any:
        first = zoo.generate(model, inputs)
        return zoo.generate(model, append(first.sequences, inputs, more), past_key_values=first.past_key_values)

    pruned, expected = pruned_and_masked(model, inputs, turns)
    assert_equal(pruned, expected)


NEW_IMAGE = ["forward"] + ["generate"] * (zoo.VERSION >= (5, 0))
"""generate() of transformers 4 hands pixels to the model only while the cache is empty."""


@pytest.mark.parametrize("how", NEW_IMAGE)
@pytest.mark.parametrize(("before", "after"), [((1,), (1,)), ((1, 2, 0), (1, 0, 2))], ids=["single", "batch"])
def test_a_second_turn_with_a_new_image(model, family, before, after, how):
    """Both turns prune; the second goes on behind the rows that the first has left."""
    first, second = ask(family, before), ask(family, after, seed=3)
    dropped: list[Tensor] = []

    def turn(inputs: dict[str, Tensor]) -> None:
        if vlprune_applied(model):
            dropped.append(hidden_positions(inputs, vlprune.report(model)))

    def turns() -> tuple[dict[str, Tensor], Tensor]:
        out = zoo.generate(model, first)
        turn(first)
        both = append(out.sequences, first, second["input_ids"], second["attention_mask"])
        pictures = {k: v for k, v in second.items() if k not in both}
        if how == "generate":
            answer = zoo.generate(model, both | pictures, past_key_values=out.past_key_values).raw
        else:
            cache = out.past_key_values
            fed = both | pictures | {"input_ids": both["input_ids"][:, cache.get_seq_length() :]}
            with torch.no_grad():
                answer = model(**fed, past_key_values=cache).logits[:, -1]
        turn(second)
        return both, answer

    with vlprune.applied(model, "hired", budget=0.4):
        both, pruned = turns()
    hidden = torch.zeros_like(both["input_ids"], dtype=torch.bool)
    hidden[:, : dropped[0].shape[1]] = dropped[0]
    hidden[:, -dropped[1].shape[1] :] = dropped[1]
    assert dropped[1].any()
    with masked(model, both, hidden):
        again, expected = turns()
    assert torch.equal(both["input_ids"], again["input_ids"])
    torch.testing.assert_close(pruned, expected, atol=1e-9, rtol=0)


def vlprune_applied(model: Any) -> bool:
    try:
        vlprune.report(model)
    except vlprune.NotAppliedError:
        return False
    return True


def test_a_prefix_cache_is_copied_and_used_twice(model, family):
    """copy.deepcopy of a pruned prefill serves several questions, each as if asked from scratch."""
    inputs = ask(family)
    with vlprune.applied(model, "hired", budget=0.4):
        prefix = full_cache(model, "dynamic")
        with torch.no_grad():
            model(**inputs, past_key_values=prefix, use_cache=True)
        length = prefix.get_seq_length()
        for words in ([4, 5, 6], [7, 8]):
            question = append(inputs["input_ids"], inputs, torch.tensor([words]))
            scratch = zoo.generate(model, {**inputs, **question})
            assert_equal(zoo.generate(model, question, past_key_values=copy.deepcopy(prefix)), scratch)
        assert prefix.get_seq_length() == length == inputs["input_ids"].shape[1]


def crop(cache: Any, remove: int) -> None:
    cache.crop(-remove if zoo.VERSION >= (5, 14) else cache.get_seq_length() - remove)


def test_drafts_are_fed_and_cropped(model, family):
    """Several tokens at once behind a pruned prompt, the last of them taken back, then others: as if fed from scratch."""
    inputs = ask(family)
    good, bad = torch.tensor([[4, 5, 6]]), torch.tensor([[7, 8]])
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        cache = model(**inputs).past_key_values
        model(input_ids=torch.cat([good, bad], 1), past_key_values=cache)
        crop(cache, 2)
        logits = model(input_ids=good, past_key_values=cache).logits
        expected = model(**{**inputs, **append(inputs["input_ids"], inputs, torch.cat([good, good], 1))}).logits
        torch.testing.assert_close(logits, expected[:, -3:], atol=1e-9, rtol=0)
        with pytest.raises(vlprune.IncompatibleCacheError, match="behind the image"):
            crop(cache, inputs["input_ids"].shape[1] - 6)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 6


def test_a_static_cache_is_used_again_after_reset(model, family):
    """The second prompt, of another length, finds an empty cache; so does a prompt of text alone."""
    with vlprune.applied(model, "hired", budget=0.4):
        cache = full_cache(model, "static")
        for inputs in (ask(family), ask(family, seed=2), ask(family, (0,))):
            expected = zoo.generate(model, inputs)
            assert_equal(zoo.generate(model, inputs, past_key_values=cache), expected)
            cache.reset()
            assert type(cache) is StaticCache
            assert cache.get_seq_length() == 0


def test_the_cache_counts_every_token_and_holds_the_kept_ones(model, family):
    inputs = ask(family)
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        cache = model(**inputs).past_key_values
        dropped = sum(image.total - len(image.kept) for image in vlprune.report(model).images)
    length = inputs["input_ids"].shape[1]
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == length
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length - dropped] * len(cache.layers)


# ------------------------------------------------------------------ other inputs and outputs


def test_embeddings_with_pixels_are_pruned(model, family):
    """A prompt given as inputs_embeds, with the placeholders' embeddings in it, is pruned like its input_ids."""
    inputs = ask(family, (1, 2, 0))
    embedded = {k: v for k, v in inputs.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        kept = [image.kept for image in vlprune.report(model).images]
        assert torch.equal(model(**embedded).logits[:, -1], expected)
        assert [image.kept for image in vlprune.report(model).images] == kept
        assert torch.equal(zoo.generate(model, embedded).raw, zoo.generate(model, inputs).raw)


def test_embeddings_without_pixels_are_left_alone(model, family):
    """Embeddings into which nobody puts image features: bit-identical to the model without a method."""
    inputs = ask(family)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    expected = zoo.generate(model, embedded)
    with vlprune.applied(model, "hired", budget=0.4):
        assert torch.equal(zoo.generate(model, embedded).raw, expected.raw)


def test_no_image_at_all(model, family):
    """Text alone, before and after a prompt with an image: bit-identical, and the cache is an ordinary one."""
    text = ask(family, (0, 0))
    expected = zoo.generate(model, text)
    with vlprune.applied(model, "hired", budget=0.4):
        for _ in range(2):
            out = zoo.generate(model, text)
            assert torch.equal(out.raw, expected.raw)
            assert type(out.past_key_values) is DynamicCache
            zoo.generate(model, ask(family))


def test_image_features_asked_for_by_themselves_do_not_reach_the_next_prompt(model, family):
    """get_image_features() called by the user, then a prompt of text alone."""
    inputs, text = ask(family), ask(family, (0,))
    with torch.no_grad():
        expected = model(**text).logits
    arguments = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    if zoo.VERSION < (5, 0):
        arguments.update(vision_feature_layer=-2, vision_feature_select_strategy="default")
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        model.model.get_image_features(**arguments)
        assert torch.equal(model(**text).logits, expected)


if zoo.VERSION >= (5, 18):

    def test_image_features_encoded_beforehand_bring_their_own_choice(model, family):
        """Two images encoded one after the other, used in the other order, each with what was chosen for it."""
        prompts = [ask(family, seed=seed) for seed in (4, 8)]
        with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
            expected = [model(**prompt).logits[:, -1] for prompt in prompts]
            pictures = [{k: p[k] for k in ("pixel_values", "image_sizes") if k in p} for p in prompts]
            encoded = [model.model.get_image_features(**picture) for picture in pictures]
            for prompt, features, logits in reversed(list(zip(prompts, encoded, expected, strict=True))):
                text = {k: prompt[k] for k in ("input_ids", "attention_mask")}
                out = model(**text, mm_encoder_outputs={"image": features})
                torch.testing.assert_close(out.logits[:, -1], logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
        {"logits_to_keep": 1},
        {"use_cache": False},
    ],
    ids=str,
)
def test_outputs_that_can_be_asked_for(family, options):
    """Hidden states, attentions and tuples come along, and the logits are the same as without them."""
    model = zoo.build(family, "eager")
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        expected = model(**inputs).logits
        out = model(**inputs, **options)
    logits = out[0] if isinstance(out, tuple) else out.logits
    torch.testing.assert_close(logits, expected[:, -logits.shape[1] :])
    layers = model.config.text_config.num_hidden_layers
    if options.get("output_hidden_states") and not isinstance(out, tuple):
        assert len(out.hidden_states) == layers + 1
    if options.get("output_attentions"):
        assert len(out.attentions) == layers


@pytest.mark.parametrize("options", [{"return_dict": False}, {"output_hidden_states": True}], ids=str)
def test_the_base_model_by_itself(family, options):
    """model.model(...), without the language head."""
    model = zoo.build(family)
    inputs = zoo.prompt(family)
    with vlprune.applied(model, "hired", budget=0.4), torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        assert torch.equal(model.model(**inputs, **options)[0], expected)


def test_generate_returns_what_is_asked_for(family):
    """Scores, hidden states and attentions of every step."""
    model = zoo.build(family, "eager")
    options = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    with vlprune.applied(model, "hired", budget=0.4):
        out = zoo.generate(model, zoo.prompt(family), new_tokens=3, **options)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == 3
