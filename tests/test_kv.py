"""Methods that evict from the KV cache: against their definitions in plain Python, and what the engine makes of choices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests import inside, test_stages, zoo
from tests.between import CLIP, CONTENTS
from tests.reference import dropped, masked
from tests.test_costs import waits
from tests.test_generation import full_cache
from tests.test_stages import pruned_and_masked, stepwise
from vlprune import budget as budgets
from vlprune.engine.merging import merged
from vlprune.engine.text_signals import gumbel
from vlprune.errors import OptionError, UnsupportedMethodError
from vlprune.image import CacheTokens, ImageLayout, LayerTokens
from vlprune.integrations.llava import single
from vlprune.method import Merge, Selection
from vlprune.methods.kv.policy import RunningPolicy
from vlprune.methods.kv.pyramidkv import pyramid
from vlprune.retrieval import retrieval_layers, retrieval_scores
from vlprune.signals import AttentionColumns, AttentionSupport, QueryAttention, SinkShare

LAYER, HEADS, GROUP = 1, 4, 2
Rows = list[list[float]]


def cached(method: vlprune.Method, content: str, side: int = 4, seed: int = 0) -> CacheTokens:
    """An image of ``side`` x ``side`` tokens in the cache of layer 1, with what ``method`` asks for."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    weights, vectors = CONTENTS.get(
        content, (lambda g, *size: noise(*size).mul(2).softmax(-1), lambda g, *size: noise(*size, 4))
    )
    layout = single(side)
    signals = {}
    for signal in method.wants(CLIP):
        if isinstance(signal, AttentionSupport):
            signals[signal] = 1 + 9 * torch.rand(HEADS, generator=generator)
        elif signal.layer == LAYER:
            signals[signal] = weights(generator, 1, HEADS, layout.total)[0]
    return CacheTokens(
        layer=LAYER,
        keys=vectors(generator, 1, HEADS // GROUP, layout.total)[0],
        values=vectors(generator, 1, HEADS // GROUP, layout.total)[0],
        positions=torch.arange(layout.total),
        count=method.plan(layout, CLIP).cached.get(LAYER, layout.total),
        new_tokens=0,
        layout=layout,
        shape=CLIP,
        signals=signals,
        output=noise(HEADS, 6, 4).mul(8).round() / 8,
    )


# ------------------------------------------------------------------ definitions, in loops and float64


def of_heads(tokens: CacheTokens, signal: Any, kernel: int) -> Rows:
    """The mean over the query heads that share a head of keys, and over neighbours."""
    rows = tokens[signal].double().tolist()
    heads = [[sum(c) / GROUP for c in zip(*rows[h : h + GROUP], strict=True)] for h in range(0, HEADS, GROUP)]
    return pooled(heads, kernel)


def pooled(rows: Rows, width: int) -> Rows:
    half, n = width // 2, len(rows[0])
    return [[sum(row[k] for k in range(j - half, j + half + 1) if 0 <= k < n) / width for j in range(n)] for row in rows]


def best(scores: list[float], count: int, first: frozenset[int] = frozenset()) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (j not in first, -scores[j], j))[:count])


def lengths(values: Tensor) -> Rows:
    return [[sum(abs(x) for x in row) for row in head] for head in values.double().tolist()]


def times(a: Rows, b: Rows) -> Rows:
    return [[x * y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def plain(method: Any, tokens: CacheTokens) -> list[list[int]]:
    scores = of_heads(tokens, method.votes(LAYER), method.kernel)
    return [best(row, tokens.count) for row in scores]


def h2o(method: vlprune.H2O, tokens: CacheTokens) -> list[list[int]]:
    n, recent = tokens.keys.shape[1], round(method.recent * tokens.count)
    scores = of_heads(tokens, AttentionColumns(LAYER), method.kernel)
    return [best(row, tokens.count, frozenset(range(n - recent, n))) for row in scores]


def tova(method: vlprune.TOVA, tokens: CacheTokens) -> list[int]:
    rows = tokens[AttentionColumns(LAYER, queries="last")].double().tolist()
    return best([sum(column) / HEADS for column in zip(*rows, strict=True)], tokens.count)


def vatp(method: vlprune.VATP, tokens: CacheTokens) -> list[list[int]]:
    scores = times(
        of_heads(tokens, AttentionColumns(LAYER, queries=method.window or "all"), method.kernel), lengths(tokens.values)
    )
    return [best(row, tokens.count) for row in scores]


def snapkv(method: vlprune.SnapKV, tokens: CacheTokens) -> list[list[int]]:
    return [best(row, tokens.count) for row in of_heads(tokens, method.votes(LAYER), method.kernel)]


def criticalkv(method: vlprune.CriticalKV, tokens: CacheTokens) -> list[list[int]]:
    assert tokens.output is not None
    attention, found = of_heads(tokens, method.votes(LAYER), method.kernel), []
    for head, row in enumerate(attention):
        norms = [0.0] * len(row)
        for h in range(head * GROUP, (head + 1) * GROUP):
            for j, value in enumerate(tokens.values[head].double().tolist()):
                projected = [
                    sum(w * v for w, v in zip(line, value, strict=True)) for line in tokens.output[h].double().tolist()
                ]
                norms[j] += sum(map(abs, projected)) / GROUP
        sure = frozenset(best(row, int(tokens.count * method.safeguard)))
        found.append(best([(s + 1e-4) * norm for s, norm in zip(row, norms, strict=True)], tokens.count, sure))
    return found


def ems(method: vlprune.EMS, tokens: CacheTokens) -> list[list[int]]:
    whole, end = (
        of_heads(tokens, AttentionColumns(LAYER), method.kernel),
        of_heads(tokens, AttentionColumns(LAYER, queries=method.window), method.kernel),
    )
    found = []
    for a, b in zip(whole, end, strict=True):
        scale = sum(b) / sum(a) if sum(a) else 0.0
        found.append(best([max(y, x * scale) for x, y in zip(a, b, strict=True)], tokens.count))
    return found


DEFINITIONS: list[tuple[Any, Any]] = [
    (vlprune.H2O(budget=0.4), h2o),
    (vlprune.H2O(budget=7, recent=0.5), h2o),
    (vlprune.H2O(budget=7, kernel=5), h2o),
    (vlprune.A2SF(budget=0.4, forgetting=0.5), plain),
    (vlprune.Keyformer(budget=0.4), plain),
    (vlprune.LookM(budget=0.4), plain),
    (vlprune.TOVA(budget=0.4), tova),
    (vlprune.VATP(budget=0.4), vatp),
    (vlprune.VATP(budget=5, window=3), vatp),
    (vlprune.SnapKV(budget=0.4, kernel=3), snapkv),
    (vlprune.PyramidKV(budget=0.4, kernel=3), snapkv),
    (vlprune.CriticalKV(budget=0.4, kernel=3), criticalkv),
    (vlprune.CriticalKV(budget=0.4, kernel=1, safeguard=0.0), criticalkv),
    (vlprune.EMS(budget=0.4), ems),
    (vlprune.EMS(budget=0.4, kernel=3), ems),
]


@pytest.mark.parametrize(("method", "definition"), DEFINITIONS, ids=lambda value: getattr(value, "name", ""))
def test_choices_are_what_the_definition_says(method, definition):
    """Ties, zeros, constants, one dominant token; an image of one token; a budget above it."""
    for content, side, seed in [*product([*CONTENTS, "random"], [4], range(3)), ("random", 1, 0), ("ties", 2, 1)]:
        tokens = cached(method, content, side, seed)
        assert method.evict(tokens).keep.tolist() == definition(method, tokens), (content, side, seed)


def test_votes_are_those_of_the_papers():
    """Which queries count in each method, and how much."""
    assert vlprune.H2O().votes(2) == vlprune.LookM().votes(2) == vlprune.VATP().votes(2) == AttentionColumns(2)
    assert vlprune.A2SF(forgetting=0.9).votes(2) == AttentionColumns(2, decay=0.9)
    assert vlprune.TOVA().votes(2) == AttentionColumns(2, queries="last")
    assert vlprune.SnapKV(window=7).votes(2) == vlprune.PyramidKV(window=7).votes(2) == AttentionColumns(2, queries=7)
    assert vlprune.VLCache().votes(2) == AttentionColumns(2, queries="after")
    assert vlprune.Keyformer(seed=3, temperature=2.0).votes(2) == AttentionColumns(2, temperature=2.0, noise=3)


# ------------------------------------------------------------------ merging


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def merged_by_hand(keys: Rows, values: Rows, keep: list[int], way: str, least: float | None = None) -> tuple[Rows, Rows]:
    """Keys and values of one head's kept entries, after those that leave have been merged into them."""
    leave = [j for j in range(len(keys)) if j not in keep]
    nearest = {j: max(range(len(keep)), key=lambda t: (round(cosine(keys[j], keys[keep[t]]), 6), -t)) for j in leave}
    likeness = {j: cosine(keys[j], keys[keep[nearest[j]]]) for j in leave}
    if way != "pivot" and leave:
        least = sum(likeness.values()) / len(leave) if least is None else least
        leave = [j for j in leave if likeness[j] >= least - 1e-6]
    results = []
    for rows in (keys, values):
        out = []
        for t, own in enumerate(keep):
            come = [rows[j] for j in leave if nearest[j] == t]
            if way == "pivot":
                come = [[(x + y) / 2 for x, y in zip(row, rows[own], strict=True)] for row in come]
            if way == "weighted":
                come = [[likeness[j] * x for x in rows[j]] for j in leave if nearest[j] == t]
            out.append([sum(column) / (1 + len(come)) for column in zip(rows[own], *come, strict=True)])
        results.append(out)
    return results[0], results[1]


MERGING: list[tuple[Any, str, float | None]] = [
    (vlprune.LookM(budget=0.4), "pivot", None),
    (vlprune.LookM(budget=0.4, merging="average"), "average", None),
    (vlprune.LookM(budget=0.4, merging="weighted"), "weighted", None),
    (vlprune.EMS(budget=0.4, window=3, likeness=0.2), "average", 0.2),
]


@pytest.mark.parametrize(("method", "way", "least"), MERGING, ids=["pivot", "average", "weighted", "ems"])
def test_entries_that_leave_are_merged_into_the_one_most_alike(method, way, least):
    for content, side, seed in [*product([*CONTENTS, "random"], [4], range(2)), ("random", 2, 0)]:
        tokens = cached(method, content, side, seed)
        choice = method.evict(tokens)
        found = [merged(t, choice).gather(1, choice.keep[..., None].expand(-1, -1, 4)) for t in (tokens.keys, tokens.values)]
        for head, keep in enumerate(choice.keep.tolist()):
            keys, values = (t[head].double().tolist() for t in (tokens.keys, tokens.values))
            for actual, expected in zip(found, merged_by_hand(keys, values, keep, way, least), strict=True):
                torch.testing.assert_close(actual[head], torch.tensor(expected), msg=lambda m: f"{content} {seed}: {m}")  # noqa: B023


@cache
def exact(family: str = "llava") -> Any:
    return zoo.build(family, dtype=torch.float64)


def places_of(inputs: dict[str, Tensor], report: vlprune.Report) -> list[Tensor]:
    """Where the images of a prompt of one sample stand."""
    places = (inputs["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]
    return list(places.split([image.total for image in report.images]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("method", "way", "least"), MERGING, ids=["pivot", "average", "weighted", "ems"])
def test_generated_text_sees_the_merged_entries(method, way, least, kind):
    """Logits are those of the unpruned model, with entries of its cache replaced by merged ones and the others masked."""
    model, inputs = exact(), zoo.prompt("llava", images=(2,), dtype=torch.float64)
    tokens = (5, 6, 7)
    with vlprune.applied(model, method), torch.no_grad():
        past = full_cache(model, kind)
        model(**inputs, past_key_values=past)
        report = vlprune.report(model)
        gone = dropped(model, inputs, report)
        pruned = [model(input_ids=torch.tensor([[t]]), past_key_values=past).logits for t in tokens]
    with masked(model, inputs, gone), torch.no_grad():
        past = full_cache(model, "dynamic")
        model(**inputs, past_key_values=past)
        for image, places in zip(report.images, places_of(inputs, report), strict=True):
            for stage in image.stages:
                layer = past.layers[stage.layer]
                for head, keep in enumerate(stage.kept):
                    keys, values = (t[0, head, places].tolist() for t in (layer.keys, layer.values))
                    new = torch.tensor(merged_by_hand(keys, values, keep, way, least), dtype=torch.float64)
                    layer.keys[0, head, places[keep]], layer.values[0, head, places[keep]] = new
        expected = [model(input_ids=torch.tensor([[t]]), past_key_values=past).logits for t in tokens]
    torch.testing.assert_close(torch.cat(pruned), torch.cat(expected), atol=1e-5, rtol=0)


# ------------------------------------------------------------------ counts of the layers


def test_counts_of_a_pyramid():
    """Worked out by hand; and for all sizes: the sum is exact, no layer keeps more than the one below, none more than all."""
    assert pyramid(100, 1000, 5, 20) == [195, 148, 100, 52, 5]
    assert pyramid(100, 120, 5, 20) == [120, 110, 100, 90, 80]
    assert pyramid(1, 9, 4, 20) == [1, 1, 1, 1]
    for mean, total, layers, steepness in product((1, 2, 7, 30), (7, 31, 80), (1, 2, 5, 28), (1, 3.5, 20)):
        mean = min(mean, total)
        counts = pyramid(mean, total, layers, steepness)
        assert sum(counts) == mean * layers
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1
        assert counts[0] <= total


def test_a_budget_is_shared_out_over_layers_exactly():
    assert budgets.over_layers(10, [1, 3], 100) == [5, 15]
    assert budgets.over_layers(10, [1, 3], 12) == [8, 12]  # what a layer has no room for goes to the others
    assert budgets.over_layers(3, [0, 0, 1], 9) == [1, 1, 7]  # none is left without
    assert budgets.over_layers(3, [0, 0, 0], 9) == [3, 3, 3]


def test_vl_cache_of_adversarial_attention():
    """Seats go one by one to the layer whose part is least used; in it the best columns stay, of equal ones the first."""
    for content, side, by_head, budget in product([*CONTENTS, "random"], (1, 4), (False, True), (1, 0.3, 0.9)):
        method = vlprune.VLCache(budget=budget, by_head=by_head)
        tokens = cached(method, content, side)
        spread = [sum(tokens[s].double().tolist()) for s in method.wants(CLIP) if isinstance(s, AttentionSupport)]
        parts = [s / sum(spread) * 4 * method.count(side**2) for s in spread]
        given = [0] * 4
        for _ in range(4 * method.count(side**2)):
            given[max((i for i in range(4) if given[i] < side**2), key=lambda i: (parts[i] - given[i], -i))] += 1
        while 0 in given:
            given[given.index(max(given))] -= 1
            given[given.index(0)] += 1
        rows = of_heads(tokens, AttentionColumns(LAYER, queries="after"), 1)
        expected = [best(row, given[LAYER]) for row in (rows if by_head else [[sum(c) for c in zip(*rows, strict=True)]])]
        assert method.evict(tokens).keep.tolist() == (expected if by_head else expected[0]), (content, side, by_head, budget)


@pytest.mark.parametrize("by_head", [False, True])
def test_vl_cache_gives_layers_what_their_attention_is_spread_over(by_head):
    """Counts in proportion to the keys that the question looks at in each layer, and the choice, by eager attention."""
    inputs, eager = zoo.prompt("llava", images=(2,), dtype=torch.float64), zoo.build("llava", "eager", torch.float64)
    method = vlprune.VLCache(budget=0.3, threshold=0.4, by_head=by_head)
    with vlprune.applied(exact(), method), torch.no_grad():
        exact()(**inputs)
        report = vlprune.report(exact())
    with torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions
    after = int(places_of(inputs, report)[-1][-1]) + 1
    rows = [layer[0, :, after:] for layer in attention]
    spread = [float((r >= 0.4 * r.amax(-1, keepdim=True)).double().sum(-1).mean()) for r in rows]
    assert len({round(s, 3) for s in spread}) > 1
    for image, places in zip(report.images, places_of(inputs, report), strict=True):
        counts = [stage.tokens_out for stage in sorted(image.stages, key=lambda s: s.layer or 0)]
        assert sum(counts) == 4 * int(0.3 * image.total)
        quotas = [s / sum(spread) * sum(counts) for s in spread]
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
        for stage in image.stages:
            sums = rows[stage.layer or 0].sum(1)[:, places].view(2, 2, -1).mean(1)
            sums = sums if by_head else sums.mean(0, keepdim=True)
            expected = [best(row, stage.tokens_out) for row in sums.tolist()]
            assert stage.kept == (expected if by_head else expected[0])


def test_keyformers_noise_is_added_to_scores():
    """softmax((score + noise) / temperature), from eager attention; padding does not shift the noise."""
    inputs = zoo.prompt("llava", images=(1, 2), words=(4, 9), dtype=torch.float64)
    eager, seen = zoo.build("llava", "eager", torch.float64), {}

    class Noted(vlprune.Keyformer):
        def evict(self, tokens: CacheTokens) -> Selection:
            seen.setdefault(tokens.layer, []).append(tokens[self.votes(tokens.layer)])
            return super().evict(tokens)

    with vlprune.applied(exact(), Noted(budget=0.3, temperature=2.0, seed=5)), torch.no_grad():
        exact()(**inputs)
    with masked(eager, inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool)), torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions
    noises = []
    for layer, found in seen.items():
        places = [(row == zoo.IMAGE).nonzero()[:, 0] for row in inputs["input_ids"]]
        for sample, of in ((0, found[:1]), (1, found[1:])):
            own = inputs["attention_mask"][sample].nonzero()[:, 0]
            noise = gumbel(5, layer, torch.arange(2)[:, None], torch.arange(len(own))).double().repeat_interleave(2, 0)
            scores = attention[layer][sample][:, own][:, :, own].log()
            expected = ((scores + noise[:, None]) / 2).softmax(-1).sum(1)
            taken = places[sample] - own[0]
            torch.testing.assert_close(torch.cat(of, -1).double(), expected[:, taken], atol=1e-4, rtol=1e-4)
            noises.append(noise[::2].flatten())
    every = torch.cat(noises)
    assert abs(every.mean() - 0.5772) < 0.1
    assert abs(every.var() - math.pi**2 / 6) < 0.3


# ------------------------------------------------------------------ again and again, beams, turns


@dataclass(kw_only=True)
class Noting(vlprune.H2O):
    """Notes what was received each time, and what the method made of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def evict(self, tokens: CacheTokens) -> Selection:
        received = tokens[self.votes(tokens.layer)].view(2, 2, -1).mean(1)
        choice = super().evict(tokens)
        positions = tokens.positions.expand(2, -1)
        self.seen.append((tokens.layer, positions, received, positions.gather(1, choice.keep)))
        return choice


def test_sums_go_on_while_text_is_generated():
    """A dictionary of sums for each head, to which each new token's attention is added; the smallest sum leaves."""
    method, inputs = Noting(budget=6, again=1), zoo.prompt("llava", dtype=torch.float64)
    with vlprune.applied(exact(), method):
        zoo.generate(exact(), inputs, new_tokens=9)
    for layer, head in product(range(4), range(2)):
        sums: dict[int, float] = {}
        turns = [(p[head].tolist(), r[head].tolist(), k[head].tolist()) for at, p, r, k in method.seen if at == layer]
        assert [len(kept) for _, _, kept in turns] == [6, 5, 4, 3, 2, 1]
        for positions, received, kept in turns:
            assert not sums or set(positions) == set(sums)
            sums = {j: sums.get(j, 0.0) + r for j, r in zip(positions, received, strict=True)}
            sums = {j: sums[j] for j in sorted(sums, key=lambda j: -sums[j])[: len(kept)]}
            assert sorted(sums) == kept


RUNNING: list[RunningPolicy] = [vlprune.H2O(budget=0.5, again=2), vlprune.TOVA(budget=6, again=1), vlprune.Keyformer(again=3)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_goes_on_losing_entries_is_as_if_masked(kind):
    """A batch with padding; each image loses as many entries as there are new tokens, one stays."""
    model, inputs = exact(), zoo.prompt("llava", **zoo.SCENARIOS["batch"], dtype=torch.float64)
    options = {"cache_implementation": "static"} if kind == "static" else {}
    for method in RUNNING:
        pruned, expected = pruned_and_masked(model, inputs, method, lambda: zoo.generate(model, inputs, 8, **options))
        assert torch.equal(pruned.sequences, expected.sequences), method
        torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-9, rtol=0)


def test_beams_have_sums_of_their_own():
    """Each sequence has the score that it has when it is decoded alone."""
    inputs = zoo.prompt("llava", dtype=torch.float64)
    with vlprune.applied(exact(), vlprune.H2O(budget=8, again=1)):
        beams = zoo.generate(exact(), inputs, new_tokens=6, num_beams=3, num_return_sequences=3, output_scores=True)
        for sequence, expected in zip(beams.sequences, beams.sequences_scores, strict=True):
            found = stepwise(exact(), inputs, sequence).mean().float()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "method", [vlprune.VLCache(budget=0.4), vlprune.PyramidKV(budget=0.4, window=3)], ids=lambda m: m.name
)
def test_a_chat_goes_on_behind_layers_of_different_lengths(method, kind, monkeypatch):
    """A second turn with a new image, in a batch with padding."""
    monkeypatch.setattr(test_stages, "EVERYTHING", method)
    test_stages.test_a_second_turn_with_a_new_image("llava", (1, 2, 0), (1, 0, 2), kind)


# ------------------------------------------------------------------ a cascade through the layers


def test_spatten_sums_what_each_layer_has_given():
    """Importance from eager attention of the model whose dropped tokens are masked, layer by layer."""
    inputs, eager = zoo.prompt("llava_next", dtype=torch.float64), zoo.build("llava_next", "eager", torch.float64)
    with vlprune.applied(exact("llava_next"), vlprune.SpAtten(budget=0.5)), torch.no_grad():
        exact("llava_next")(**inputs)
        report = vlprune.report(exact("llava_next"))
        gone = dropped(exact("llava_next"), inputs, report)
    with masked(eager, inputs, gone), torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions
    (places,) = places_of(inputs, report)
    stages = [stage for stage in report.images[0].stages if stage.name == "prefill"]
    assert [stage.layer for stage in stages] == [1, 2, 3]
    alive, sums = list(range(len(places))), dict.fromkeys(range(len(places)), 0.0)
    for stage in stages:
        layer = (stage.layer or 0) - 1
        rows = ~gone.reading[layer][0]
        received = attention[layer][0][:, rows].sum(1).mean(0)[places].tolist()
        sums = {j: sums[j] + received[j] for j in alive}
        alive = sorted(sorted(alive, key=lambda j: (-sums[j], j))[: stage.tokens_out])
        assert stage.kept == alive


@pytest.mark.parametrize("content", inside.CONTENTS)
def test_spatten_of_adversarial_attention(content):
    """Sums over the layers gone through; of equal ones the first stays."""
    for seed in range(2):
        sums: dict[tuple[int, int], float] = {}
        for tokens, selection in inside.journeys(vlprune.SpAtten(budget=0.5), content, seed):
            places = [(tokens.layout.total, place) for place in tokens.positions.tolist()]
            for place, column in zip(places, zip(*tokens[AttentionColumns()].double().tolist(), strict=True), strict=True):
                sums[place] = sums.get(place, 0.0) + sum(column) / len(column)
            scores = [sums[place] for place in places]
            inside.assert_best(selection.keep.tolist(), scores, tokens.count)
            assert content == "random" or selection.keep.tolist() == inside.best(scores, tokens.count)


# ------------------------------------------------------------------ attention sinks


def test_a_sink_is_chosen_last():
    """The token that gets most attention leaves first if its hidden state is massive where the first token's is."""
    for method in (vlprune.SnapKV(budget=4, kernel=1), vlprune.VATP(budget=4), vlprune.TOVA(budget=4)):
        tokens = cached(method, "one dominant token")
        sink = 16 // 2
        shares = torch.full((16, 1), 0.05)
        shares[sink] = 0.6
        tokens.signals[SinkShare(LAYER)] = shares
        bare, aware = (torch.as_tensor(m.evict(tokens).keep) for m in (method, vlprune.without_sinks(method)))
        assert (bare == sink).any(-1).all()
        assert not (aware == sink).any()
        assert aware.shape == bare.shape
        everything = vlprune.without_sinks(method, threshold=0.7).evict(tokens).keep
        assert torch.equal(everything, bare)


def test_fastv_without_sinks():
    """Before a layer: hidden states tell, with the channels in which the first row of the sequence is largest."""
    method, hidden = vlprune.FastV(layer=2, keep=3), torch.ones(8, 16)
    hidden[0, 5], hidden[3, 5], hidden[4, 6] = 40.0, 30.0, 30.0  # row 3 is a sink; row 4 is massive in another channel
    signal = method.wants(CLIP)[0]
    assert isinstance(signal, QueryAttention)
    attention = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.3])
    layout = ImageLayout(5, torch.arange(5)[None], (1, 5), False, (1, 1), (torch.arange(5)[None],))
    tokens = LayerTokens(
        layer=2,
        hidden=hidden,
        visual=torch.arange(2, 7),
        positions=torch.arange(5),
        last=7,
        count=3,
        layout=layout,
        shape=CLIP,
        signals={signal: attention.expand(1, 1, 5)},
    )
    assert method.prefill(tokens).keep.tolist() == [1, 2, 4]
    assert vlprune.without_sinks(method, channels=1).prefill(tokens).keep.tolist() == [2, 3, 4]


def test_awareness_of_sinks_changes_nothing_where_there_are_none():
    """Bit for bit, in a chain as well; and where all are sinks, nothing but the place decides. It can be written down."""
    model, inputs = zoo.build("llava"), zoo.prompt("llava", **zoo.SCENARIOS["batch"])
    bare = vlprune.chain(vlprune.FastV(layer=1, keep=0.7), vlprune.H2O(budget=0.5, again=2))
    aware = vlprune.without_sinks(bare, threshold=1.0)
    assert vlprune.from_dict(aware.to_dict()) == aware
    assert aware.every == 2
    with vlprune.applied(model, bare):
        expected = zoo.generate(model, inputs)
    with vlprune.applied(model, aware):
        assert torch.equal(zoo.generate(model, inputs).raw, expected.raw)
    with vlprune.applied(model, vlprune.without_sinks(vlprune.H2O(budget=5, again=2), threshold=0.0)):
        zoo.generate(model, inputs)
        kept = [stage.kept for image in vlprune.report(model).images for stage in image.stages]
    assert kept[0] == [[0, 1, 2, 3, 4]] * 2
    assert kept[-1] == [[0]] * 2


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "make",
    [
        lambda: vlprune.H2O(recent=1.5),
        lambda: vlprune.H2O(again=0),
        lambda: vlprune.A2SF(forgetting=-0.1),
        lambda: vlprune.VATP(window=0),
        lambda: vlprune.CriticalKV(safeguard=2.0),
        lambda: vlprune.Keyformer(temperature=0.0),
        lambda: vlprune.EMS(likeness=1.5),
        lambda: vlprune.EMS(window=0),
        lambda: vlprune.LookM(merging="mean"),  # pyright: ignore[reportArgumentType]
        lambda: vlprune.VLCache(threshold=-1.0),
        lambda: vlprune.PyramidKV(steepness=0.5),
        lambda: vlprune.SnapKV(kernel=2),
        lambda: vlprune.without_sinks(vlprune.HiRED()),
        lambda: vlprune.without_sinks(vlprune.SnapKV(), threshold=2.0),
    ],
)
def test_options_out_of_range(make):
    with pytest.raises(OptionError, match="allowed|before the LLM"):
        make()


def test_weights_that_cannot_be_read_are_refused():
    """A quantised output projection has no matrix of numbers."""
    model = zoo.build("llava")
    projection = model.model.language_model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    projection.forward = lambda hidden: hidden
    with vlprune.applied(model, "criticalkv"), pytest.raises(UnsupportedMethodError, match="vatp"), torch.no_grad():
        model(**zoo.prompt("llava"))


# ------------------------------------------------------------------ layers that retrieve


def test_retrieving_layers_keep_all_and_the_others_share_the_rest():
    """Of 16 tokens the last ones, the first of which becomes the mean of all before it; in sum what the budget says."""
    method = vlprune.RazorAttention(budget=0.5, retrieval=(1,))
    assert method.plan(single(4), CLIP).cached == {0: 6, 2: 5, 3: 5}  # 4 x 8 = 16 + 6 + 5 + 5
    tokens = replace(cached(method, "random"), count=5)
    choice = method.evict(tokens)
    assert choice.keep.tolist() == [11, 12, 13, 14, 15]
    chosen = Selection(choice.keep.expand(2, -1), Merge(choice.merge.target.expand(2, -1)))  # pyright: ignore
    found = merged(tokens.keys, chosen)[:, 11:]
    torch.testing.assert_close(found[:, 1:], tokens.keys[:, 12:])
    torch.testing.assert_close(found[:, 0], sum(tokens.keys[:, j] for j in range(12)) / 12)
    for budget in (0.2, 4):
        with pytest.raises(vlprune.BudgetError, match="razorattention allows 5 to 16"):
            vlprune.RazorAttention(budget=budget, retrieval=(1,)).plan(single(4), CLIP)
    with pytest.raises(OptionError, match="layers 0 to 3"):
        vlprune.RazorAttention(retrieval=(4,)).plan(single(4), CLIP)
    assert vlprune.RazorAttention(budget=1.0, retrieval=(0, 1, 2, 3)).plan(single(4), CLIP).cached == {}


def test_heads_that_retrieve_are_found_by_what_they_look_at():
    """Three repetitions of seven tokens, query by query, from eager attention."""
    model, eager = exact("qwen2_vl"), zoo.build("qwen2_vl", "eager", torch.float64)
    scores = retrieval_scores(model, length=7, repeats=3, seed=1)
    block = torch.randint(0, 100, (7,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = torch.tensor([[1, *block, *block, *block]])
    with torch.no_grad():
        attention = eager.model.language_model(input_ids=ids, output_attentions=True).attentions
    for layer, head in product(range(4), range(2)):
        for found, offset in zip(scores, (0, 1), strict=True):
            of_queries = []
            for query_head in (2 * head, 2 * head + 1):
                sums = 0.0
                for i in range(8, 22):
                    sums += sum(
                        float(attention[layer][0, query_head, i, i - 7 * b + offset]) for b in (1, 2) if i - 7 * b >= 1
                    )
                of_queries.append(sums / 14)
            assert found[layer, head] == pytest.approx(max(of_queries), abs=1e-5)
    best = int(scores[1].argmax()) // 2
    assert retrieval_layers(model, induction=0.1, echo=0.0, length=7, repeats=3, seed=1) == (best,)
    assert retrieval_layers(model, induction=1.0, echo=0.0, length=7, repeats=2) == (0, 1, 2, 3)


# ------------------------------------------------------------------ what it costs


def test_the_device_is_not_waited_for():
    """Neither for scores nor for merging, noise, or eviction while text is generated; VL-Cache asks once for all layers."""
    inputs = zoo.prompt("llava")
    del inputs["attention_mask"]
    model = zoo.build("llava")
    quiet: list[vlprune.Method] = [*{type(method): method for method, _ in DEFINITIONS}.values()]
    quiet += [merging[0] for merging in MERGING[1:]]
    quiet += [vlprune.H2O(budget=5, again=1), vlprune.without_sinks(vlprune.SnapKV()), vlprune.SpAtten()]
    quiet += [vlprune.without_sinks(vlprune.FastV(layer=1)), vlprune.RazorAttention(budget=0.5, retrieval=(1,))]
    for method in quiet:
        assert not waits(model, inputs, method), method
    found = waits(model, inputs, vlprune.VLCache())
    assert {where.split(":")[0]: count for where, count in found.items()} == {"tolist at methods/kv/vlcache.py": 1}, found
