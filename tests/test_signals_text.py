"""Signals of the LLM's layers, as a method sees them, against what an eager run of the masked model gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlprune
from tests import flash, zoo
from tests.reference import Dropped, dropped, masked, text_layers
from tests.test_generation import full_cache
from vlprune.engine import attention
from vlprune.image import CacheTokens, ImageLayout, LayerTokens, ModelShape, top
from vlprune.method import Method, Plan, Selection
from vlprune.signals import (
    AttentionColumns,
    AttentionSupport,
    Hidden,
    Keys,
    ModuleDelta,
    QueryAttention,
    ReceivedAttention,
    Signal,
    SinkShare,
    Transition,
    Values,
)

FAMILIES = ["llava", "qwen2_vl", "qwen3_vl", "gemma3"]
"""Grouped queries; M-RoPE; norms of queries and keys, and features added between layers; windows that slide."""
KERNELS = ["sdpa", "eager", "flash", "flex"]


def signals(layer: int | None) -> list[Signal]:
    """All that can be asked of a layer."""
    asked: list[Signal] = [
        QueryAttention(layer, queries=queries, mean_heads=heads, mean_queries=mean)  # pyright: ignore
        for queries in ("last", "text", 5)
        for heads in (False, True)
        for mean in (False, True)
    ]
    asked += [kind(layer, "text") for kind in (ReceivedAttention, Keys, Values, Hidden, ModuleDelta)]
    for queries, decay in (("all", 0.9), ("text", 1.0), ("after", 1.0), ("last", 1.0), (5, 0.5)):
        asked.append(AttentionColumns(layer, queries=queries, decay=decay))  # pyright: ignore[reportArgumentType]
    asked += [AttentionSupport(layer, threshold=0.3), SinkShare(layer)]
    asked += [Hidden(layer, "text", state="before"), Hidden(layer, "text", state="normed")]
    asked += [Transition(layer), Transition(layer, module="mlp")]
    return [*asked, ModuleDelta(layer, "text", module="mlp")]


@dataclass
class Seen:
    """What the method was shown at one time: ``image`` counts those of the prompt, ``layer`` is the hook's."""

    stage: str
    layer: int
    image: int
    tokens: Any
    values: dict[Signal, Tensor]
    rows: dict[Signal, Tensor]


@dataclass(kw_only=True)
class Reader(Method):
    """Notes all signals of the blocks 0, 1 and the one just run; tokens leave before the layers 1 and 3, and from caches."""

    again: int | None = None
    drops: bool = True
    layers: tuple[int | None, ...] = (None, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[Seen] = []

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(signal for layer in (*self.layers, 2, 3) for signal in signals(layer))

    @property
    def every(self) -> int | None:
        return self.again

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.again is not None

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        prefill = {1: total * 3 // 4, 3: total // 2} if self.drops else {}
        return Plan(total, prefill, dict.fromkeys(range(shape.text_layers), 1 if self.again is None else total))

    def prefill(self, tokens: LayerTokens) -> Selection:
        there = [s for s in self.wants(tokens.shape) if s in tokens.signals]
        self._note(
            "prefill", tokens, {s: tokens[s] for s in there}, {s: tokens.rows(s) for s in there if s in tokens.row_signals}
        )
        loud = tokens.hidden[tokens.visual].float().norm(dim=-1)
        return Selection(top(loud, tokens.count).sort().values)

    def evict(self, tokens: CacheTokens) -> Selection:
        self._note("evict", tokens, {s: tokens[s] for s in tokens.signals}, {})
        count = tokens.count if self.again is None else tokens.keys.shape[1] // 2
        return Selection(top(tokens.keys.norm(dim=-1), count).sort(-1).values)

    def _note(self, stage: str, tokens: Any, values: dict[Signal, Tensor], rows: dict[Signal, Tensor]) -> None:
        image = sum((s.stage, s.layer) == (stage, tokens.layer) for s in self.seen)
        self.seen.append(Seen(stage, tokens.layer, image, tokens, values, rows))


@pytest.fixture
def kernel(request: Any) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "flash":
            yield stack.enter_context(flash.registered())
        elif request.param == "flex":
            yield stack.enter_context(flash.uncompiled())
        else:
            yield request.param


def model_of(family: str, kernel: str, dtype: torch.dtype = torch.float64) -> Any:
    return flash.switch(_models(family, dtype), kernel)


@cache
def _models(family: str, dtype: torch.dtype) -> Any:
    return zoo.build(family, dtype=dtype)


def dtype_of(kernel: str) -> torch.dtype:
    """Eager attention of transformers gives NaN for padding in float64."""
    return torch.float32 if kernel == "eager" else torch.float64


class Eager:
    """An eager run: attention, keys, values, and what goes into and out of each layer, all in logical places."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], gone: Dropped, past: Any = None, **masks: Any):
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.deltas: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
        self.norm = model.model.language_model.norm
        handles = []
        for layer in text_layers(model):
            handles.append(layer.register_forward_hook(self._layer, with_kwargs=True))
            for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                handles.append(module.register_forward_hook(self._module(name), with_kwargs=True))
        cache = DynamicCache() if past is None else past
        with masked(model, masks.get("masks", inputs), gone), torch.no_grad():
            out = model(**inputs, past_key_values=cache, use_cache=True, output_attentions=True)
        for handle in handles:
            handle.remove()
        self.weights = list(out.attentions)
        self.keys, self.values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]

    def _layer(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        self.before.append(args[0] if args else kwargs["hidden_states"])
        # Some versions of transformers add to the hidden states in place afterwards.
        self.after.append((out[0] if isinstance(out, tuple) else out).clone())

    def _module(self, name: str) -> Any:
        def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            self.deltas[name].append(torch.stack([given, out[0] if isinstance(out, tuple) else out]))

        return note


@dataclass
class Prompt:
    """Where the tokens of a prompt are: ``real``, ``visual (B, L)``; its last ``drafts`` are not asked; ``past`` before it."""

    real: Tensor
    visual: Tensor
    drafts: int = 0
    past: int = 0

    def queries(self, which: str | int, sample: int, gone: Tensor | None = None) -> Tensor:
        real = self.real[sample].clone()
        places = real.nonzero()[:, 0]
        real[places[len(places) - self.drafts :]] = False
        if which == "last":
            return real.nonzero()[-1:, 0]
        if which == "all":
            assert gone is not None
            return (real & ~gone).nonzero()[:, 0]
        text = (real & ~self.visual[sample]).nonzero()[:, 0]
        if which == "after":
            return text[text > self.visual[sample].nonzero().max()]
        return text if which == "text" else text[-int(which) :]


def expected(run: Eager, prompt: Prompt, gone: Dropped, signal: Signal, layer: int, sample: int, places: Tensor) -> Tensor:
    """The values of the tokens at ``places`` of the prompt."""
    columns = places + prompt.past
    if isinstance(signal, QueryAttention):
        weights = run.weights[layer][sample][:, prompt.queries(signal.queries, sample)][..., columns]
        weights = weights.mean(0, keepdim=True) if signal.mean_heads else weights
        return weights.mean(1, keepdim=True) if signal.mean_queries else weights
    if isinstance(signal, ReceivedAttention):
        rows = prompt.real[sample] & ~gone.reading[layer][sample]
        return run.weights[layer][sample][:, rows][..., columns].mean(1)
    if isinstance(signal, AttentionColumns):
        rows = prompt.queries(signal.queries, sample, gone.reading[layer][sample]).tolist()
        weights = [signal.decay ** (len(rows) - 1 - i) * run.weights[layer][sample][:, row] for i, row in enumerate(rows)]
        return sum(weights)[:, columns]  # pyright: ignore[reportIndexIssue]
    if isinstance(signal, AttentionSupport):
        rows = run.weights[layer][sample][:, prompt.queries("after", sample)]
        return (rows >= signal.threshold * rows.amax(-1, keepdim=True)).double().sum(-1).mean(-1)
    if isinstance(signal, SinkShare):
        energy = run.before[layer][sample].double().square()
        sinks = energy[prompt.real[sample].nonzero()[0, 0]].topk(signal.channels).indices
        return (energy[:, sinks].amax(-1) / energy.sum(-1))[places, None]
    if isinstance(signal, Keys):
        return run.keys[layer][sample][:, columns]
    if isinstance(signal, Values):
        return run.values[layer][sample][:, columns]
    if isinstance(signal, Hidden):
        states = (run.before if signal.state == "before" else run.after)[layer][sample, places]
        return run.norm(states).detach() if signal.state == "normed" else states
    if isinstance(signal, Transition):
        given, out = run.deltas[signal.module][layer][:, sample, places]
        return torch.stack([out.norm(dim=-1) / given.norm(dim=-1), torch.cosine_similarity(given, out, dim=-1)], -1)
    assert isinstance(signal, ModuleDelta)
    return run.deltas[signal.module][layer][:, sample, places]


def runs_of(inputs: dict[str, Tensor], report: vlprune.Report) -> list[tuple[int, Tensor]]:
    """Sample and places of each image."""
    runs: list[tuple[int, Tensor]] = []
    for sample, row in enumerate(inputs["input_ids"] == zoo.IMAGE):
        places = row.nonzero()[:, 0]
        while len(places):
            total = report.images[len(runs)].total
            runs.append((sample, places[:total]))
            places = places[total:]
    return runs


def close(actual: Tensor, expected: Tensor, about: Any) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=1e-5, rtol=1e-5, msg=lambda m: f"{about}: {m}")


def compare(seen: list[Seen], run: Eager, prompt: Prompt, gone: Dropped, runs: list[tuple[int, Tensor]]) -> int:
    """Everything that was seen; returns how many values."""
    count = 0
    for at in seen:
        sample, places = runs[at.image]
        for signal, value in at.values.items():
            layer = at.layer - 1 if signal.layer is None else signal.layer
            close(
                value,
                expected(run, prompt, gone, signal, layer, sample, places[at.tokens.positions]),
                (at.stage, at.layer, signal),
            )
            count += 1
        if at.stage == "evict":
            close(at.tokens.keys, run.keys[at.layer][sample][:, places[at.tokens.positions] + prompt.past], "keys")
            close(at.tokens.values, run.values[at.layer][sample][:, places[at.tokens.positions] + prompt.past], "values")
            continue
        there = (prompt.real[sample] & ~gone.reading[at.layer - 1][sample]).nonzero()[:, 0]
        close(at.tokens.hidden, run.before[at.layer][sample, there], "hidden")
        assert torch.equal(there[at.tokens.visual], places[at.tokens.positions])
        assert there[at.tokens.last] == prompt.queries("last", sample)
        assert torch.equal(there[at.tokens.text], prompt.queries("text", sample))
        for signal, value in at.rows.items():
            layer = at.layer - 1 if signal.layer is None else signal.layer
            close(value, expected(run, prompt, gone, signal, layer, sample, there), (at.stage, at.layer, signal))
            count += 1
    return count


SCENARIOS: dict[str, dict[str, Any]] = {
    "single": {"images": (1,), "words": (7,)},
    "left": {"images": (1, 2, 0), "words": (7, 4, 9)},
    "right": {"images": (1, 2, 0), "words": (7, 4, 9), "side": "right"},
}
BARE = "single, without a mask"


CASES = [
    (family, kernel, scenario)
    for family in FAMILIES
    for kernel in KERNELS
    for scenario in (*SCENARIOS, BARE)
    if (family, kernel) != ("gemma3", "flash")
    # Without a mask these versions take positions of Qwen3-VL's images for those of several sequences.
    if (family, kernel, scenario) != ("qwen3_vl", "flash", BARE) or zoo.VERSION >= (5, 0)
]


@pytest.mark.parametrize(("family", "kernel", "scenario"), CASES, indirect=["kernel"])
def test_signals_equal_those_of_an_eager_run(family, kernel, scenario):
    """Of the block just run, and of earlier ones after rows have left; all rows, and the cache's entries."""
    dtype = dtype_of(kernel)
    method, inputs = Reader(), zoo.prompt(family, **SCENARIOS[scenario.split(",")[0]], dtype=dtype)
    fed = {name: value for name, value in inputs.items() if scenario != BARE or name != "attention_mask"}
    model = model_of(family, kernel, dtype)
    with vlprune.applied(model, method), torch.no_grad():
        model(**fed)
        report = vlprune.report(model)
        gone, runs = dropped(model, inputs, report), runs_of(inputs, report)
    prompt = Prompt(inputs["attention_mask"].bool(), inputs["input_ids"] == zoo.IMAGE)
    count = compare(method.seen, Eager(model_of(family, "eager", dtype), inputs, gone), prompt, gone, runs)
    assert count > 100 * len(runs)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_signals_behind_what_an_earlier_turn_has_left(kernel):
    """Keys of the past stand in front, as many as each layer has kept."""
    dtype = dtype_of(kernel)
    first = zoo.prompt("llava", (1, 2, 0), (7, 4, 9), dtype=dtype)
    second = zoo.prompt("llava", (1, 0, 2), (7, 4, 9), seed=3, dtype=dtype)
    model, method = model_of("llava", kernel, dtype), Reader()
    fed = {**second, "attention_mask": torch.cat([first["attention_mask"], second["attention_mask"]], 1)}
    with vlprune.applied(model, vlprune.SnapKV(budget=0.5, window=3)), torch.no_grad():
        past = model(**first).past_key_values
        before = dropped(model, first, vlprune.report(model))
        with vlprune.applied(model, method):
            model(**fed, past_key_values=past)
            report = vlprune.report(model)
            after, runs = dropped(model, second, report), runs_of(second, report)
    length = first["input_ids"].shape[1]
    joined = [
        torch.cat([b, a[:, None].expand(-1, b.shape[1], -1)], 2) for b, a in zip(before.writing, after.reading, strict=True)
    ]
    gone = Dropped(
        [torch.nn.functional.pad(b, (0, a.shape[1])) for b, a in zip(before.reading, after.reading, strict=True)], joined
    )
    both = {name: torch.cat([first[name], second[name]], 1) for name in zoo.PER_TOKEN if name in first}
    eager, cache = model_of("llava", "eager", dtype), DynamicCache()
    with masked(eager, both, gone), torch.no_grad():
        eager(**first, past_key_values=cache, use_cache=True)
    prompt = Prompt(second["attention_mask"].bool(), second["input_ids"] == zoo.IMAGE, past=length)
    run = Eager(eager, fed, gone, cache, masks=both)
    assert compare(method.seen, run, prompt, after, runs) > 300


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_drafts_do_not_ask(kernel):
    """The last three tokens are drafts where four logits are wanted: the question ends before them."""
    inputs, model, method = zoo.prompt("llava", dtype=torch.float64), model_of("llava", kernel), Reader()
    with vlprune.applied(model, method), torch.no_grad():
        model(**inputs, logits_to_keep=4)
        report = vlprune.report(model)
        gone, runs = dropped(model, inputs, report), runs_of(inputs, report)
    prompt = Prompt(inputs["attention_mask"].bool(), inputs["input_ids"] == zoo.IMAGE, drafts=3)
    assert compare(method.seen, Eager(model_of("llava", "eager"), inputs, gone), prompt, gone, runs) > 100


GENERATING = [
    (kernel, cache) for kernel in KERNELS for cache in ("dynamic", "static") if (kernel, cache) != ("flex", "static")
]


@pytest.mark.parametrize(("kernel", "cache"), GENERATING, indirect=["kernel"])
def test_signals_while_text_is_generated(kernel, cache):
    """The new token's attention to what each head still has, asked for after each token. Nothing is measured of the entries'
    own tokens, which were fed long ago; their keys and values are at hand."""
    dtype = dtype_of(kernel)
    inputs, model = zoo.prompt("llava", **SCENARIOS["left"], dtype=dtype), model_of("llava", kernel, dtype)
    method = Reader(again=1, drops=False)
    token = torch.full((3, 1), 5)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": token, "attention_mask": mask}
    with vlprune.applied(model, method), torch.no_grad():
        past = full_cache(model, cache)
        model(**inputs, past_key_values=past)
        gone = dropped(model, inputs, vlprune.report(model))
        runs = runs_of(inputs, vlprune.report(model))
        method.seen.clear()
        model(**step, past_key_values=past)
    eager, own = model_of("llava", "eager", dtype), DynamicCache()
    with masked(eager, inputs, gone), torch.no_grad():
        eager(**inputs, past_key_values=own)
        weights = eager(**step, past_key_values=own, output_attentions=True).attentions
    assert len(method.seen) == 12
    for at in method.seen:
        sample, places = runs[at.image]
        columns = places[at.tokens.positions]
        expected = weights[at.layer][sample, :, 0].gather(1, columns.repeat_interleave(4 // columns.shape[0], 0))
        for queries in ("last", "text", 5):
            close(at.values[QueryAttention(at.layer, queries=queries)][:, 0], expected, at.layer)
        close(at.values[ReceivedAttention(at.layer, "text")], expected, at.layer)
        sums = [value for signal, value in at.values.items() if isinstance(signal, AttentionColumns)]
        assert len(sums) == 5
        for value in sums:
            close(value, expected, at.layer)
        assert not any(isinstance(signal, (Keys, Values, Hidden, ModuleDelta, SinkShare)) for signal in at.values)
        head = own.layers[at.layer].keys[sample].gather(1, columns[..., None].expand(-1, -1, 16))
        close(at.tokens.keys, head, "keys")


# ------------------------------------------------------------------ what is not asked for


def watched(model: Any, method: Any) -> list[int]:
    """How many watchers and exchanged kernels there are while each layer's attention runs, its own hooks included."""
    found: list[int] = []

    def count(module: Any, args: Any, out: Any) -> None:
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found.append(len(attention._watchers) + len(attention._tables) + hooks - 1)

    handles = [layer.self_attn.register_forward_hook(count) for layer in text_layers(model)]
    with vlprune.applied(model, method), torch.no_grad():
        zoo.generate(model, zoo.prompt("llava"), new_tokens=2)
    for handle in handles:
        handle.remove()
    return found


def test_a_signal_that_nobody_asks_for_costs_nothing():
    """Kernels run unwatched; those of a method that asks are watched while the prompt is read, and not later."""
    model = zoo.build("llava")
    assert watched(model, vlprune.Random(budget=0.4)) == [0] * 8
    assert watched(model, vlprune.FastV(layer=2, keep=0.4)) == [2] * 4 + [0] * 4
    assert watched(model, vlprune.SnapKV(budget=0.4)) == [5] * 4 + [0] * 4


# ------------------------------------------------------------------ flash attention


FLASH = {
    "random": vlprune.Random(budget=0.4),
    "fastv": vlprune.FastV(layer=1, keep=0.4),
    "snapkv": vlprune.SnapKV(budget=0.4, window=3, kernel=3),
}


@pytest.mark.parametrize("cache", ["dynamic", *["static"] * (zoo.VERSION >= (5, 0))])
@pytest.mark.parametrize("scenario", ["single", "left"])
@pytest.mark.parametrize("method", FLASH)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("kernel", ["flash"], indirect=True)
def test_dropping_equals_masking_under_flash_attention(kernel, family, method, scenario, cache):
    """Its masks are rows of samples and keys, and gaps in position ids do not make it see several sequences."""
    inputs = zoo.prompt(family, **SCENARIOS[scenario], dtype=torch.float64)
    with vlprune.applied(model_of(family, kernel), FLASH[method]):
        options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        pruned = zoo.generate(model_of(family, kernel), inputs, **options)
        gone = dropped(model_of(family, kernel), inputs, vlprune.report(model_of(family, kernel)))
    assert gone.any()
    with masked(model_of(family, "sdpa"), inputs, gone):
        expected = zoo.generate(model_of(family, "sdpa"), inputs)
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-9, rtol=0)


def test_the_stand_in_leaves_nothing_in_transformers_tables():
    with flash.registered() as name:
        assert name in ALL_ATTENTION_FUNCTIONS
        watched(flash.switch(zoo.build("llava"), name), vlprune.SnapKV(budget=0.4))
    assert name not in ALL_ATTENTION_FUNCTIONS
    assert not attention._tables
