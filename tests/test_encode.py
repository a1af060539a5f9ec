"""The stage ``encode``: dropping and merging inside the vision encoder equals hiding the same rows there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests import zoo
from tests.encoders import Record, hiding
from tests.reference import hidden_positions, masked

# ------------------------------------------------------------------ methods


@dataclass(kw_only=True)
class Recorder(vlprune.Method):
    """Drops after the blocks ``after``; remembers what it did."""

    adaptive = True
    name = "recorder"

    after: tuple[int, ...] = (1,)
    records: list[Record] = field(default_factory=list)

    def encode_layers(self, layout, shape):
        return self.after

    def encode(self, tokens):
        assert not tokens.hidden.requires_grad
        selection = self.choose(tokens)
        self.records.append(Record(tokens.layer, tokens.layout, tokens.patches.clone(), selection))
        return selection

    def choose(self, tokens):
        raise NotImplementedError


class Half(Recorder):
    """The half of the rows with the lowest norm leaves."""

    def choose(self, tokens):
        norms = tokens.hidden.norm(dim=-1)
        keep = norms.argsort(dim=1, descending=True)[:, : norms.shape[1] // 2]
        return vlprune.Selection(keep.sort(1).values)


class Uneven(Recorder):
    """Another number of rows for each image; the first image of a run is not even asked to give any."""

    def choose(self, tokens):
        images = sum(record.layer == tokens.layer for record in self.records)
        if images % 3 == 2:
            return None
        norms = tokens.hidden.norm(dim=-1)
        keep = norms.argsort(dim=1)[:, : max(1, norms.shape[1] // 2 - 2 * (images % 3))]
        return vlprune.Selection(keep.sort(1).values)


class Pairs(Recorder):
    """Every second row goes into its neighbour, weighted; the last one is lost."""

    def choose(self, tokens):
        tiles, rows = tokens.patches.shape
        keep = torch.arange(0, rows - 1, 2).expand(tiles, -1)
        target = torch.arange(rows).div(2, rounding_mode="floor").repeat(tiles, 1)
        target[:, keep.shape[1] * 2 - 1 :] = -1
        return vlprune.Selection(keep, vlprune.Merge(target, torch.arange(1.0, rows + 1).repeat(tiles, 1)))


FAMILIES = [family for family in zoo.FAMILIES if family != "llava_onevision"]
"""All but the one that mixes patches behind its encoder."""
CASES = [(Half, (1,)), (Half, (0, 1)), (Uneven, (1,)), (Uneven, (0, 1)), (Pairs, (1,)), (Pairs, (0, 1))]


def combinations() -> list[tuple[Any, ...]]:
    """Family, scenario, method and blocks. InternVL's blocks take no mask, so its images keep equal numbers."""
    return [
        (family, scenario, method, after)
        for family in FAMILIES
        for scenario in zoo.scenarios(family)
        for method, after in CASES
        if (family, method) != ("internvl", Uneven)
    ]


def both(model: Any, inputs: dict[str, Tensor], method: Recorder, run: Any) -> tuple[Any, Any, vlprune.Report]:
    """What ``run()`` gives on the pruned model and on the reference."""
    with vlprune.applied(model, method):
        pruned = run()
        report = vlprune.report(model)
    hidden = hidden_positions(inputs, report)
    assert hidden.any()
    with masked(model, inputs, hidden), hiding(model, method.records):
        return pruned, run(), report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "scenario", "method", "after"), combinations())
def test_dropping_in_the_encoder_equals_hiding_there(family, scenario, method, after, attention):
    """Logits of every step within 1e-4 in float32, and the same greedy tokens."""
    model = zoo.build(family, attention)
    inputs = zoo.prompt(family, **zoo.scenarios(family)[scenario])
    pruned, expected, _ = both(model, inputs, method(after=after), lambda: zoo.generate(model, inputs))
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-4, rtol=0)
