"""TinyViT: its pictures, and training that can be cut off and goes on as if it had not been."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vlprune
from vlprune.evals import synthvqa, tinyvit
from vlprune.evals.synthvqa import SHAPES, Item, Scene
from vlprune.evals.tinyvit import pixels, scenes, train
from vlprune.evals.tinyvit.scenes import LABELS, SIZE, largest_shape, picture, seen_area


def test_pictures_are_reproducible_and_no_scene_is_in_both_splits():
    shown = {split: [picture(split, index) for index in range(40)] for split in ("train", "test")}
    assert shown["train"] == [picture("train", index) for index in range(40)]
    assert not {p.scene for p in shown["train"]} & {p.scene for p in shown["test"]}
    assert len({p.label for p in shown["test"]}) > 12
    for one in shown["test"]:
        assert one.draw().size == (SIZE, SIZE)
        assert LABELS[one.label] == f"{one.largest.name} {one.largest.kind}"


def test_the_label_is_that_of_the_shape_of_which_most_pixels_are_seen():
    """Counted in the drawn picture, where nothing lies on a shape: boxes are compared, not the forms in them."""
    for index in range(40):
        one = picture("test", index)
        areas = {item: seen_area(item) for item in one.scene.items if item.kind in SHAPES}
        others = [area for item, area in areas.items() if item is not one.largest]
        assert areas[one.largest] >= scenes.MARGIN * max(others, default=0)
        squares = [item for item in areas if item.kind == "square"]
        drawn = np.asarray(one.draw())
        for name in {item.name for item in squares}:
            signs = [item for item in one.scene.items if item.kind != "square" and item.name == name]
            if not signs:
                painted = (drawn == synthvqa.COLOURS[name]).all(-1).sum()
                assert painted == sum(areas[item] for item in squares if item.name == name)


def test_a_scene_without_a_clearly_largest_shape_has_no_label():
    def scene(*sides: int) -> Scene:
        items = [Item("circle", "red", (10 + 30 * k, 40, 10 + 30 * k + side, 40 + side)) for k, side in enumerate(sides)]
        return Scene("scene", (255, 255, 255), (*items, Item("sign", "blue", (8, 80, 68, 120))), ())

    assert largest_shape(scene(18, 26)) == scene(18, 26).items[1]
    assert largest_shape(scene(26, 26)) is None
    assert largest_shape(scene()) is None
    assert largest_shape(Scene("scene", (0, 0, 0), (Item("cross", "red", (0, 0, 8, 8)),), ())) is None


def test_patches_are_told_what_lies_under_their_middle():
    one = picture("train", 3)
    owners, sides, largest = train.patch_targets(one)
    for patch in range(owners.size):
        row, column = divmod(patch, train.GRID)
        x, y = (scenes.EDGE + train.PATCH * (place + 0.5) for place in (column, row))
        under = [i for i in one.scene.items if i.box[0] <= x < i.box[2] and i.box[1] <= y < i.box[3]]
        assert train.OWNERS[owners[patch]] == (under[0].phrase if under else "nothing")
        assert largest[patch] == (under == [one.largest])
        shape = bool(under) and under[0].kind in SHAPES
        assert sides[patch] == (train.SIDES.index(under[0].box[2] - under[0].box[0]) if shape else train.IGNORE)


def test_training_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    through = train.Trainer(tmp_path / "through", steps=4, images=2, save_every=2)
    through.run()
    first = train.Trainer(tmp_path / "cut", steps=4, images=2, save_every=2)
    real = first.loss

    def cut(pictures):
        if first.step == 3:
            raise KeyboardInterrupt
        return real(pictures)

    monkeypatch.setattr(first, "loss", cut)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = train.Trainer(tmp_path / "cut", steps=4, images=2, save_every=2)
    assert second.step == 2
    second.run()
    for name, weight in through.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)
    assert 0 <= second.accuracy(4) <= 1
    train.export(second.model, tmp_path / "model")
    assert (tmp_path / "model" / "preprocessor_config.json").exists()


def test_the_first_blocks_begin_as_those_of_tinyvlm():
    from vlprune.evals import tinyvlm

    made, encoder = train.model(), tinyvlm.load()[0].model.vision_tower.state_dict()
    ours = made.state_dict()
    for index in range(train.LEARNED):
        theirs = next(v for n, v in encoder.items() if n.endswith(f"encoder.layers.{index}.mlp.fc1.weight"))
        assert any(torch.equal(theirs, value) for name, value in ours.items() if f".{index}." in name)
    assert made.config.num_hidden_layers == train.BLOCKS


def test_pixels_are_those_of_its_image_processor():
    from transformers import ViTImageProcessor

    shown = [picture("test", index).draw() for index in range(2)]
    made = ViTImageProcessor.from_pretrained(tinyvit.CHECKPOINT)(images=shown, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(shown), made)


def test_what_is_shipped_names_the_largest_shape():
    """On scenes that it has not seen, with half of its token-layers merged away, too."""
    shown = list(scenes.pictures("test", 96))
    model, labels = tinyvit.load_tinyvit(), torch.tensor([one.label for one in shown])
    assert [model.config.id2label[index] for index in range(len(LABELS))] == LABELS
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    given = pixels([one.draw() for one in shown])
    with torch.no_grad():
        whole = (model(pixel_values=given).logits.argmax(-1) == labels).float().mean()
        vlprune.apply(model, "tome", budget=0.5)
        merged = (model(pixel_values=given).logits.argmax(-1) == labels).float().mean()
    assert whole > 0.9
    assert merged > 0.8
