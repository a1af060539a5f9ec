"""Learned heads: what is hidden in training is what is dropped later, only heads learn, and training can be cut off."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import vlprune
from tests.vit.models import PATCHES, build, images, outputs
from tests.vit.test_vit import close, equal, traces
from vlprune import training
from vlprune.blocks import BlockTokens
from vlprune.method import make
from vlprune.methods.dynamicvit import DynamicViTHeads
from vlprune.methods.learned import BlockHeads
from vlprune.schedule import staged
from vlprune.training.objectives import HEADS, HIDDEN, Objective
from vlprune.training.trainer import Trainer

LEARNED = sorted(HEADS)
WIDTH, BLOCKS = 32, 4


def batches(count: int = 3, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 4, 3, 42, 42)
    return list(
        zip(torch.randn(shape, generator=generator), torch.randint(0, 2, (count, 4), generator=generator), strict=True)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Heads of each method with random weights."""
    folder = tmp_path_factory.mktemp("heads")
    for name, kind in HEADS.items():
        torch.manual_seed(1)
        heads = kind(WIDTH, (1, 2))
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter)
        heads.save(folder / f"{name}.safetensors")
    return folder


# ------------------------------------------------------------------ methods


@pytest.mark.parametrize("name", LEARNED)
def test_the_rows_with_the_lowest_scores_leave_in_the_stages_and_nowhere_else(name, files):
    model, options = build("vit"), {"heads": files / f"{name}.safetensors"}
    before, found = outputs(model, images()), traces(model)
    for budget in (0.9, 0.6, 20):
        vlprune.apply(model, name, budget=budget, **options)
        outputs(model, images())
        report = vlprune.report(model)
        assert report.counts == staged(budget, PATCHES, BLOCKS, (1, 2))
        assert report.counts[0] == PATCHES
        assert PATCHES * BLOCKS * (budget if isinstance(budget, float) else budget / PATCHES) - sum(report.counts) < 2
    settings = report.method
    assert equal(outputs(vlprune.apply(model, vlprune.from_dict(settings)), images()), outputs(model, images()))
    vlprune.apply(model, name, budget=1.0, **options)
    assert equal(outputs(model, images()), before)
    vlprune.remove(model)
    assert traces(model) == found
    assert equal(outputs(model, images()), before)


def test_staged_counts_keep_the_same_share_in_each_stage():
    assert staged(0.5, 196, 12, (3, 6, 9), keep=0.7) == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    assert staged(1.0, 10, 3, (1,)) == [10, 10, 10]
    for tokens in (1, 7, 196):
        for blocks in (1, 5, 12):
            for budget in (1.0, 0.75, 0.93, 3):
                counts = staged(budget, max(2, tokens), blocks, (0, blocks // 2))
                room = (min(budget, max(2, tokens)) if isinstance(budget, int) else budget * max(2, tokens)) * blocks
                assert room - (blocks - blocks // 2) < sum(counts) <= room + 1e-6
                assert counts == sorted(counts, reverse=True)
                assert counts[-1] >= 1
    with pytest.raises(vlprune.BudgetError, match="blocks 2, 3"):
        staged(0.4, 100, 4, (2, 3))


@pytest.mark.parametrize("name", LEARNED)
def test_compiled_without_graph_breaks(name, files):
    method, hidden = make(name, budget=0.6, heads=files / f"{name}.safetensors"), torch.randn(2, 17, WIDTH)

    def step(rows):
        return method.reduce(BlockTokens(rows, rows, torch.ones(2, 17), 1, 4, 1, 4))

    torch.compiler.reset()
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(hidden), step(hidden))


def test_tnt_drops_what_is_most_like_a_row_of_the_other_half(files):
    """Once scores have left over as many rows as are to stay and duplicates beside them."""
    rows = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(3))
    tokens = BlockTokens(rows, rows, torch.ones(2, 13), 1, 5, 1, 4)
    for share, duplicates in ((0.0, 0), (0.4, 2), (1.0, 5)):
        method = vlprune.TNT(heads=files / "tnt.safetensors", similar=share)
        left = 7 + duplicates
        order = torch.randperm(left, generator=torch.Generator().manual_seed(0)).tolist()
        half = max(duplicates, left // 2)
        for image, scores in enumerate(method.scores(tokens).tolist()):
            ranked = sorted(range(12), key=lambda row: -scores[row])
            sources, targets = ([ranked[place] for place in part] for part in (order[:half], order[half:]))
            patches = rows[image, 1:]
            alike = {
                s: max(functional.cosine_similarity(patches[s], patches[t], dim=0).item() for t in targets) for s in sources
            }
            gone = {*ranked[left:], *sorted(sources, key=lambda row: -alike[row])[:duplicates]}
            assigned = method.reduce(tokens)[image].tolist()
            assert {row - 1 for row, out in enumerate(assigned) if out < 0} == gone
            assert [out for out in assigned if out >= 0] == list(range(8))


def test_vtm_merges_into_the_most_salient_rows(files):
    method = vlprune.VTM(heads=files / "vtm.safetensors", share=0.25)
    rows = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(3))
    tokens = BlockTokens(rows, rows, torch.arange(26.0).view(2, 13) + 1, 1, 6, 2, 4)
    assigned = method.reduce(tokens)
    saliency = method.scores(tokens)
    merged, sizes = method.merge(tokens, assigned, tokens.count)
    for image in range(2):
        groups = {int(out): (assigned[image] == out).nonzero()[:, 0].tolist() for out in range(7)}
        targets = {1 + int(row) for row in saliency[image].sort(descending=True, stable=True).indices[:3]}
        for out, members in groups.items():
            torch.testing.assert_close(merged[image, out], rows[image, members].mean(0))
            assert sizes[image, out] == tokens.sizes[image, members].sum()
            if len(members) > 1:
                (target,) = targets & set(members)
                for source in set(members) - {target}:
                    cosines = functional.cosine_similarity(rows[image, source], rows[image, sorted(targets)], dim=-1)
                    assert sorted(targets)[int(cosines.argmax())] == target
        assert groups[0] == [0]


def test_what_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(vlprune.OptionError, match=r"training\.fit"):
        vlprune.apply(build("vit"), "dynamicvit")
    with pytest.raises(vlprune.OptionError, match=r"heads of tnt, not of dynamicvit"):
        vlprune.DynamicViT(heads=files / "tnt.safetensors")
    (tmp_path / "broken").write_text("nothing")
    for path in (tmp_path / "broken", tmp_path / "missing"):
        with pytest.raises(vlprune.OptionError, match="cannot be read"):
            vlprune.TNT(heads=path)
    for heads, told in ((DynamicViTHeads(16, (1,)), "width 16"), (DynamicViTHeads(WIDTH, (7,)), "block 7")):
        heads.save(tmp_path / "other.safetensors")
        model = vlprune.apply(build("vit"), "dynamicvit", heads=tmp_path / "other.safetensors", budget=0.9)
        with pytest.raises(vlprune.OptionError, match=told):
            outputs(model, images())
    with pytest.raises(vlprune.UnsupportedMethodError, match=r"tome.*dynamicvit"):
        training.fit(build("vit"), "tome", batches(), tmp_path / "x")
    with pytest.raises(vlprune.UnsupportedModelError, match="Linear"):
        training.fit(torch.nn.Linear(1, 1), "tnt", batches(), tmp_path / "x")


# ------------------------------------------------------------------ objectives


class Hiding(Objective):
    """Hides given rows behind block 1."""

    def hide(self, tokens):
        if tokens.block != 1:
            return tokens.hidden, None if tokens.block == 0 else tokens.sizes
        return tokens.hidden, self.module + HIDDEN


def test_hidden_rows_are_as_good_as_dropped_ones(files):
    """The classifier's answer, read from [CLS], is that of the model whose rows with the lowest scores are gone."""
    model = build("vit classifier")
    vlprune.apply(model, "dynamicvit", heads=files / "dynamicvit.safetensors", keep=0.5)
    model._vlprune.method._heads.stages = (1,)
    dropped = outputs(model, images())[0]
    assert vlprune.report(model).counts == [36, 18, 18, 18]
    stays = (model._vlprune.run.maps[-1] >= 0).float()
    assert stays.sum(1).tolist() == [19, 19]
    vlprune.apply(model, Hiding(module=stays))
    assert close(outputs(model, images())[:1], [dropped], 1e-4)


def test_gradients_of_decisions_are_those_of_the_masked_softmax():
    """Of a row that is hidden, too: how the answer would change if it were there."""
    generator = torch.Generator().manual_seed(0)
    logits, values = torch.randn(3, 5, generator=generator), torch.randn(5, 4, generator=generator)
    given = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    gradients = []
    for exact in (True, False):
        mask = given.clone().requires_grad_()
        if exact:
            weights = logits.double().exp() * (mask.double() + HIDDEN)
            out = (weights / weights.sum(-1, keepdim=True)) @ values.double()
        else:
            bias = (mask + HIDDEN).log().expand(1, 1, 3, -1)
            queries = torch.cat([logits, torch.zeros(3, 0)], 1)[None, None]
            keys = torch.eye(5)[None, None]
            out = functional.scaled_dot_product_attention(queries, keys, values[None, None], attn_mask=bias, scale=1.0)[0, 0]
        out.square().sum().backward()
        gradients.append(mask.grad)
    assert gradients[0].abs().min() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("name", LEARNED)
def test_training_changes_heads_and_nothing_else_and_can_be_cut_off(name, tmp_path):
    model = build("vit classifier").train()
    model.classifier.weight.requires_grad_(False)
    before, found = {key: value.clone() for key, value in model.state_dict().items()}, traces(model)
    told = []
    through = training.fit(
        model, name, batches(), tmp_path / "a.safetensors", steps=5, save_every=2, progress=lambda *s: told.append(s)
    )
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    assert all(torch.isfinite(torch.tensor(list(statistics.values()))).all() for _, statistics in told)

    class Cut(RuntimeError):
        pass

    def cut(step, statistics):
        if step == 3:
            raise Cut

    options = {"steps": 5, "save_every": 2}
    with pytest.raises(Cut):
        training.fit(model, name, batches(), tmp_path / "b.safetensors", progress=cut, **options)
    assert traces(model) == found
    assert (tmp_path / "b.safetensors.part").exists()
    training.fit(model, name, batches(), tmp_path / "b.safetensors", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    kind: type[BlockHeads] = HEADS[name]
    one, other = (kind.load(tmp_path / f"{letter}.safetensors").state_dict() for letter in "ab")
    for key in one:
        assert torch.equal(one[key], other[key]), key
    torch.manual_seed(0)
    width, blocks = training.fitting.shape_of(model)
    fresh = kind(width, kind.default_stages(blocks)).state_dict()
    assert sum(not torch.equal(one[key], fresh[key]) for key in one) > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert traces(model) == found
    assert model.training
    assert not model.classifier.weight.requires_grad
    assert model.classifier.bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert through == tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", ["dynamicvit", "tnt"])
def test_heads_learn_which_rows_matter(name, tmp_path):
    """Every other patch is blank, and the answers do not need those: the others are kept, though nobody said which."""
    model = build("vit classifier")
    matters = torch.arange(PATCHES) % 2 == 0
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(8, 3, 42, 42, generator=generator)

    class Marked(torch.nn.Module):
        def __call__(self, module, args, out):
            return out * torch.cat([torch.ones(1), matters.float()])[None, :, None]

    model.vit.embeddings.register_forward_hook(Marked())
    training.fit(model, name, [picture], tmp_path / "heads", steps=60, rate=0.02, stages=(0,), budget=0.5)
    vlprune.apply(model, name, heads=tmp_path / "heads", budget=0.5, **({"similar": 0.0} if name == "tnt" else {}))
    outputs(model, picture)
    kept = torch.tensor(vlprune.report(model).assignment)[:, 1:] >= 0
    assert kept.sum() == 8 * 18
    assert kept[:, matters].sum() > 8 * 14


def test_batches_come_in_any_form(tmp_path):
    pixels, labels = batches(1)[0]
    losses = []
    forms = [(pixels, labels), {"pixel_values": pixels, "labels": labels}, [pixels, labels]]
    for form in forms:
        torch.manual_seed(0)
        training.fit(
            build("vit classifier"),
            "tnt",
            [form],
            tmp_path / "x",
            steps=1,
            progress=lambda s, told: losses.append(told["loss"]),
        )
    assert losses[0] == losses[1] == losses[2]
    for form in (pixels, [pixels], {"pixel_values": pixels}):
        training.fit(build("dinov2"), "dynamicvit", [form], tmp_path / "y", steps=1)
    with pytest.raises(vlprune.VLPruneError, match="no batches"):
        training.fit(build("vit"), "tnt", iter([]), tmp_path / "z", steps=1)
    with pytest.raises(vlprune.VLPruneError, match="a batch is pixels"):
        training.fit(build("vit"), "tnt", ["picture"], tmp_path / "z", steps=1)


def test_a_trainer_takes_an_objective_of_ones_own(tmp_path):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((1, PATCHES + 1), 0.5))

        def save(self, path):
            torch.save(self.state_dict(), path)

    goal = Hiding(module=Scaled())
    goal.hide = lambda tokens: (tokens.hidden, goal.module.weight.abs().expand(len(tokens.hidden), -1) + HIDDEN)
    Trainer(build("vit classifier"), goal, tmp_path / "own", steps=3).run(batches())
    assert (torch.load(tmp_path / "own", weights_only=True)["weight"] != 0.5).any()
