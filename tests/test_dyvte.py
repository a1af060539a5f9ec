"""DyVTE's decision against its definition written out, and its trainer: what it labels, and what routers learn from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlprune
from tests import inside, zoo
from tests.reference import Dropped, masked
from vlprune.config import weights
from vlprune.evals.tinyvlm import build
from vlprune.image import ModelShape
from vlprune.integrations.llava import single
from vlprune.methods.dyvte import load
from vlprune.training.exits import _labelled, fit_exits

ROUTER = Path(__file__).with_name("router.safetensors")


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / 2**0.5))


@pytest.mark.parametrize("content", inside.CONTENTS)
def test_two_maps_decide(tmp_path, content):
    """On the mean of the text behind the image but its last token, and the last token."""
    decided = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(3, 2 * inside.WIDTH, generator=generator), torch.randn(2, 3, generator=generator)
        file = tmp_path / f"{content}{seed}.safetensors"
        save_file({"2.inner": maps[0], "2.outer": maps[1]}, file)
        method, layout = vlprune.DyVTE(router=str(file)), single(6)
        tokens = inside.before_layer(method, layout, 2, torch.arange(36), content, seed)
        hidden = tokens.hidden.double().tolist()
        behind = [row for row in tokens.text.tolist() if tokens.visual.tolist()[-1] < row < tokens.last]
        state = [sum(hidden[row][i] for row in behind) / len(behind) for i in range(inside.WIDTH)] + hidden[tokens.last]
        middle = [gelu(inside.dot(weights, state)) for weights in maps[0].double().tolist()]
        stay, leave = (inside.dot(weights, middle) for weights in maps[1].double().tolist())
        assert method.prefill(tokens).keep.tolist() == ([] if stay < leave else list(range(36)))
        decided.add(stay < leave)
    assert decided == ({False} if content == "zeros" else {False, True})


def test_an_image_decides_for_itself_and_is_gone_for_good():
    """In a batch as alone; once it has left, nobody asks again."""
    model = zoo.build("llava")
    with vlprune.applied(model, "dyvte", router=str(ROUTER)), torch.no_grad():
        model(**zoo.prompt("llava", images=(1, 2, 0), words=(7, 4, 9)))
        images = inside.report(model).images
    for image in images:
        outs = [stage.tokens_out for stage in image.stages if stage.name == "prefill"]
        assert set(outs[:-1]) <= {image.total}
        assert outs[-1] == 0


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(vlprune.UnsupportedMethodError, match="fit_exits"):
        vlprune.DyVTE().plan(single(6), inside.SHAPE)
    save_file({"9.inner": torch.zeros(3, 128), "9.outer": torch.zeros(2, 3)}, tmp_path / "deep")
    with pytest.raises(vlprune.OptionError, match="more than 9 layers"):
        vlprune.DyVTE(router=str(tmp_path / "deep")).plan(single(6), inside.SHAPE)
    save_file({"2.inner": torch.zeros(3, 6), "2.outer": torch.zeros(2, 3)}, tmp_path / "narrow")
    narrow = vlprune.DyVTE(router=str(tmp_path / "narrow"))
    with pytest.raises(vlprune.OptionError, match="of 3 channels, not 4"):
        narrow.prefill(inside.before_layer(narrow, single(6), 2, torch.arange(36)))


def test_routers_of_tinyvlm_come_along():
    """For each layer before which its images may leave, and as wide as its hidden states."""
    text: Any = build.config(64).text_config
    method, layers = vlprune.DyVTE(router="tinyvlm-dyvte"), text.num_hidden_layers
    assert sorted(method.plan(single(6), ModelShape(5, layers, 3, has_cls=True)).prefill) == list(range(1, layers))
    assert {maps[0].shape[1] for maps in load(weights("tinyvlm-dyvte")).values()} == {2 * text.hidden_size}


def test_an_exit_is_right_where_the_masked_model_says_the_same():
    """Labels from the unpruned model, its visual tokens hidden from a layer on."""
    model, inputs = zoo.build("llava"), zoo.prompt("llava")
    fed = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)}
    fed["attention_mask"] = torch.ones_like(fed["input_ids"])
    with torch.no_grad():
        whole = model(**fed).logits[0, -4:-1]
    answer = whole.argmax(-1)  # so that its loss is low, and what an exit changes shows
    fed["input_ids"][0, -3:] = answer
    with torch.no_grad():
        whole = model(**fed).logits[0, -4:-1]
    states, right = _labelled(model, inputs, answer, agreement=0.5, loss_ratio=1.5)
    assert list(states) == list(right) == [1, 2, 3]
    for layer, said in right.items():
        visual = fed["input_ids"] == zoo.IMAGE
        none = torch.zeros_like(visual)
        gone = [visual if i >= layer else none for i in range(4)]
        with masked(model, fed, Dropped(gone, [g[:, None] for g in gone])), torch.no_grad():
            logits = model(**fed).logits[0, -4:-1]
        same = (logits.argmax(-1) == whole.argmax(-1)).float().mean() > 0.5
        losses = [torch.nn.functional.cross_entropy(x, answer) for x in (logits, whole)]
        assert said == bool(same and losses[0] < 1.5 * losses[1])


def test_routers_learn_and_are_what_the_method_takes(tmp_path):
    """The same from the same seed; the model is as it was."""
    model = zoo.build("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = [(zoo.prompt("llava", seed=seed), torch.tensor([seed + 5, seed + 6])) for seed in range(5)]
    told = fit_exits(model, samples, tmp_path / "one", width=16, steps=100, rate=1e-2, agreement=0.3, loss_ratio=1.1)
    again = fit_exits(model, samples, tmp_path / "two", width=16, steps=100, rate=1e-2, agreement=0.3, loss_ratio=1.1)
    assert told == again
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(told) == [1, 2, 3]
    assert any(0 < layer["exits"] < 1 for layer in told.values())
    assert all(layer["accuracy"] == 1.0 for layer in told.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with vlprune.applied(model, "dyvte", router=str(tmp_path / "one")), torch.no_grad():
        model(**samples[0][0])
        assert inside.report(model).images[0].stages
