"""Pictures are right to the patch: a dot is painted, a real processor says which patch sees it, and that token is drawn."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaNextImageProcessor, Qwen2VLImageProcessor

import vlprune
from tests import zoo
from vlprune import visualize
from vlprune.image import ImageLayout
from vlprune.integrations.layouts import tiles_in_a_row
from vlprune.integrations.llava import anyres, single
from vlprune.report import ImageReport, Report, StageReport
from vlprune.visualize import drawing, places, show

DOT = 3
"""Pixels from the middle of a dot to its edges."""
PLAIN: dict[str, Any] = {"do_normalize": False, "do_convert_rgb": True}
PINPOINTS = [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]


def report_of(model_type: str, layout: ImageLayout, kept: list[int], stages: Any = (), video: bool = False) -> Report:
    image = ImageReport(layout.total, kept, list(stages), layout, video)
    return Report({"method": "x"}, [image], len(kept), len(kept), 0.0, 0.0, 0, 0, 0, 0, model_type, 4)


def dots(size: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Middles of dots, spread over a picture of ``size`` (width, height)."""
    generator = np.random.default_rng(0)
    return [(int(generator.integers(DOT, size[0] - DOT)), int(generator.integers(DOT, size[1] - DOT))) for _ in range(count)]


def painted(size: tuple[int, int], dot: tuple[int, int]) -> Image.Image:
    picture = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    picture[dot[1] - DOT : dot[1] + DOT + 1, dot[0] - DOT : dot[0] + DOT + 1] = 255
    return Image.fromarray(picture)


def lit(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """The box (left, top, right, bottom) of what is not dark; asserts that all of it is bright."""
    bright = np.asarray(picture)[..., 0] > 200
    if not bright.any():
        return None
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    assert bright[box[1] : box[3], box[0] : box[2]].all(), "one token is one rectangle"
    return box


def check(size: tuple[int, int], dot: tuple[int, int], report: Report, patch: tuple[float, float], **options: Any) -> None:
    """The only token that is kept is drawn around the dot, as large as a ``patch`` (width, height) where nothing cuts it."""
    white = Image.new("RGB", size, "white")
    drawn = visualize.show_kept(white, report, side=None, outlines=False, **options)
    assert drawn.size == size
    box = lit(drawn)
    assert box is not None
    left, top, right, bottom = box
    # Half of a dot on the border of two patches may lie in each.
    assert left - 1 <= dot[0] <= right, (dot, box)
    assert top - 1 <= dot[1] <= bottom, (dot, box)
    for low, high, length, whole in ((left, right, patch[0], size[0]), (top, bottom, patch[1], size[1])):
        cut = low == 0 or high == whole
        assert abs(high - low - length) <= 1 or (cut and high - low <= length + 1), (box, patch)


def brightest(tiles: torch.Tensor, patch: int) -> tuple[torch.Tensor, float]:
    """Means of the patches of ``tiles (n, 3, H, W)``: ``(n, patches)``, and the highest."""
    means = torch.nn.functional.avg_pool2d(tiles.float().mean(1, keepdim=True), patch).flatten(1)
    return means, float(means.max())


def test_llava_cuts_out_the_middle():
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **PLAIN)
    seen = 0
    for size in ((120, 84), (84, 140), (112, 112)):
        for dot in dots(size, 12):
            pixels = torch.as_tensor(np.asarray(processor(painted(size, dot), return_tensors="pt")["pixel_values"]))
            means, highest = brightest(pixels, 7)
            inside = abs(dot[0] - size[0] / 2) < min(size) / 2 - DOT and abs(dot[1] - size[1] / 2) < min(size) / 2 - DOT
            assert (highest > 0.02) or not inside
            if inside:
                report = report_of("llava", single(4), [int(means.argmax())])
                check(size, dot, report, (min(size) / 4, min(size) / 4), processor=processor)
                check(size, dot, report, (min(size) / 4, min(size) / 4))
                seen += 1
    assert seen > 20


def test_llava_next_pads_crops_and_stretches_the_thumbnail():
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS, **PLAIN
    )
    tiles_seen = set()
    for size in ((200, 110), (90, 170), (150, 141), (230, 70)):
        layout = anyres(size[1], size[0], 4, 28, tuple(PINPOINTS))
        scale = min(layout.crops[1] * 28 / size[0], layout.crops[0] * 28 / size[1])
        for dot in dots(size, 14):
            pixels = torch.as_tensor(np.asarray(processor(painted(size, dot), return_tensors="pt")["pixel_values"]))[0]
            means, _ = brightest(pixels[: layout.tiles], 7)
            for view, part, patch in (
                ("thumbnail", means[:1], (size[0] / 4, size[1] / 4)),
                ("crops", means[1:], (7 / scale, 7 / scale)),
            ):
                where = int(part.argmax()) + (0 if view == "thumbnail" else 16)
                token = int(layout.placeholder.flatten()[where])
                if token >= 0:
                    tiles_seen.add((size, where // 16))
                    check(size, dot, report_of("llava_next", layout, [token]), patch, processor=processor, view=view)
    assert len(tiles_seen) >= 4 + 2 + 2 + 3 + 3


def test_tokens_and_pixels_of_a_padded_picture_by_hand():
    """200 x 100 in two by two tiles: of 8 x 8 patches the top and the bottom two rows are padding, a patch is 25 pixels."""
    layout = anyres(100, 200, 4, 28, ((56, 56),))
    white = Image.new("RGB", (200, 100), "white")
    for row, column in ((0, 0), (0, 5), (3, 2), (3, 7)):
        report = report_of("llava_next", layout, [16 + row * 9 + column])
        drawn = visualize.show_kept(white, report, side=None, outlines=False, view="crops")
        box = lit(drawn)
        assert box == (25 * column, 25 * row, 25 * (column + 1), 25 * (row + 1))


def test_qwen_stretches_to_whole_patches():
    processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=4096, **PLAIN
    )
    for size in ((100, 61), (61, 130), (64, 64)):
        for dot in dots(size, 12):
            given = processor(painted(size, dot), return_tensors="pt")
            _, rows, columns = (int(n) for n in torch.as_tensor(np.asarray(given["image_grid_thw"]))[0])
            pixels = torch.as_tensor(np.asarray(given["pixel_values"])).float()
            token = int(pixels.mean(1).view(-1, 4).mean(1).argmax())
            layout = tiles_in_a_row(1, (rows // 2, columns // 2))
            patch = (size[0] / (columns // 2), size[1] / (rows // 2))
            check(size, dot, report_of("qwen2_vl", layout, [token]), patch)


def test_frames_of_a_video():
    """Four frames, two to a tile, of 2 x 3 tokens: token 7 is row 0, column 1 of the second tile, frames 3 and 4."""
    layout = tiles_in_a_row(2, (2, 3))
    found = places.views([ImageReport(12, [], [], layout, True)], (90, 60), places.Geometry("qwen2_vl"), 4)
    assert [view.frame for view in found] == [0, 1, 2, 3]
    frames = [Image.new("RGB", (90, 60), "white")] * 4
    scene = show.Scene.of(frames, report_of("qwen2_vl", layout, [7], video=True), None, None, None)
    shares = {0: show.mask([7], 12)}
    drawn = [drawing.kept(frame, scene.of_frame(n), shares, False) for n, frame in enumerate(scene.frames)]
    assert [lit(one) for one in drawn] == [None, None, (30, 0, 60, 30), (30, 0, 60, 30)]
    # LLaVA-NeXT-Video cuts the middle out of each frame: 60 of 90 pixels.
    cut = report_of("llava_next_video", tiles_in_a_row(4, (2, 2)), [4 * 2 + 3], video=True)
    scene = show.Scene.of(frames, cut, None, None, None)
    shares = {0: show.mask([11], 16)}
    assert lit(drawing.kept(frames[2], scene.of_frame(2), shares, False)) == (45, 30, 75, 60)
    assert visualize.show_kept(frames, cut).width > 4 * 300


def test_tiles_in_a_grid_and_tiles_that_are_images():
    """SmolVLM's tiles are one image, InternVL's one each; the last shows the whole picture."""
    size, white = (120, 60), Image.new("RGB", (120, 60), "white")
    smol = report_of("smolvlm", tiles_in_a_row(3, (2, 2)), [4 + 1])
    assert lit(visualize.show_kept(white, smol, side=None, outlines=False, view="crops")) == (90, 0, 120, 30)
    tile = ImageReport(4, [], [], single(2))
    intern = vlprune.Report(
        {"method": "x"}, [tile, ImageReport(4, [2], [], single(2)), tile], 1, 1, 0.0, 0.0, 0, 0, 0, 0, "internvl", 4
    )
    assert lit(visualize.show_kept(white, intern, side=None, outlines=False)) == (60, 30, 90, 60)
    last = report_of("smolvlm", tiles_in_a_row(3, (2, 2)), [8])
    assert lit(visualize.show_kept(white, last, side=None, outlines=False, view="thumbnail")) == (0, 0, 60, 30)
    assert size == white.size


def test_onevision_pads_one_of_several_images_to_a_square():
    layout = tiles_in_a_row(1, (4, 4), separators=1)
    white = Image.new("RGB", (80, 40), "white")
    drawn = visualize.show_kept(white, report_of("llava_onevision", layout, [4]), side=None, outlines=False)
    assert lit(drawn) == (0, 0, 20, 20)


def test_geometry_is_read_from_a_processor():
    fixed = SimpleNamespace(image_processor=SimpleNamespace(size={"height": 384, "width": 384}, do_center_crop=None))
    assert places.Geometry.of("llava", fixed).crop is None
    larger = SimpleNamespace(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, do_center_crop=True)
    assert places.Geometry.of("llava", larger) == places.Geometry("llava", 224 / 256, False, 224)
    padded = SimpleNamespace(size={"shortest_edge": 28}, crop_size={"height": 28}, do_center_crop=True, do_pad=True)
    assert places.Geometry.of("llava", padded) == places.Geometry("llava", None, True, 28)
    told = dataclasses.replace(report_of("llava", single(2), []), images=[ImageReport(4, [0], [])])
    with pytest.raises(ValueError, match="no layout"):
        visualize.show_kept(Image.new("RGB", (8, 8)), told)


def test_stages_have_their_panels():
    stages = [
        StageReport("encode", 1, 16, 8, 0.0, [*range(8)]),
        StageReport("select", None, 8, 4, 0.0, [*range(4)]),
        StageReport("prefill", 2, 4, 2, 0.0, [0, 1]),
        StageReport("evict", 0, 4, 1, 0.0, [[0], [1]]),
        StageReport("evict", 3, 2, 1, 0.0, [[0], [0]]),
    ]
    image = ImageReport(16, [0, 1, 2, 3], stages, single(4))
    found = dict(show.stages([image]))
    names = ["vision encoder, after block 1", "before the LLM", "LLM, from layer 2 on", "KV cache, mean over layers"]
    assert list(found) == names
    assert [float(shares[0].sum()) for shares in found.values()] == [8, 4, 2, 1]
    assert found[names[-1]][0][:2].tolist() == [0.75, 0.25]
    sheet = visualize.show_stages(Image.new("RGB", (40, 40)), report_of("llava", single(4), [0, 1, 2, 3], stages), across=5)
    assert sheet.width > 5 * show.PANEL


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("llava_next")


def seen_of(model: Any, method: Any, **options: Any) -> tuple[Report, visualize.Watched]:
    inputs = zoo.prompt("llava_next")
    with vlprune.applied(model, method, **options), visualize.watched(model) as seen, torch.inference_mode():
        model(**inputs)
        report: Any = vlprune.report(model)
    return report, seen


def test_merged_tokens_have_the_colour_of_their_group(model: Any):
    """``pool``: every patch is part of a group, and each kept token is its own group's."""
    report, seen = seen_of(model, "pool", budget=0.25)
    (image,) = report.images
    assert image.layout is not None
    groups = seen.groups()
    patches = image.layout.placeholder[image.layout.placeholder >= 0]
    assert set(groups[patches].tolist()) == set(image.kept)
    assert (groups[image.layout.separators] == -1).all()
    assert groups[image.kept].tolist() == image.kept
    width, height = 56, 28
    drawn = visualize.show_merge_groups(Image.new("RGB", (width, height), "white"), report, seen, side=None)
    (crops,) = [
        v for v in places.views(report.images, (width, height), places.Geometry("llava_next", tile=28)) if v.name == "crops"
    ]
    colours: dict[int, set[Any]] = {}
    for _, _, token, box in crops.cells():
        left, top, right, bottom = drawing.pixels(box)
        colours.setdefault(int(groups[token]), set()).add(drawn.getpixel(((left + right) // 2, (top + bottom) // 2)))
    assert all(len(one) == 1 for one in colours.values())
    assert len({next(iter(one)) for one in colours.values()}) == len(colours)


@dataclasses.dataclass(kw_only=True)
class Chained(vlprune.Method):
    """After vision block 0 each tile's last row joins the one before, after block 1 that one joins the first."""

    adaptive: ClassVar[bool] = True
    name: ClassVar[str] = "chained"

    def encode_layers(self, layout: Any, shape: Any) -> tuple[int, ...]:
        return (0, 1)

    def encode(self, tokens: vlprune.VisionTokens) -> vlprune.Selection:
        tiles, count = tokens.patches.shape
        into = count - 2 if tokens.layer == 0 else 0
        target = torch.full((tiles, count), -1)
        target[:, [into, count - 1]] = into
        return vlprune.Selection(torch.arange(count - 1).expand(tiles, -1), vlprune.Merge(target))


def test_merges_inside_the_encoder_are_followed_to_their_end(model: Any):
    report, seen = seen_of(model, Chained())
    layout, groups = report.images[0].layout, seen.groups()
    assert layout is not None
    for tile in layout.placeholder.tolist():
        present = [token for token in (tile[0], tile[14], tile[15]) if token >= 0]
        if tile[0] >= 0:
            assert groups[present].tolist() == [tile[0]] * len(present)
    assert (groups >= 0).sum() <= 3 * layout.tiles


def test_scores_are_the_attention_that_the_method_saw(model: Any):
    _, seen = seen_of(model, "fastervlm", budget=0.25)
    ((name, values),) = seen.scores().items()
    assert "[CLS]" in name
    report, again = seen_of(model, "fastervlm", budget=0.25)
    (image,) = report.images
    assert image.layout is not None
    for tile in image.layout.placeholder:
        present = tile[tile >= 0]
        kept = [token for token in present.tolist() if token in image.kept]
        left = [token for token in present.tolist() if token not in image.kept]
        assert not kept or not left or min(values[kept]) >= max(values[left])
    assert visualize.show_scores(Image.new("RGB", (56, 28)), report, again).size == (512, 256)
    report, nothing = seen_of(model, "uniform", budget=0.25)
    with pytest.raises(ValueError, match="no attention"):
        visualize.show_scores(Image.new("RGB", (8, 8)), report, nothing)
    # Nothing is left on the method when the block is over.
    method = vlprune.Pool(budget=0.5)
    with vlprune.applied(model, method), visualize.watched(model):
        assert "select" in vars(method)
    assert "select" not in vars(method)
    with pytest.raises(vlprune.NotAppliedError), visualize.watched(model):
        pass
