"""SparseVLM against its definition written out: raters, scores, density peaks, and what is merged into what."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import vlprune
from tests import inside, zoo
from tests.reference import dropped, masked
from vlprune.image import LayerTokens
from vlprune.integrations.llava import single
from vlprune.method import Selection
from vlprune.methods.sparsevlm import EMBEDDINGS, TEXT, clusters


def raters_by_hand(tokens: LayerTokens) -> list[int]:
    """Which text tokens rate, counted among all text."""
    embeddings = tokens.rows(EMBEDDINGS).double().tolist()
    visual = tokens.visual.tolist()
    rows = tokens.text.tolist()
    behind = [i for i, row in enumerate(rows) if row > visual[-1]] or list(range(len(rows)))
    shares = dict.fromkeys(behind, 0.0)
    for v in visual:
        powers = {i: math.exp(inside.dot(embeddings[v], embeddings[rows[i]])) for i in behind}
        for i in behind:
            shares[i] += powers[i] / sum(powers.values()) / len(visual)
    rate = [i for i in behind if shares[i] > (1 + 1e-5) / len(behind)]
    return rate or behind


def groups_by_hand(states: list[list[float]], count: int) -> list[list[int]]:
    """Members of each group, its centre first."""
    n = len(states)
    apart = [[math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)) for b in states] for a in states]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    order = sorted(range(n), key=lambda i: (-density[i], i))
    peak = {}
    for rank, i in enumerate(order):
        peak[i] = density[i] * (min(apart[i][j] for j in order[:rank]) if rank else max(map(max, apart)))
    centres = sorted(range(n), key=lambda i: (-peak[i], i))[:count]
    groups = {centre: [centre] for centre in centres}
    for i in range(n):
        if i not in groups:
            groups[min(centres, key=lambda c: apart[i][c])].append(i)
    return list(groups.values())


def by_hand(tokens: LayerTokens, raters: list[int], recycle: float) -> tuple[list[int], list[list[int]]]:
    """Tokens that stay as they are, and groups of others, centre first."""
    attention = tokens[TEXT][0].double().tolist()
    n = tokens.visual.shape[0]
    scores = [sum(attention[r][i] for r in raters) / len(raters) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    sizes = [(tokens.count, 0, 0)]
    for kept in range(1, tokens.count):
        merged = min(int(recycle * (n - kept)) + 1, n - kept)
        if recycle and tokens.count < n and kept + merged // 10 + 1 <= tokens.count:
            groups = merged // 10 + 1
            sizes.append((tokens.count - groups, min(merged, n - tokens.count + groups), groups))
    kept, merged, count = sizes[-1]
    pool = sorted(order[kept : kept + merged])
    hidden = tokens.hidden[tokens.visual].double().tolist()
    groups = groups_by_hand([hidden[i] for i in pool], count) if count else []
    return sorted(order[:kept]), [[pool[i] for i in group] for group in groups]


def members(selection: Selection) -> list[list[int]]:
    """Groups of two or more that were merged, by the tokens in them."""
    if not isinstance(selection.merge, vlprune.Merge):
        return []
    groups: dict[int, list[int]] = {}
    for token, target in enumerate(selection.merge.target.tolist()):
        if target >= 0:
            groups.setdefault(int(selection.keep[target]), []).append(token)
    return sorted(sorted(group) for group in groups.values())


@pytest.mark.parametrize("content", inside.CONTENTS)
@pytest.mark.parametrize("recycle", [0.3, 0.0, 1.0])
def test_raters_choose_and_the_best_of_the_rest_are_merged(recycle, content):
    merges = 0
    for budget, keep in ((0.3, None), (0.7, None), (1.0, (9, 4, 1))):
        method = vlprune.SparseVLM(budget=budget, keep=keep, recycle=recycle)
        chosen: dict[int, list[int]] = {}
        for tokens, selection in inside.journeys(method, content, seed=1):
            raters = chosen.setdefault(tokens.layout.total, raters_by_hand(tokens))
            kept, groups = by_hand(tokens, raters, recycle)
            assert selection.keep.tolist() == sorted([*kept, *(group[0] for group in groups)])
            assert members(selection) == sorted(map(sorted, groups))
            merges += len(groups)
    assert bool(merges) == bool(recycle)


def test_density_peaks_find_what_lies_together():
    """Three heaps of different sizes, the densest of them first."""
    generator = torch.Generator().manual_seed(0)
    heaps = [(0.0, 9, 0.1), (5.0, 6, 0.2), (-5.0, 3, 0.3)]
    states = torch.cat([middle + spread * torch.randn(n, 4, generator=generator) for middle, n, spread in heaps])
    centres, group = clusters(states, 3)
    assert group.tolist() == [0] * 9 + [group[9].item()] * 6 + [group[15].item()] * 3
    assert sorted(group[[0, 9, 15]].tolist()) == [0, 1, 2]
    assert states[centres[0]].abs().max() < 0.5


def test_the_official_list():
    """300, 200 and 110 of 576 tokens, after layers 2, 6 and 15."""
    plan = vlprune.SparseVLM(keep=(300, 200, 110)).plan(single(24), inside.LLAVA)
    assert plan.prefill == {3: 300, 7: 200, 16: 110}
    mean = sum(plan.at_layers(32)) / 32
    assert vlprune.SparseVLM(budget=mean / 576).plan(single(24), inside.LLAVA).prefill == plan.prefill


@dataclass(kw_only=True)
class Noted(vlprune.SparseVLM):
    """Notes where tokens were, and what became of them."""

    seen: dict[int, tuple[Tensor, Selection]] = field(default_factory=dict)

    def prefill(self, tokens: LayerTokens) -> Selection:
        selection = super().prefill(tokens)
        self.seen[tokens.layer] = tokens.positions, selection
        return selection


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_merged_tokens_go_on_as_the_means_of_their_groups(family):
    """Logits of the unpruned model whose rows are averaged before the same layers, and masked."""
    model, inputs = zoo.build(family, dtype=torch.float64), zoo.prompt(family, dtype=torch.float64)
    method = Noted(budget=0.6, recycle=1.0)
    with vlprune.applied(model, method):
        pruned = zoo.generate(model, inputs)
        gone = dropped(model, inputs, inside.report(model))
    places = (inputs["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]

    def averaged(layer: int, hidden: Tensor) -> Tensor:
        positions, selection = method.seen[layer]
        rows, changed = places[positions], hidden.clone()
        assert isinstance(selection.merge, vlprune.Merge)
        for slot, token in enumerate(selection.keep.tolist()):
            group = rows[selection.merge.target == slot]
            if len(group):
                changed[0, rows[token]] = hidden[0, group].mean(0)
        return changed

    assert all(selection.merge is not None for _, selection in method.seen.values())
    changed = {layer: lambda hidden, layer=layer: averaged(layer, hidden) for layer in method.seen}
    with masked(model, inputs, gone, changed=changed):
        expected = zoo.generate(model, inputs)
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-9, rtol=0)


def test_a_share_is_a_share():
    with pytest.raises(vlprune.OptionError, match="share from 0 to 1"):
        vlprune.SparseVLM(recycle=1.5)
