"""Architectures x features: what holds for every vision transformer. An architecture joins by a :class:`Case`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
import vlprune.integrations  # registers architectures
from vlprune.engine.vit.architecture import architecture_of, tower_of

PATCHES = 36


def images(count: int = 2, size: tuple[int, int] = (42, 42), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def strong(model: nn.Module) -> nn.Module:
    """Outputs that really depend on every row: default initialisation would be too tame."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.numel():
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    return model.eval()


def tensors(found: Any) -> list[Tensor]:
    """All tensors in what a model gives out."""
    if torch.is_tensor(found):
        return [found]
    found = list(found.values()) if isinstance(found, dict) else found
    return [value for part in found or () for value in tensors(part)]


@dataclass(frozen=True)
class Case:
    """One model. ``make`` builds it, ``prefix``: its protected rows. ``inputs(count)``: arguments for so many images.

    ``variants`` change how it computes, not what. ``sizes``: images that it takes besides square ones, height and width.
    ``features``: calls that hand out rows; those ``between`` blocks as a list. ``compiled``: whether it is tried with
    torch.compile, which takes seconds. ``checkpoints``: whether the library's activation checkpointing works.
    ``plain_output``: whether nothing stands between an attention's values and its last projection. ``hides_values``: whether
    no module hands them out.
    """

    make: Callable[[], nn.Module]
    prefix: int
    inputs: Callable[..., dict[str, Any]] = field(default=lambda count=2, **options: {"x": images(count, **options)})
    variants: tuple[Callable[[nn.Module], None], ...] = (lambda model: None,)
    sizes: tuple[tuple[int, int], ...] = ()
    features: tuple[Callable[[Any, dict[str, Any]], Any], ...] = ()
    between: tuple[Callable[[Any, dict[str, Any]], Any], ...] = ()
    compiled: bool = False
    checkpoints: bool = True
    plain_output: bool = True
    hides_values: bool = False

    def build(self) -> Any:
        torch.manual_seed(0)
        return strong(self.make())

    @torch.no_grad()
    def run(self, model: Any, count: int = 2, **options: Any) -> list[Tensor]:
        return tensors(model(**self.inputs(count, **options)))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def close(left: list[Tensor], right: list[Tensor], rtol: float = 1e-4) -> bool:
    return all((a.float() - b.float()).abs().max() <= rtol * b.float().abs().max() for a, b in zip(left, right, strict=True))


def traces(model: nn.Module) -> list[Any]:
    """What a patch could leave behind."""
    return [
        (name, type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


# ------------------------------------------------------------------ features


def nothing_to_do_is_exactly_nothing(case: Case) -> None:
    model = case.build()
    before, found, keys = case.run(model), traces(model), list(model.state_dict())
    for options in ({"budget": 1.0}, {"r": 0}, {"r": []}):
        vlprune.apply(model, "tome", **options)
        assert equal(case.run(model), before)
    vlprune.apply(model, "tome", budget=0.5)
    changed = case.run(model)
    assert [a.shape for a in changed] == [b.shape for b in before]
    assert not equal(changed, before)
    assert list(model.state_dict()) == keys
    vlprune.remove(model)
    assert equal(case.run(model), before)
    assert traces(model) == found


def the_report_says_what_was_merged(case: Case) -> None:
    model = vlprune.apply(case.build(), "tome", budget=0.5)
    case.run(model)
    report = vlprune.report(model)
    assert (report.total, report.prefix, report.layer_mean) == (PATCHES, case.prefix, PATCHES / 2)
    assert sum(report.counts) == PATCHES * 4 // 2
    assert 0.4 < report.flops / report.flops_unpruned < 0.7
    for image in report.assignment:
        assert image[: report.prefix] == list(range(report.prefix))
        assert sorted(set(image)) == list(range(report.prefix + report.counts[-1]))
    assert report.to_dict()["method"]["method"] == "tome"
    assert "50.0%" in str(report)


class FourOfAKind:
    """A hook before blocks that makes every four neighbours among the patches equal, and what turns them by their place.

    So each source has an equal target beside it.
    """

    def __init__(self, prefix: int, first: bool, sequence_first: bool):
        self.prefix, self.first, self.sequence_first = prefix, first, sequence_first

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        named = {"hidden_states": args[0], **kwargs} if args else dict(kwargs)
        key = next(name for name in ("hidden_states", "x", "q_x") if name in named)
        if self.first:
            x = named[key].transpose(0, 1) if self.sequence_first else named[key]
            x = torch.cat([x[:, : self.prefix], self.alike(x[:, self.prefix :])], 1)
            named[key] = x.transpose(0, 1) if self.sequence_first else x
        for name in ("rope", "position_embeddings"):
            if torch.is_tensor(named.get(name)):
                named[name] = self.alike(named[name])
            elif named.get(name) is not None:
                named[name] = tuple(map(self.alike, named[name]))
        return ((named.pop(key), *args[1:]), named) if args else ((), named)

    def alike(self, rows: Tensor) -> Tensor:
        whole = rows.shape[-2] // 4 * 4
        return torch.cat([rows[..., :whole:4, :].repeat_interleave(4, -2), rows[..., whole:, :]], -2)


def make_equal(model: nn.Module) -> None:
    tower, architecture = tower_of(model), architecture_of(model)
    shape = architecture.shape(tower)
    for index, block in enumerate(architecture.blocks_of(tower)):
        hook = FourOfAKind(shape.prefix, index == 0, shape.sequence_first)
        block.register_forward_pre_hook(hook, with_kwargs=True)


def merging_equal_rows_changes_nothing(case: Case) -> None:
    """Proportional attention, sizes, rotary tables, pools and the way back are right, if the output is the full sequence's."""
    for variant in case.variants:
        model = case.build()
        variant(model)
        make_equal(model)
        before = case.run(model)
        vlprune.apply(model, "tome", r=[8], proportional=False)
        assert not close(case.run(model), before, 1e-3)
        for rates in ([8], [18, 9], [0, 18, 4]):
            vlprune.apply(model, "tome", r=rates)
            assert close(case.run(model), before)


@dataclass(kw_only=True)
class Reader(vlprune.ToMe):
    """ToMe that also computes, from what it reads, what the block's attention hands to its last projection."""

    reads = ("queries", "values")
    computed: list[Tensor] = field(default_factory=list)

    def reduce(self, tokens: Any) -> Tensor:
        read = tokens.read
        share = read.queries.shape[1] // read.keys.shape[1]
        keys, values = (part.repeat_interleave(share, 1) for part in (read.keys, read.values))
        logits = read.scaling * read.queries @ keys.transpose(2, 3)
        logits = logits if read.weights is None else logits + read.weights[:, None, None]
        self.computed.append((logits.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return super().reduce(tokens)


def what_methods_read_is_what_the_attention_computes_with(case: Case) -> None:
    """Turned, normalised and weighted, also once rows have been merged."""
    model, given = case.build(), []
    tower, architecture = tower_of(model), architecture_of(model)
    for block in architecture.blocks_of(tower):
        linear = [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear)]
        out = next(part for name, part in linear if name.endswith((".proj", ".out_proj", ".o_proj", "attention.output.dense")))
        out.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    method = Reader(r=[4, 4, 4, 4])
    if case.hides_values:
        with pytest.raises(vlprune.UnsupportedMethodError, match="values"):
            vlprune.apply(model, method)
        return
    vlprune.apply(model, method)
    given.clear()
    case.run(model)
    assert len(given) == len(method.computed) == 4
    if case.plain_output:
        assert close(method.computed, given)


def an_image_alone_equals_a_row_of_a_batch(case: Case) -> None:
    model = vlprune.apply(case.build(), "tome", budget=0.4)
    batch = case.run(model, 3)
    maps = vlprune.report(model).assignment
    with torch.no_grad():
        for index in range(3):
            alone = {name: value[index : index + 1] for name, value in case.inputs(3).items()}
            assert close(tensors(model(**alone)), [part[index : index + 1] if part.ndim else part for part in batch], 1e-5)
            assert vlprune.report(model).assignment == maps[index : index + 1]


def copies_and_pickles_are_patched_models_of_their_own(case: Case) -> None:
    model, looks = case.build(), (*case.between, *case.features)
    before = case.run(model)
    vlprune.apply(model, "tome", budget=0.5)
    expected = case.run(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    vlprune.remove(model)
    for copied in copies:
        assert equal(case.run(copied), expected)
        assert vlprune.report(copied).layer_mean == PATCHES / 2
        looked_at = copy.deepcopy(copied)  # transformers leaves hooks of its own in such a model, which cannot be pickled
        for look in looks:
            look(looked_at, case.inputs())
        vlprune.remove(copied)
        assert equal(case.run(copied), before)
        assert traces(copied) == traces(model)
    assert equal(case.run(model), before)


@torch.no_grad()
def half_precision_keeps_sizes_exact(case: Case) -> None:
    model = vlprune.apply(case.build().bfloat16(), "tome", budget=0.4)
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in case.inputs().items()}
    assert all(part.dtype == torch.bfloat16 for part in tensors(model(**inputs)))
    run = model._vlprune.run
    assert run.sizes[-1].dtype == torch.float32
    assert run.sizes[-1].sum(1).tolist() == [PATCHES + case.prefix] * 2
    counted = torch.stack([image.bincount() for image in run.maps[-1]])
    assert torch.equal(counted, run.sizes[-1].long())


@torch.no_grad()
def rows_between_blocks_are_handed_out_whole(case: Case) -> None:
    """Merged rows are copies of each other there; and looking changes nothing."""
    model, inputs = case.build(), case.inputs()
    shapes = [[part.shape for part in tensors(look(model, inputs))] for look in (*case.between, *case.features)]
    vlprune.apply(model, "tome", r=3)
    expected = case.run(model)
    for index, look in enumerate((*case.between, *case.features)):
        found = tensors(look(model, inputs))
        assert [part.shape for part in found] == shapes[index]
        assert equal(case.run(model), expected)
        if index < len(case.between):
            rows = [part if part.ndim == 3 else part.flatten(2).transpose(1, 2) for part in found]
            distinct = [image[-PATCHES:].unique(dim=0).shape[0] for part in rows for image in part]
            assert distinct == [PATCHES - 3 * n for n in range(5 - len(rows), 5) for _ in range(2)]


def gradients_are_those_with_activation_checkpointing(case: Case) -> None:
    gradients = []
    for checkpointing in (False, case.checkpoints):
        model = case.build()
        if checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable", None)
            enable({"use_reentrant": False}) if enable else tower_of(model).set_grad_checkpointing(True)
        vlprune.apply(model.train(), "tome", budget=0.5)
        torch.manual_seed(1)
        sum(part.square().mean() for part in tensors(model(**case.inputs()))).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None and p.numel()])
    assert len(gradients[0]) > 20
    assert close(*gradients, 1e-5)


def images_of_other_sizes_get_their_own_counts(case: Case) -> None:
    model = vlprune.apply(case.build(), "tome", budget=0.5)
    for size in case.sizes:
        patches = size[0] * size[1] // 49
        case.run(model, size=size)
        report = vlprune.report(model)
        assert (report.total, report.layer_mean) == (patches, patches * 4 // 2 / 4)


def it_compiles_without_graph_breaks(case: Case) -> None:
    if case.compiled:
        model = vlprune.apply(case.build(), "tome", budget=0.5)
        expected = case.run(model)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert close(case.run(compiled), expected, 1e-5)
        assert vlprune.report(compiled).layer_mean == PATCHES / 2


FEATURES: dict[str, Callable[[Case], None]] = {
    feature.__name__: feature
    for feature in (
        nothing_to_do_is_exactly_nothing,
        the_report_says_what_was_merged,
        merging_equal_rows_changes_nothing,
        what_methods_read_is_what_the_attention_computes_with,
        an_image_alone_equals_a_row_of_a_batch,
        copies_and_pickles_are_patched_models_of_their_own,
        half_precision_keeps_sizes_exact,
        rows_between_blocks_are_handed_out_whole,
        gradients_are_those_with_activation_checkpointing,
        images_of_other_sizes_get_their_own_counts,
        it_compiles_without_graph_breaks,
    )
}
"""A test for each; one that a case has nothing for passes."""
