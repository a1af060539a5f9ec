"""Tokens that leave inside the LLM, at any layer, several times, merged or not, and from the cache: always as if masked.

The methods here exist to ask everything of the engine that a method may ask; whether a real one chooses well is no question.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import vlprune
from tests import zoo
from tests.reference import Dropped, dropped, masked
from tests.test_generation import append, assert_equal, crop, full_cache
from tests.test_robustness import dispatched, lora
from tests.test_training import assert_equal as assert_gradients_equal
from tests.test_training import batch, gradients
from vlprune.image import CacheTokens, ImageLayout, LayerTokens, ModelShape, top
from vlprune.method import Merge, Method, Plan, Selection

LAYERS = 4
FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"]
"""One tile, many tiles, M-RoPE, features added in the first layers of the LLM, sliding windows."""


def loudest(tokens: LayerTokens) -> Tensor:
    return tokens.hidden[tokens.visual].float().norm(dim=-1)


@dataclass(kw_only=True)
class Exit(Method):
    """All visual tokens leave before layer 2."""

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(layout.total, {2: 0})

    def prefill(self, tokens: LayerTokens) -> Selection:
        return Selection(tokens.visual.new_zeros(0))


@dataclass(kw_only=True)
class Stairs(Method):
    """Fewer and fewer before each layer."""

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        return Plan(total, {0: total - 1, 1: total * 3 // 4, 2: total // 2, 3: 1})

    def prefill(self, tokens: LayerTokens) -> Selection:
        return Selection(top(loudest(tokens), tokens.count).sort().values)


@dataclass(kw_only=True)
class Merging(Method):
    """Every second token becomes the mean of itself and the next before layer 1, and again before layer 3."""

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        half = (layout.total + 1) // 2
        return Plan(layout.total, {1: half, 3: (half + 1) // 2})

    def prefill(self, tokens: LayerTokens) -> Selection:
        index = torch.arange(tokens.visual.shape[0])
        return Selection(index[::2], Merge(index // 2))


@dataclass(kw_only=True)
class ByHead(Method):
    """Each head keeps the entries with its longest keys."""

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(layout.total, cached={layer: layout.total // (layer + 2) for layer in range(shape.text_layers)})

    def evict(self, tokens: CacheTokens) -> Selection:
        return Selection(top(tokens.keys.norm(dim=-1), tokens.count).sort(-1).values)


@dataclass(kw_only=True)
class Halving(Method):
    """Half of what is left goes after the prompt, and after every two tokens that are generated; by head in odd layers."""

    adaptive = True
    every = 2  # pyright: ignore

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(layout.total, cached=dict.fromkeys(range(shape.text_layers), layout.total))

    def evict(self, tokens: CacheTokens) -> Selection:
        scores = tokens.keys.norm(dim=-1)
        scores = scores if tokens.layer % 2 else scores.mean(0)
        return Selection(top(scores, (scores.shape[-1] + 1) // 2).sort(-1).values)


@dataclass(kw_only=True)
class Content(Method):
    """The loud ones stay, however many they are; so do cached ones of loud keys."""

    adaptive = True

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        return Plan(total, {1: total, 3: total}, {0: total, 2: total})

    def prefill(self, tokens: LayerTokens) -> Selection:
        loud = loudest(tokens)
        return Selection((loud > 0.97 * loud.mean()).nonzero()[:, 0])

    def evict(self, tokens: CacheTokens) -> Selection:
        loud = tokens.keys.norm(dim=-1).mean(0)
        return Selection((loud > loud.mean()).nonzero()[:, 0])


METHODS: dict[str, Method] = {cls.__name__: cls() for cls in (Exit, Stairs, Merging, ByHead, Halving, Content)}
EVERYTHING = vlprune.chain(
    vlprune.Random(budget=0.8), vlprune.FastV(layer=2, keep=0.6), vlprune.SnapKV(budget=0.5, window=3, kernel=3)
)
"""Before the LLM, inside of it, and from the cache."""


@cache
def model_of(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return zoo.build(family, attention, dtype)


def averaged(model: Any, inputs: dict[str, Tensor], method: Method) -> dict[int, Callable[[Tensor], Tensor]]:
    """What :class:`Merging` does to the hidden states, with the tokens where they are."""
    if not isinstance(method, Merging):
        return {}
    images = vlprune.report(model).images
    runs: list[tuple[int, Tensor]] = []
    for sample, row in enumerate(inputs["input_ids"] == zoo.IMAGE):
        places = row.nonzero()[:, 0]
        while len(places):
            total = images[len(runs)].total
            runs.append((sample, places[:total]))
            places = places[total:]

    def means(hidden: Tensor, step: int) -> Tensor:
        hidden = hidden.clone()
        for sample, places in runs:
            there = places[::step]
            for first, second in zip(there[::2].tolist(), [*there[1::2].tolist(), None], strict=False):
                if second is not None:
                    hidden[sample, first] = (hidden[sample, first] + hidden[sample, second]) / 2
        return hidden

    return {1: lambda hidden: means(hidden, 1), 3: lambda hidden: means(hidden, 2)}


def pruned_and_masked(model: Any, inputs: dict[str, Tensor], method: Method, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``run()`` gives on the pruned model, and on the unpruned one with the dropped tokens masked."""
    with vlprune.applied(model, method):
        pruned = run()
        report = vlprune.report(model)
        gone = dropped(model, inputs, report, method.every)
        changed = averaged(model, inputs, method)
    assert gone.any()
    with masked(model, inputs, gone, changed=changed):
        return pruned, run()


CASES = [
    (family, scenario, cache, attention)
    for family in FAMILIES
    for scenario, cache, attention in [
        ("single", "dynamic", "sdpa"),
        ("single", "static", "eager"),
        ("batch", "dynamic", "eager"),
        ("batch", "static", "sdpa"),
    ]
    if cache in zoo.FAMILIES[family].caches
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "scenario", "cache", "attention"), CASES)
def test_whatever_leaves_is_as_if_masked(family, scenario, cache, attention, method):
    """Logits of every step within 1e-4 in float32, and the same greedy tokens."""
    model = model_of(family, attention)
    inputs = zoo.prompt(family, **zoo.SCENARIOS[scenario])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    pruned, expected = pruned_and_masked(
        model, inputs, METHODS[method], lambda: zoo.generate(model, inputs, new_tokens=6, **options)
    )
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-4, rtol=0)


def test_a_method_is_asked_again_every_so_many_tokens():
    """After the prompt, and after 2, 4 and 6 tokens; each layer has half of what it had."""
    model, inputs = model_of("llava"), zoo.prompt("llava")
    with vlprune.applied(model, Halving()):
        cache = zoo.generate(model, inputs, new_tokens=7).past_key_values
        stages = vlprune.report(model).images[0].stages
    assert [[s.tokens_out for s in stages if s.layer == layer] for layer in range(LAYERS)] == [[8, 4, 2, 1]] * LAYERS
    assert [torch.tensor(s.kept).ndim for s in stages[:LAYERS]] == [1, 2, 1, 2]
    length = inputs["input_ids"].shape[1] + 6
    assert cache.get_seq_length() == length
    assert [layer.keys.shape[2] for layer in cache.layers] == [length - 15] * LAYERS


@pytest.mark.parametrize("early", [False, True])
def test_a_layer_is_evicted_as_soon_as_the_prompt_has_lost_its_last_token(early):
    """Before the next layer runs; layers that wait for a drop further up are evicted right after it."""
    snapkv = vlprune.SnapKV(budget=4)
    method = vlprune.chain(vlprune.FastV(layer=2, keep=0.5), snapkv) if early else snapkv
    model, inputs, cache = zoo.build("llava"), zoo.prompt("llava"), DynamicCache()
    held: list[list[int]] = []

    def note(*_: Any) -> None:
        held.append([layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None])

    with vlprune.applied(model, method), torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(note)
        model(**inputs, past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    short = length - 16 + 4
    assert held == [[], [length if early else short], [short] * 2, [short] * 3]
    assert [layer.keys.shape[2] for layer in cache.layers] == [short] * LAYERS


def test_a_visual_exit_leaves_no_visual_token_behind():
    """The layers from 2 on hold as many entries as the prompt has words, and samples without an image are not longer."""
    model, inputs = model_of("llava"), zoo.prompt("llava", **zoo.SCENARIOS["batch"])
    with vlprune.applied(model, Exit()), torch.no_grad():
        cache = model(**inputs).past_key_values
        report = vlprune.report(model)
    words = (inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)).sum(1).max()
    assert [layer.keys.shape[2] for layer in cache.layers[2:]] == [words] * 2
    assert report.leaving == 0
    assert report.layer_mean == report.total / 2


# ------------------------------------------------------------------ ways to generate

IMAGES = {"one_image": (1,), "padded": (1, 1, 0)}
MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static_beams": {"num_beams": 2, "cache_implementation": "static"},
    "no_cache": {"use_cache": False},
}


def ask(family: str, images: tuple[int, ...] = (1,), **options: Any) -> dict[str, Tensor]:
    return zoo.prompt(family, images, (7, 4, 9)[: len(images)], dtype=torch.float64, **options)


def exact(family: str) -> Any:
    return model_of(family, dtype=torch.float64)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_ways_to_decode(family, mode, images):
    """Without a cache every step reads the prompt anew, and chooses by what generated tokens do not change."""
    inputs, model = ask(family, IMAGES[images]), exact(family)
    method = Stairs() if mode == "no_cache" else EVERYTHING
    pruned, expected = pruned_and_masked(model, inputs, method, lambda: zoo.generate(model, inputs, **MODES[mode]))
    assert_equal(pruned, expected)


@pytest.mark.parametrize("method", ["Halving", "everything"])
def test_beams_carry_what_each_of_them_has_left(method):
    """Each sequence has the score that it has when it is decoded alone, also where the cache goes on losing entries."""
    inputs, model = ask("llava"), exact("llava")
    with vlprune.applied(model, EVERYTHING if method == "everything" else Halving()):
        beams = zoo.generate(model, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
        for sequence, expected in zip(beams.sequences, beams.sequences_scores, strict=True):
            found = stepwise(model, inputs, sequence).mean().float()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def stepwise(model: Any, inputs: dict[str, Tensor], sequence: Tensor) -> Tensor:
    """Log probabilities of what ``sequence`` says after the prompt, one token at a time."""
    tokens, found = sequence[inputs["input_ids"].shape[1] :], []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for token in tokens:
            found.append(out.logits[0, -1].log_softmax(-1)[token])
            out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(found)


def test_drafts_are_no_part_of_the_prompt():
    """Prompt lookup equals greedy: what is kept does not depend on drafts, and rejected ones leave every layer's cache."""
    inputs, model = ask("llava"), zoo.build("llava", dtype=torch.float64)
    inputs["input_ids"][0, -6:] = torch.tensor([5, 6, 7, 5, 6, 7])
    if zoo.VERSION < (5, 13):
        model.generation_config.eos_token_id = 98  # those versions cannot do without one
    with vlprune.applied(model, EVERYTHING):
        greedy = zoo.generate(model, inputs, new_tokens=20)
        kept = [stage.kept for stage in vlprune.report(model).images[0].stages]
        assisted = zoo.generate(model, inputs, new_tokens=20, prompt_lookup_num_tokens=3)
        assert [stage.kept for stage in vlprune.report(model).images[0].stages] == kept
    assert torch.equal(greedy.sequences, assisted.sequences)


@dataclass(frozen=True, eq=False)
class Turns(Dropped):
    """Two prompts, one behind the other: ``writing`` while the second is read, ``later[0]`` afterwards."""

    def at(self, layer: int, new: int) -> Tensor:
        return (self.writing if new < 0 else self.later[0])[layer]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("before", "after"), [((1,), (1,)), ((1, 2, 0), (1, 0, 2))], ids=["single", "batch"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_second_turn_with_a_new_image(family, before, after, cache):
    """Both turns prune everywhere; layers and heads go on behind whatever the first turn has left in them."""
    model, first, second = exact(family), ask(family, before), ask(family, after, seed=3)
    found: list[Dropped] = []

    def note(inputs: dict[str, Tensor]) -> None:
        if hasattr(model, "_vlprune"):
            found.append(dropped(model, inputs, vlprune.report(model)))

    def turns() -> tuple[dict[str, Tensor], Tensor]:
        past = full_cache(model, cache)
        ids = zoo.generate(model, first, past_key_values=past, new_tokens=3).sequences
        note(first)
        both = append(ids, first, second["input_ids"], second["attention_mask"])
        fed = {k: v for k, v in second.items() if k not in zoo.PER_TOKEN}
        length = int(past.get_seq_length())
        fed |= {"input_ids": both["input_ids"][:, length:], "attention_mask": both["attention_mask"]}
        if "mm_token_type_ids" in second:
            fed["mm_token_type_ids"] = (fed["input_ids"] == zoo.IMAGE).long()
        if family == "qwen3_vl":
            fed["position_ids"] = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)[None, :, length:].expand(3, -1, -1)
        with torch.no_grad():
            out = [model(**fed, past_key_values=past).logits[:, -1]]
            note(second)
            for token in (5, 6):
                both["attention_mask"] = torch.nn.functional.pad(both["attention_mask"], (0, 1), value=1)
                fed = {"input_ids": torch.full((len(before), 1), token), "attention_mask": both["attention_mask"]}
                if family == "qwen3_vl":
                    fed["position_ids"] = (both["attention_mask"].sum(1) - 1)[None, :, None].expand(3, -1, -1)
                out.append(model(**fed, past_key_values=past).logits[:, -1])
        return both, torch.stack(out, 1)

    with vlprune.applied(model, EVERYTHING):
        both, pruned = turns()
    length = both["input_ids"].shape[1]

    def joined(one: Tensor, two: Tensor) -> Tensor:
        heads = [t if t.ndim == 3 else t[:, None] for t in (one, two)]
        most = max(t.shape[1] for t in heads)
        whole = torch.zeros(len(before), most, length, dtype=torch.bool)
        whole[..., : one.shape[-1]] |= heads[0]
        whole[..., length - two.shape[-1] :] |= heads[1]
        return whole

    read, written = (
        [joined(o, t) for o, t in zip(found[0].writing, turn, strict=True)] for turn in (found[1].reading, found[1].writing)
    )
    alone = [torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in found[0].reading]
    prompts = {**both, "attention_mask": both["attention_mask"][:, :length]}
    with masked(model, prompts, Turns(alone, read, [written])):
        again, expected = turns()
    assert torch.equal(both["input_ids"], again["input_ids"])
    torch.testing.assert_close(pruned, expected, atol=1e-9, rtol=0)


# ------------------------------------------------------------------ caches


def answer(model: Any, cache: Any, tokens: tuple[int, ...] = (5, 6, 7)) -> Tensor:
    """Logits of some tokens fed one at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits for t in tokens], 1)


def read(model: Any, inputs: dict[str, Tensor], kind: str = "dynamic") -> Any:
    cache = full_cache(model, kind)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("method", [EVERYTHING, Halving()], ids=["everything", "again and again"])
def test_a_copied_cache_goes_on_by_itself(method, kind):
    """Layers of different lengths, heads with entries of their own, and what is due later: all of it is copied."""
    inputs, model = ask("llava"), exact("llava")
    with vlprune.applied(model, method):
        cache = read(model, inputs, kind)
        copied = copy.deepcopy(cache)
        expected = answer(model, cache)
        assert torch.equal(answer(model, copied), expected)
        assert copied.get_seq_length() == cache.get_seq_length() == inputs["input_ids"].shape[1] + 3


def test_a_cropped_cache_forgets_in_every_layer():
    inputs, model = ask("llava"), exact("llava")
    with vlprune.applied(model, EVERYTHING):
        expected = answer(model, read(model, inputs), (5, 6, 7))
        cache = read(model, inputs)
        answer(model, cache, (5, 8, 9))
        crop(cache, 2)
        assert torch.equal(answer(model, cache, (6, 7)), expected[:, 1:])
        with pytest.raises(vlprune.IncompatibleCacheError, match="behind the image"):
            crop(cache, inputs["input_ids"].shape[1] - 2)


def test_a_reset_cache_is_an_ordinary_one():
    inputs, model = ask("llava"), exact("llava")
    with vlprune.applied(model, Halving()):
        cache = read(model, inputs, "static")
        expected = answer(model, cache)
        cache.reset()
        assert type(cache) is StaticCache
        assert cache.get_seq_length() == 0
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
        assert torch.equal(answer(model, cache), expected)


def test_text_alone_is_left_alone():
    """Bit-identical, with an ordinary cache, before and after a prompt with an image."""
    text, model = ask("llava", (0, 0)), exact("llava")
    expected = zoo.generate(model, text)
    with vlprune.applied(model, EVERYTHING):
        for _ in range(2):
            out = zoo.generate(model, text)
            assert torch.equal(out.raw, expected.raw)
            assert type(out.past_key_values) is DynamicCache
            zoo.generate(model, ask("llava"))


def test_a_compiled_decode_step_over_layers_of_different_lengths():
    """One graph for ten steps, whatever each layer and head holds."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    dynamo.reset()
    model, inputs = zoo.build("llava"), zoo.prompt("llava")
    counter = CompileCounter()
    compiled = torch.compile(model.__call__, backend=counter, dynamic=False)
    frames: list[int] = []

    def steps(step: Any) -> Tensor:
        cache, start = full_cache(model, "static", 64), inputs["input_ids"].shape[1]
        logits = []
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            for i in range(10):
                allowed = (torch.arange(64) <= start + i)[None, None, None]
                arguments: dict[str, Any] = {"position_ids": torch.tensor([[start + i]])}
                if zoo.VERSION < (5, 4):
                    arguments["cache_position"] = torch.tensor([start + i])
                token = torch.tensor([[5 + i]])
                logits.append(
                    step(input_ids=token, attention_mask=allowed, past_key_values=cache, use_cache=True, **arguments).logits
                )
                frames.append(counter.frame_count)
        return torch.cat(logits, 1)

    with vlprune.applied(model, EVERYTHING):
        expected = steps(model)
        torch.testing.assert_close(steps(compiled), expected, atol=1e-4, rtol=0)
    assert frames[-1] == frames[-10] >= 1
    dynamo.reset()


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_equal_those_of_the_masked_model(family, reentrant):
    """Of every parameter; also where the layers run a second time during the backward pass."""
    model = zoo.build(family, dtype=torch.float64).train()
    inputs, labels = batch(family)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with vlprune.applied(model, vlprune.FastV(layer=1, keep=0.4)):
        pruned = gradients(model, inputs, labels)
        gone = dropped(model, inputs, vlprune.report(model))
    model.gradient_checkpointing_disable()
    with masked(model, inputs, gone):
        assert_gradients_equal(pruned, gradients(model, inputs, labels))


# ------------------------------------------------------------------ copies of the model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
        return torch.cat(
            [out.logits[:, -1:], model(input_ids=inputs["input_ids"][:, -1:], past_key_values=out.past_key_values).logits], 1
        )


@pytest.mark.parametrize("way", ["deepcopy", "saved", "lora", "dispatched"])
def test_a_model_that_prunes_everywhere_is_copied_and_wrapped(way, tmp_path):
    model, inputs = zoo.build("llava"), zoo.prompt("llava")
    plain = logits(model_of("llava"), inputs)
    vlprune.apply(model, EVERYTHING)
    if way == "saved":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    expected = logits(model, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "lora":
        other = lora(model)
    elif way == "dispatched":
        other = dispatched(model, tmp_path)
    torch.testing.assert_close(logits(other, inputs), expected, atol=1e-5, rtol=0)
    if way in ("deepcopy", "saved"):
        vlprune.remove(other)
        torch.testing.assert_close(logits(other, inputs), plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ chains


def test_a_chain_equals_the_masked_model():
    """HiRED before the LLM, FastV inside it, SnapKV on its cache."""
    model, inputs = model_of("llava_next"), zoo.prompt("llava_next", **zoo.SCENARIOS["batch"])
    method = vlprune.chain(vlprune.HiRED(budget=0.5), vlprune.FastV(layer=1, budget=0.6), vlprune.SnapKV(budget=0.5, window=3))
    pruned, expected = pruned_and_masked(model, inputs, method, lambda: zoo.generate(model, inputs))
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-4, rtol=0)


def test_a_fraction_is_of_what_reaches_the_method():
    """Of 16 tokens 8 enter, 4 of them go on into layer 2, and the cache keeps 2 of those everywhere."""
    method = vlprune.chain(vlprune.Random(budget=0.5), vlprune.FastV(layer=2, keep=0.5), vlprune.SnapKV(budget=0.5))
    model = model_of("llava")
    with vlprune.applied(model, method), torch.no_grad():
        model(**zoo.prompt("llava"))
        stages = vlprune.report(model).images[0].stages
    assert [(s.name, s.layer, s.tokens_in, s.tokens_out) for s in stages] == [
        ("select", None, 16, 8),
        ("prefill", 2, 8, 4),
        ("evict", 0, 8, 2),
        ("evict", 1, 8, 2),
        ("evict", 2, 4, 2),
        ("evict", 3, 4, 2),
    ]


def test_a_chain_is_written_down_and_read_back():
    assert vlprune.from_dict(json.loads(json.dumps(EVERYTHING.to_dict()))) == EVERYTHING
    model = model_of("llava")
    with vlprune.applied(model, EVERYTHING), torch.no_grad():
        model(**zoo.prompt("llava"))
        assert vlprune.from_dict(vlprune.report(model).method) == EVERYTHING


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ((vlprune.FastV(), vlprune.HiRED()), "hired chooses what enters the LLM, so it stands first"),
        ((vlprune.SnapKV(), vlprune.FastV()), "snapkv evicts .* so it stands last"),
        ((vlprune.Random(), vlprune.Pool()), "pool chooses what enters the LLM, so it stands first"),
        ((), "takes objects of methods"),
        (("hired",), "takes objects of methods"),
    ],
)
def test_an_order_in_which_methods_cannot_stand(methods, said):
    with pytest.raises(vlprune.OptionError, match=said):
        vlprune.chain(*methods)


@pytest.mark.parametrize(
    ("layers", "said"), [((2, 2), "before the same LLM layer"), ((2, 1), "in the order of their LLM layers")]
)
def test_layers_of_a_chain_that_do_not_ascend(layers, said):
    model = model_of("llava")
    method = vlprune.chain(*(vlprune.FastV(layer=layer, keep=0.5) for layer in layers))
    with vlprune.applied(model, method), pytest.raises(vlprune.OptionError, match=said):
        model(**zoo.prompt("llava"))
