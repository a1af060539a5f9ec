"""CDPruner's choice against its definition, tile by tile in float64: residuals from determinants by elimination."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlprune
from tests.between import LAYOUTS
from tests.inside import BEFORE, BEHIND, CONTENTS, before_layer, cosine


def shown(method, layout, content="random", width=40, seed=0, positions=None):
    positions = torch.arange(layout.total) if positions is None else positions
    tokens = before_layer(method, layout, 0, positions, content, seed)
    if content != "random":
        return tokens
    hidden = torch.randn(tokens.hidden.shape[0], width, generator=torch.Generator().manual_seed(seed))
    return replace(tokens, hidden=hidden)


def relevances(method, tokens) -> list[float]:
    rows = tokens.hidden.double().tolist()
    visual, text = tokens.visual.tolist(), tokens.text.tolist()
    asked = [t for t in text if t > max(visual)] or text
    if not method.text:
        return [1.0] * len(visual)
    means = [round(sum(cosine(rows[v], rows[t]) for t in asked) / len(asked), 6) for v in visual]
    means = [-m for m in means] if method.negated else means
    low, high = min(means), max(means)
    return [(m - low + 1e-6) / (high - low) if high > low else 1.0 for m in means]


def greedy(kernel: list[list[float]], count: int) -> tuple[list[int], bool]:
    """What is chosen as long as the kernel has rank left, and whether that was all: one row is eliminated a round."""
    rest = [row[:] for row in kernel]
    n, chosen = len(kernel), []
    while len(chosen) < count:
        left = [i for i in range(n) if i not in chosen]
        best = max(left, key=lambda i: (round(rest[i][i], 7), -i))
        if rest[best][best] <= 1e-6:
            return chosen, False
        chosen.append(best)
        pivot = [rest[best][j] for j in range(n)]
        rest = [[rest[i][j] - pivot[i] * pivot[j] / pivot[best] for j in range(n)] for i in range(n)]
    return chosen, True


def by_hand(method, tokens) -> tuple[set[int], bool]:
    rows, relevance = tokens.hidden.double()[tokens.visual].tolist(), relevances(method, tokens)
    whole = len(rows) == tokens.layout.total
    tiles = [[p for p in tile if p >= 0] for tile in tokens.layout.placeholder.tolist()] if whole else [range(len(rows))]
    given = [0] * len(tiles)
    for _ in range(min(tokens.count, sum(map(len, tiles)))):
        given[min((t for t in range(len(tiles)) if given[t] < len(tiles[t])), key=lambda t: (given[t], t))] += 1
    keep, complete = set(), True
    for tile, share in zip(tiles, given, strict=True):
        kernel = [[relevance[i] * cosine(rows[i], rows[j]) * relevance[j] for j in tile] for i in tile]
        chosen, all_of_them = greedy(kernel, share)
        keep |= {tile[i] for i in chosen}
        complete &= all_of_them
    missing = tokens.count - len(keep)
    return keep | (set(tokens.layout.separators.tolist()[:missing]) if complete else set()), complete


@pytest.mark.parametrize("options", [{}, {"negated": True}, {"text": False}], ids=str)
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_definitions(layout, content, options):
    layout = LAYOUTS[layout]()
    for budget in {1, min(7, layout.total - 1), max(layout.total // 3, 1), layout.total - 1} - {0, layout.total}:
        method = vlprune.CDPruner(budget=budget, **options)
        tokens = shown(method, layout, content)
        keep = method.prefill(tokens).keep.tolist()
        expected, complete = by_hand(method, tokens)
        assert keep == sorted(set(keep))
        assert len(keep) == budget
        assert set(keep) == expected if complete else set(keep) >= expected


def test_the_token_that_is_like_the_question_comes_first():
    for negated, wanted in ((False, 5), (True, 20)):
        method = vlprune.CDPruner(budget=1, negated=negated)
        tokens = shown(method, LAYOUTS["one tile"]())
        question = tokens.hidden[-BEHIND:].sum(0)
        tokens.hidden[BEFORE + 5], tokens.hidden[BEFORE + 20] = question, -question
        assert method.prefill(tokens).keep.tolist() == [wanted]


def test_text_before_the_image_counts_where_there_is_none_behind_it():
    method = vlprune.CDPruner(budget=7)
    tokens = shown(method, LAYOUTS["one tile"]())
    tokens = replace(tokens, find_text=lambda: torch.arange(BEFORE))
    assert set(method.prefill(tokens).keep.tolist()) == by_hand(method, tokens)[0]
    alone = replace(shown(method, LAYOUTS["one tile"]()), find_text=lambda: torch.zeros(0, dtype=torch.long))
    plain = vlprune.CDPruner(budget=7, text=False)
    assert method.prefill(alone).keep.tolist() == plain.prefill(alone).keep.tolist()


def test_what_an_earlier_method_has_left_is_one_tile():
    method = vlprune.CDPruner(budget=7)
    tokens = shown(method, LAYOUTS["2 x 2 crops"](), positions=torch.arange(3, 60, 2))
    assert set(method.prefill(tokens).keep.tolist()) == by_hand(method, tokens)[0]


def test_what_is_no_number_still_gives_a_full_choice():
    method = vlprune.CDPruner(budget=9)
    tokens = shown(method, LAYOUTS["padded above and below"]())
    tokens.hidden[::2] = float("nan")
    assert len(method.prefill(tokens).keep.unique()) == 9


def test_another_question_another_choice():
    """Through a whole model: of one image, two questions keep different tokens, and each as many as the budget says."""
    from tests import zoo

    model = zoo.build("llava")
    kept = []
    with vlprune.applied(model, "cdpruner", budget=4):
        for seed in (0, 1):
            inputs = zoo.prompt("llava")
            words = inputs["input_ids"][0, -7:]
            words.copy_(torch.randint(3, 80, words.shape, generator=torch.Generator().manual_seed(seed)))
            zoo.generate(model, inputs)
            kept.append(vlprune.report(model).images[0].stages[-1].kept)
    assert [len(k) for k in kept] == [4, 4]
    assert kept[0] != kept[1]


def test_the_choice_does_not_depend_on_the_size_of_features():
    """Cosines alone count, so embeddings that a model scales (Gemma) are no trouble."""
    method = vlprune.CDPruner(budget=7)
    tokens = shown(method, LAYOUTS["one tile"]())
    scaled = replace(tokens, hidden=tokens.hidden * 8)
    assert method.prefill(tokens).keep.tolist() == method.prefill(scaled).keep.tolist()
