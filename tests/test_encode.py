"""The stage ``encode``: dropping and merging inside the vision encoder equals hiding the same rows there."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests import zoo
from tests.encoders import Record, hiding, parts_of
from tests.media import pieces
from tests.reference import hidden_positions, masked
from tests.test_signals_vision import flash_vision
from vlprune.engine import attention
from vlprune.engine.family import IMAGE
from vlprune.engine.patch import patch_of

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


class Corner(Recorder):
    """The first quarter of the rows stays, so that nobody is left of some windows."""

    needs = (vlprune.signals.ReceivedAttention(),)

    def choose(self, tokens):
        tiles, rows = tokens.patches.shape
        received = tokens[vlprune.signals.ReceivedAttention()]
        assert received.shape[2] == rows
        assert received.isfinite().all()
        return vlprune.Selection(torch.arange(max(1, rows // 4)).expand(tiles, -1))


FAMILIES = [family for family in zoo.FAMILIES if family != "llava_onevision"]
"""All but the one that mixes patches behind its encoder."""
CASES = [(Half, (1,)), (Half, (0, 1)), (Uneven, (1,)), (Pairs, (0, 1))]


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


@pytest.mark.parametrize(("method", "after"), [(Half, (0, 1)), (Uneven, (1,))])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_two_beams(family, method, after):
    model = zoo.build(family)
    # Samples of several images are wrong upstream before transformers 5.18.
    inputs = zoo.prompt(family, images=(1, 1), words=(7, 4))
    run = lambda: zoo.generate(model, inputs, num_beams=2, num_return_sequences=2)  # noqa: E731
    pruned, expected, _ = both(model, inputs, method(after=after), run)
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "after"), CASES)
@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_flash_attention_gives_the_same_features(family, method, after):
    """Filler is told as a mask of keys, and bounds of what is left; features are those of sdpa."""
    model = zoo.build(family)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    with vlprune.applied(model, method(after=after)), torch.no_grad():
        expected = pieces(zoo.image_features(model, inputs))
    with vlprune.applied(model, method(after=after)), flash_vision(model), torch.no_grad():
        features = pieces(zoo.image_features(model, inputs))
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_windows_that_nobody_is_left_of(kernel):
    """Kernels that take one at a time are not given them, flash attention is; signals are measured all the same."""
    model, inputs = zoo.build("qwen2_5_vl", kernel), zoo.prompt("qwen2_5_vl", **zoo.SCENARIOS["batch"])
    pruned, expected, _ = both(model, inputs, Corner(after=(0, 2)), lambda: zoo.generate(model, inputs))
    torch.testing.assert_close(pruned.raw, expected.raw, atol=1e-4, rtol=0)
    with vlprune.applied(model, Corner(after=(0, 2))), torch.no_grad():
        features = pieces(zoo.image_features(model, inputs))
        bounds: list[Tensor] = []
        watcher = lambda call: bounds.append(call.options["cu_seq_lens_q"])  # noqa: E731
        with flash_vision(model), attention.watching({parts_of(model).vision_attention(2): watcher}):
            flash = pieces(zoo.image_features(model, inputs))
    assert (bounds[0].diff() == 0).any()
    for ours, theirs in zip(flash, features, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_no_mask_is_built_where_images_keep_equal_numbers():
    """So a kernel without a mask stays one; with unequal numbers there is one from the drop on."""
    masks: list[Any] = []
    model = zoo.build("llava")
    inputs = zoo.prompt("llava", **zoo.SCENARIOS["batch"])
    parts = parts_of(model)
    for method, expected in ((Half(), [False] * 4), (Uneven(), [False, False, True, True])):
        masks.clear()
        watchers = {parts.vision_attention(layer): lambda call: masks.append(call.mask) for layer in range(4)}
        with vlprune.applied(model, method), attention.watching(watchers), torch.no_grad():
            zoo.image_features(model, inputs)
        assert [mask is not None for mask in masks] == expected


# ------------------------------------------------------------------ what encode sees


class Looking(Recorder):
    """Halves twice; keeps what it was shown."""

    needs = (
        vlprune.signals.Hidden(),
        vlprune.signals.ReceivedAttention(),
        vlprune.signals.Values(0),
        vlprune.signals.MeanAttention(2),
        vlprune.signals.Hidden(-1),
    )

    def __post_init__(self):
        super().__post_init__()
        self.shown: list[Any] = []
        self.selected: list[Any] = []

    def choose(self, tokens):
        tiles, rows = tokens.patches.shape
        if tokens.layer == 0:
            assert tokens.carry == {}
            tokens.carry["number"] = tokens.patches * 10.0
            tokens.carry["vector"] = tokens.hidden[..., :3] * 2
            tokens.notes["sum"] = tokens.hidden.sum()
            self.first = tokens.hidden
        else:
            assert torch.equal(tokens.carry["number"], tokens.patches * 10.0)
            assert tokens.carry["vector"].shape == (tiles, rows, 3)
        self.shown.append(tokens)
        return vlprune.Selection(torch.arange(1, rows, 2).expand(tiles, -1))

    def select(self, image):
        self.selected.append(image)
        return vlprune.Selection(image.alive[::2])


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_signals_carry_and_notes_follow_the_rows_that_are_left(family):
    model = zoo.build(family)
    inputs = zoo.prompt(family, images=(1, 1), words=(4, 4))
    method = Looking(after=(0, 1))
    with vlprune.applied(model, method), torch.no_grad():
        zoo.image_features(model, inputs)
        chosen = patch_of(model).encoder.latest[IMAGE]
    images = len(method.selected)
    early, late = method.shown[:images], method.shown[images:]
    for before, after, image, choice in zip(early, late, method.selected, chosen, strict=True):
        tiles, rows = after.patches.shape
        assert torch.equal(after.patches, before.patches[:, 1::2])
        for tokens in (before, after):
            present = tokens.patches.shape[1]
            assert {type(signal).__name__ for signal in tokens.signals} == {"Hidden", "ReceivedAttention", "Values"}
            groups = tokens.hidden.unflatten(-1, (-1, tokens[vlprune.signals.Hidden()].shape[-1]))
            torch.testing.assert_close(tokens[vlprune.signals.Hidden()], groups.mean(2), atol=1e-6, rtol=0)
            assert tokens[vlprune.signals.ReceivedAttention()].shape[2] == present
        values = vlprune.signals.Values(0)
        assert torch.equal(after[values], before[values][:, :, 1::2])
        # Select sees every patch; those that left before a block was measured have zeros there.
        assert torch.equal(image[values], before[values])
        hidden = image[vlprune.signals.Hidden(-1)]
        gone = torch.ones(tiles, image.layout.placeholder.shape[1], dtype=torch.bool)
        left = after.patches[:, 1::2]
        gone.scatter_(1, left, False)
        assert not hidden[gone].any()
        assert hidden[~gone].any(-1).all()
        assert not any(isinstance(signal, vlprune.signals.Hidden) and signal.layer is None for signal in image.signals)
        places = image.layout.placeholder.gather(1, left).flatten()
        alive = places[places >= 0].sort().values
        assert torch.equal(image.alive, alive)
        # Row ends keep the model's own newline, all other features are zero.
        zero = torch.ones(image.layout.total, dtype=torch.bool)
        zero[alive] = zero[image.layout.separators] = False
        assert not image.features[zero].any()
        assert image.features[alive].any(-1).all()
        assert torch.equal(choice.keep, alive[::2])
        assert image.notes is choice.notes
        assert image.notes["sum"] == before.hidden.sum()
        assert [(step.stage, step.layer) for step in choice.steps] == [("encode", 0), ("encode", 1), ("select", None)]
        assert choice.steps[0].tokens_in == image.layout.total
        assert choice.steps[1].tokens_in == choice.steps[0].tokens_out
        assert choice.steps[2].tokens_in == choice.steps[1].tokens_out == alive.shape[0]


def test_a_block_sees_what_the_unpatched_model_computes():
    """Before anything left, hidden rows and signals are those of the model without the method."""
    model = zoo.build("qwen3_vl")
    inputs = zoo.prompt("qwen3_vl", images=(2,), words=(4,))
    method = Half(after=(1,))
    seen: list[Any] = []
    choose = method.choose
    method.choose = lambda tokens: seen.append(tokens) or choose(tokens)
    blocks = parts_of(model).vision_layers
    out: list[Tensor] = []
    handle = blocks[1].register_forward_hook(lambda m, a, o: out.append(o))
    with vlprune.applied(model, method), torch.no_grad():
        zoo.image_features(model, inputs)
    handle.remove()
    rows = torch.cat([tokens.hidden.flatten(0, 1) for tokens in seen])
    assert torch.equal(rows, out[0].view(rows.shape))


# ------------------------------------------------------------------ refusals, and nothing


@dataclass(kw_only=True)
class Exact(vlprune.Method):
    """Keeps as many of each tile as the budget says, by encode alone."""

    name = "exact"
    off: int = 0
    at: int = 1

    def encode_layers(self, layout, shape):
        return (self.at,)

    def encode(self, tokens):
        keep = torch.arange(self.count(tokens.patches.shape[1]) + self.off)
        return vlprune.Selection(keep.expand(tokens.patches.shape[0], -1))


def test_encode_alone_meets_an_exact_budget():
    model = zoo.build("llava")
    inputs = zoo.prompt("llava", **zoo.SCENARIOS["batch"])
    with vlprune.applied(model, Exact(budget=5)), torch.no_grad():
        model(**inputs)
        assert [image.kept for image in vlprune.report(model).images] == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(
    ("options", "family", "error", "words"),
    [
        ({"off": 1}, "llava", vlprune.BudgetError, "kept 6 .* exactly 5 of 16"),
        ({"off": 12}, "llava", vlprune.BudgetError, r"rows of shape \(1, 17\) after vision block 1; .* 1 to 16"),
        ({"off": -5}, "llava", vlprune.BudgetError, r"rows of shape \(1, 0\)"),
        ({"at": 2}, "llava", vlprune.UnsupportedMethodError, r"blocks \[2\]; allowed are 0 to 1"),
        ({"at": 3}, "qwen2_vl", vlprune.UnsupportedMethodError, "allowed are 0 to"),
        ({"at": -1}, "llava", vlprune.UnsupportedMethodError, r"blocks \[-1\]"),
        ({}, "llava_onevision", vlprune.UnsupportedMethodError, "encode"),
    ],
)
def test_what_cannot_be_done_is_refused(options, family, error, words):
    """The model goes on working after it."""
    model = zoo.build(family)
    inputs = zoo.prompt(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(error, match=words), vlprune.applied(model, Exact(budget=5, **options)):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, expected)


def test_a_smaller_image_and_encode_do_not_go_together():
    class Both(Exact):
        def encoder_grid(self, layout):
            return (2, 2)

    model = zoo.build("llava")
    with vlprune.applied(model, Both(budget=2)), pytest.raises(vlprune.UnsupportedMethodError, match="one of the two"):
        zoo.image_features(model, zoo.prompt("llava"))


def test_different_numbers_need_an_encoder_with_a_mask():
    model = zoo.build("internvl")
    inputs = zoo.prompt("internvl", images=(2,), words=(4,))
    with vlprune.applied(model, Uneven()), pytest.raises(vlprune.UnsupportedModelError, match="takes no attention mask"):
        zoo.image_features(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_do_is_exactly_nothing(family):
    """Budget 1.0 asks nothing, and after remove() everything is as before."""
    model = zoo.build(family)
    inputs = zoo.prompt(family, **zoo.SCENARIOS["batch"])
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    expected = zoo.generate(model, inputs)
    before = hooks()
    with vlprune.applied(model, Exact(budget=1.0, at=99)):
        assert torch.equal(zoo.generate(model, inputs).raw, expected.raw)
    with vlprune.applied(model, Half()):
        zoo.generate(model, inputs)
    assert hooks() == before
    assert torch.equal(zoo.generate(model, inputs).raw, expected.raw)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_copies_and_files(family):
    """A copied or unpickled model goes on dropping, with hooks of its own."""
    model = zoo.build(family)
    inputs = zoo.prompt(family)
    with vlprune.applied(model, Half(after=(0, 1))), torch.no_grad():
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        expected = model(**inputs).logits
        for again in copies:
            assert patch_of(again) is not patch_of(model)
            assert torch.equal(again(**inputs).logits, expected)
            assert len(patch_of(again).method.records) == len(patch_of(model).method.records) == 2


@pytest.mark.parametrize(("family", "method"), [("llava", Uneven), ("llava", Pairs), ("qwen3_vl", Pairs)])
def test_gradients_reach_the_pixels_that_are_left(family, method):
    model = zoo.build(family).train()
    inputs = zoo.prompt(family, images=(1, 1), words=(4, 4))
    inputs["pixel_values"].requires_grad_()
    with vlprune.applied(model, method()):
        model(**inputs).logits.sum().backward()
    assert inputs["pixel_values"].grad is not None
    assert inputs["pixel_values"].grad.abs().sum() > 0


def test_an_interrupted_run_leaves_nothing_open():
    model = zoo.build("llava")
    inputs = zoo.prompt("llava")

    class Stops(Half):
        def choose(self, tokens):
            raise KeyboardInterrupt

    with vlprune.applied(model, Stops()), torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            zoo.image_features(model, inputs)
        vision = patch_of(model).encoder.vision
        assert vision.run is None
        assert not vision.probe.open
        assert not vision.probe.calls


@pytest.mark.skipif(zoo.VERSION < (5, 0), reason="a bare container before transformers 5")
def test_tuples_and_hidden_states_of_the_encoder():
    """``return_dict=False`` has the same features; states up to the drop are whole, later ones short."""
    model = zoo.build("llava")
    inputs = zoo.prompt("llava")
    with vlprune.applied(model, Half()), torch.no_grad():
        out = model.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        as_tuple = model.model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert [state.shape[1] for state in out.hidden_states] == [17, 17, 17, 9, 9]
    assert any(isinstance(part, (list, tuple)) and torch.equal(part[0], out.pooler_output[0]) for part in as_tuple)


def test_an_encoder_compiled_before_says_so():
    """Compiled code does not notice hooks that come later; nothing is left unpruned in silence."""
    model = zoo.build("llava")
    inputs = zoo.prompt("llava")
    torch.compiler.reset()
    model.model.vision_tower.compile(backend="eager")
    with torch.no_grad():
        zoo.image_features(model, inputs)
        with vlprune.applied(model, Half()), pytest.raises(vlprune.VLPruneError, match="Apply first, then compile"):
            zoo.image_features(model, inputs)
    torch.compiler.reset()
