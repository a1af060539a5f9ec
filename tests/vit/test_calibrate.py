"""DiffRate's counts are learned: what is hidden in training is what the method does, and the budget is met."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import vlprune
from tests.vit.models import PATCHES, build, images, outputs
from tests.vit.test_training import batches
from tests.vit.test_vit import close, equal, traces
from vlprune import calibrate, cli, shell
from vlprune.calibrate.diffrate import Counts, CountsObjective
from vlprune.calibrate.images import Folder

BLOCKS = 4


def fixed(kept: list[int], merged: list[int]) -> Counts:
    """As if these counts had been learned."""
    counts = Counts(0.5, PATCHES, BLOCKS, granularity=1)
    wanted = torch.tensor([kept[1:], merged[1:]]).T[..., None]
    counts.logits.data = -1e4 * (counts.candidates - wanted).square()
    return counts


def test_hidden_rows_are_as_good_as_dropped_and_merged_ones():
    """The classifier's answer, read from [CLS], is that of DiffRate with the same counts."""
    model = build("vit classifier")
    for kept, merged in (([36, 30, 22, 22], [36, 30, 22, 22]), ([36, 36, 30, 20], [36, 25, 25, 14]), ([36] * 4, [36] * 4)):
        vlprune.apply(model, "diffrate", kept=kept, merged=merged)
        expected = outputs(model, images())[:1]
        vlprune.apply(model, CountsObjective(module=fixed(kept, merged)))
        assert close(outputs(model, images())[:1], expected, 1e-4)


def test_counts_begin_at_the_budget_and_settle_within_it():
    for budget in (0.3, 0.5, 0.83, 1.0):
        counts = Counts(budget, 196, 12)
        if budget == 1.0:
            assert counts.settled().merged == [196] * 12
            continue
        assert abs(counts.token_share().item() - budget) < 0.08
        for seed in range(3):
            torch.manual_seed(seed)
            counts.logits.data += torch.randn_like(counts.logits)
            method = counts.settled()
            assert method.counts(196, 12) == method.merged
            assert method.merged[0] == 196
            assert 0 <= budget * 196 * 12 - sum(method.merged) < 12
            assert all(left >= joined for left, joined in zip(method.kept, method.merged, strict=True))


def test_the_mask_has_the_gradient_of_the_expected_count():
    counts = Counts(0.5, PATCHES, BLOCKS, granularity=1)
    for merged in (False, True):
        mask = counts.mask(2, merged)
        expected = counts.expected()[1, int(merged)]
        assert mask.sum().item() == expected.ceil().item()
        (by_mask,) = torch.autograd.grad(mask.sum(), counts.logits)
        (by_count,) = torch.autograd.grad(expected, counts.logits)
        torch.testing.assert_close(by_mask, by_count)


def test_calibration_learns_counts_and_can_be_cut_off(tmp_path):
    model = build("vit classifier")
    before, found = outputs(model, images()), traces(model)
    told = []
    through = calibrate.diffrate(
        model, batches(), tmp_path / "a.json", budget=0.6, steps=6, save_every=2, progress=lambda *step: told.append(step)
    )
    assert equal(outputs(model, images()), before)
    assert traces(model) == found

    class Cut(RuntimeError):
        pass

    def cut(step, statistics):
        if step == 3:
            raise Cut

    with pytest.raises(Cut):
        calibrate.diffrate(model, batches(), tmp_path / "b.json", budget=0.6, steps=6, save_every=2, progress=cut)
    calibrate.diffrate(model, batches(), tmp_path / "b.json", budget=0.6, steps=6, save_every=2)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    method = vlprune.from_dict(json.loads((tmp_path / "a.json").read_text()))
    assert method == through
    vlprune.apply(model, method)
    outputs(model, images())
    assert vlprune.report(model).counts == through.merged
    assert sum(through.merged) <= 0.6 * PATCHES * BLOCKS
    assert told[0][1]["token share"] != told[-1][1]["token share"]


def test_pictures_of_a_folder_and_the_labels_of_its_folders(tmp_path):
    from PIL import Image

    for place, name in enumerate(("cat", "dog", "cat")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("L", (8, 8), place).save(tmp_path / name / f"{place}.png")

    def processor(images, return_tensors):
        assert all(image.mode == "RGB" for image in images)
        return {"pixel_values": torch.tensor([image.getpixel((0, 0))[0] for image in images])}

    shown = list(Folder(tmp_path, processor, {"cat": 4, "dog": 7}, batch_size=2))
    found = {pixel: label for some, labels in shown for pixel, label in zip(some.tolist(), labels.tolist(), strict=True)}
    assert found == {0: 4, 1: 7, 2: 4}
    assert all(torch.is_tensor(some) for some in Folder(tmp_path, processor, {"cat": 4}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(vlprune.VLPruneError, match="no pictures"):
        list(Folder(tmp_path / "empty", processor, {}))


def test_the_command_on_a_folder_of_pictures(tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor

    model, folder = build("vit classifier"), tmp_path / "model"
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 42, "width": 42}).save_pretrained(folder)
    (tmp_path / "photos").mkdir()
    for shade in range(3):
        Image.new("RGB", (50, 40), (80 * shade, 9, 9)).save(tmp_path / "photos" / f"{shade}.png")
    application, out = shell.application(cli.COMMANDS), str(tmp_path / "counts.json")

    def invoke(*arguments: str):
        return CliRunner().invoke(application, ["calibrate", *arguments, "--out", out, "--device", "cpu"], prog_name="vlprune")

    result = invoke(str(folder), str(tmp_path / "photos"), "--steps", "2", "--budget", "0.7", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "counts.json").read_text())["method"] == "diffrate"
    for wrong in ((str(folder),), (str(folder), str(tmp_path / "none")), ("tinyvit", "--method", "tome")):
        assert invoke(*wrong).exit_code == 2
