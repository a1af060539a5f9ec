"""What each family says of its models, against the models themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlprune
from tests import media, zoo
from tests.media import IMAGE, VIDEO, Item
from tests.reference import pruned_and_masked
from vlprune.engine.family import IMAGE as IMAGES
from vlprune.engine.family import VIDEO as VIDEOS
from vlprune.engine.family import Parts, family_of
from vlprune.engine.features import put_together, taken_apart
from vlprune.image import ImageLayout
from vlprune.integrations.qwen_vl import QWEN3_VL

ROOT = Path(__file__).parent.parent
FILMED = [family for family, entry in zoo.FAMILIES.items() if entry.video]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def parts_of(model: Any) -> Parts:
    return family_of(model).parts(model)


def shown(family: str, sizes: list[tuple[int, int]], together: bool) -> dict[str, Tensor]:
    """Arguments for images of ``sizes``, all in one sample or each in its own."""
    siblings = len(sizes) if together else 1
    items = [Item(i, 0 if together else i, siblings, size) for i, size in enumerate(sizes)]
    return zoo.FAMILIES[family].media.image_inputs(items, 1 if together else len(sizes), noise)


def filmed(family: str, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    return zoo.FAMILIES[family].media.video_inputs([Item(i, i, 1, size) for i, size in enumerate(sizes)], noise)


def sizes_of(family: str) -> st.SearchStrategy[tuple[int, int]]:
    """Pixels for families of tiles, patches for those of images of any size (Mistral 3 fails upstream for a single token)."""
    patches = zoo.FAMILIES[family].media.sizes is media.GRIDS
    side = st.integers(2, 6).map(lambda n: 2 * n) if patches else st.integers(8, 120)
    return st.tuples(side, side)


def check(layout: ImageLayout) -> None:
    """A layout agrees with itself."""
    rows, columns = layout.grid
    assert layout.placeholder.shape == (layout.tiles, rows * columns)
    owned = layout.placeholder[layout.placeholder >= 0]
    assert owned.unique().shape == owned.shape
    assert torch.cat([region.flatten() for region in layout.regions]).sort().values.equal(owned.sort().values)
    assert len(layout.separators) + sum(layout.available) == layout.total


def lengths_agree(model: Any, inputs: dict[str, Tensor], seam: str) -> None:
    family = family_of(model)
    layouts = family.layouts if seam == "get_image_features" else family.video_layouts
    assert layouts is not None
    made = layouts(model, inputs)
    for layout in made:
        check(layout)
    with torch.no_grad():
        out = media.pieces(media.features(model, inputs, seam))
    images = taken_apart(out, made, None if family.tail is None else family.tail(model))
    assert [image.shape[0] for image in images] == [layout.total for layout in made]
    for piece, again in zip(out, put_together(out, images), strict=True):
        assert torch.equal(piece, again)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_layouts_of_images_have_as_many_tokens_as_the_model_gives(family):
    """Alone and together, for images of many sizes."""
    model = zoo.build(family)

    @settings(max_examples=12)
    @given(st.lists(sizes_of(family), min_size=1, max_size=3), st.booleans())
    def run(sizes: list[tuple[int, int]], together: bool) -> None:
        lengths_agree(model, shown(family, sizes, together), "get_image_features")

    run()


@pytest.mark.parametrize("family", FILMED)
def test_layouts_of_videos_have_as_many_tokens_as_the_model_gives(family):
    model = zoo.build(family)

    @settings(max_examples=6)
    @given(st.lists(sizes_of(family), min_size=1, max_size=3))
    def run(sizes: list[tuple[int, int]]) -> None:
        lengths_agree(model, filmed(family, sizes), "get_video_features")

    run()


# ------------------------------------------------------------------ which patch is which token


class Marker:
    """Changes some rows of what leaves the blocks of the encoder, whatever container it comes in."""

    def __init__(self, parts: Parts, tile: int, rows: Tensor):
        self.parts, self.tile, self.rows = parts, tile, rows

    def __enter__(self) -> None:
        if self.parts.family.packed and self.parts.projector.__class__.__name__.endswith("Merger"):
            self.handle = self.parts.projector.register_forward_pre_hook(self.before)
        else:
            self.handle = self.parts.vision.register_forward_hook(self.after)

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()

    def mark(self, states: Tensor) -> Tensor:
        states = states.clone()
        at = states[0] if states.ndim == 3 and self.parts.family.packed else states if states.ndim == 2 else states[self.tile]
        at[self.rows + self.parts.prefix] = 30 * torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1))
        return states

    def before(self, module: Any, args: Any) -> Any:
        return (self.mark(args[0]), *args[1:])

    def after(self, module: Any, args: Any, out: Any) -> Any:
        out.last_hidden_state = self.mark(out.last_hidden_state)
        if out.hidden_states is not None:
            out.hidden_states = tuple(None if s is None else self.mark(s) for s in out.hidden_states)
        return out


def rows_of(parts: Parts, layouts: list[ImageLayout], order: Tensor | None, image: int, tile: int, patch: int) -> Tensor:
    """Rows of the encoder's last block that become a token, in its tile, or, where rows are packed, in all of them."""
    rows = parts.family.groups(parts.model, layouts[image].grid)[patch]
    if not parts.family.packed:
        return rows
    sizes = [(layout.placeholder.shape[1], layout.tiles) for layout in layouts]
    before = sum(tokens * tiles for tokens, tiles in sizes[:image]) + tile * sizes[image][0]
    if order is None:
        return rows + before * rows.shape[0]
    place = int((order == before + patch).nonzero())
    return place * rows.shape[0] + torch.arange(rows.shape[0])


def placeholders_are_right(model: Any, inputs: dict[str, Tensor], seam: str) -> None:
    """A patch that is changed on its way out of the encoder shows at its placeholder, and there most."""
    parts = parts_of(model)
    family = parts.family
    find = family.layouts if seam == "get_image_features" else family.video_layouts
    assert find is not None
    layouts = find(model, inputs)
    order = None if family.order is None else family.order(model, inputs)
    tail = None if family.tail is None else family.tail(model)
    plain = taken_apart(media.pieces(media.features(model, inputs, seam)), layouts, tail)
    mixes = "onevision" in model.config.model_type
    generator = torch.Generator().manual_seed(0)
    first = 0
    for index, layout in enumerate(layouts):
        for tile in range(layout.tiles):
            for patch in torch.randperm(layout.placeholder.shape[1], generator=generator)[:4].tolist():
                with Marker(parts, first + tile, rows_of(parts, layouts, order, index, tile, patch)):
                    marked = taken_apart(media.pieces(media.features(model, inputs, seam)), layouts, tail)
                change = [(new - old).norm(dim=-1) for new, old in zip(marked, plain, strict=True)]
                assert all((change[i] == 0).all() for i in range(len(layouts)) if i != index)
                place = int(layout.placeholder[tile, patch])
                if mixes and place >= 0:
                    assert int(change[index].argmax()) == place
                elif not mixes:
                    assert change[index].nonzero().flatten().tolist() == ([place] if place >= 0 else [])
        first += layout.tiles


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_each_patch_of_an_image_is_at_its_placeholder(family, together):
    sizes = zoo.FAMILIES[family].media.sizes
    with torch.no_grad():
        placeholders_are_right(zoo.build(family), shown(family, sizes, together), "get_image_features")


@pytest.mark.parametrize("family", FILMED)
def test_each_patch_of_a_video_is_at_its_placeholder(family):
    sizes = zoo.FAMILIES[family].media.sizes
    with torch.no_grad():
        placeholders_are_right(zoo.build(family), filmed(family, sizes[:2]), "get_video_features")


# ------------------------------------------------------------------ placeholders of both kinds


def test_families_are_registered_by_model_type():
    assert family_of(zoo.build("qwen3_vl")) is QWEN3_VL


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_placeholders_are_told_apart(family, embedded):
    model = zoo.build(family)
    ids = torch.tensor([[1, IMAGE, IMAGE, 5, VIDEO, 7], [VIDEO, 3, IMAGE, VIDEO, 4, 4]])
    embeddings = model.get_input_embeddings()(ids) if embedded else None
    kinds = family_of(model).placeholders(model, None if embedded else ids, embeddings)
    video = 2 if zoo.FAMILIES[family].video else 0
    assert kinds.dtype == torch.int8
    assert kinds.tolist() == [[0, 1, 1, 0, video, 0], [video, 0, 1, video, 0, 0]]


# ------------------------------------------------------------------ choices at the seams


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_seam_gives_what_it_gave_and_its_choice_for_each_image(family):
    """Random tokens change no feature; images and videos are chosen for once, each with its own count."""
    model = zoo.build(family)
    given = {IMAGES: shown(family, zoo.FAMILIES[family].media.sizes[:3], False)}
    if zoo.FAMILIES[family].video:
        given[VIDEOS] = filmed(family, zoo.FAMILIES[family].media.sizes[:2])
    inputs = {name: value for arguments in given.values() for name, value in arguments.items()}
    with torch.no_grad():
        expected = zoo.all_features(model, inputs)
        with vlprune.applied(model, "random", budget=0.4):
            pruned = zoo.all_features(model, inputs)
            latest = model._vlprune.encoder.latest
    for seam, out in expected.items():
        for old, new in zip(media.pieces(out), media.pieces(pruned[seam]), strict=True):
            assert torch.equal(old, new)
    made = {kind: find(model, given[kind]) for kind, find in family_of(model).seams.items()}
    assert latest.keys() == made.keys()
    for kind, choices in latest.items():
        assert [c.layout.total for c in choices] == [layout.total for layout in made[kind]]
        assert [c.kept for c in choices] == [vlprune.Random(budget=0.4).count(layout.total) for layout in made[kind]]
        assert all(c.kind == kind for c in choices)


@pytest.mark.parametrize("family", FILMED)
def test_beams_of_images_beside_videos(family):
    """Each beam has the choices of its own prompt, whichever kind comes first."""
    if family == "qwen3_vl" and zoo.VERSION < (5, 0):
        pytest.skip("transformers before 5 cannot expand its videos")
    model = zoo.build(family)
    inputs = zoo.prompt(family, images=(1, 0, 1), videos=(1, 1, 0), words=(5, 7, 3))

    def run() -> Any:
        return zoo.generate(model, inputs, num_beams=2, num_return_sequences=2, output_scores=True)

    pruned, expected = pruned_and_masked(model, inputs, run, method="random")
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(pruned.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_default_method_goes_with_every_family(family):
    model = zoo.build(family)
    with vlprune.applied(model), torch.no_grad():
        model(**zoo.prompt(family))
        assert vlprune.report(model).entering < vlprune.report(model).total


def test_families_name_the_versions_that_the_tests_run_with():
    pins = [line for name in ("constraints-oldest.txt", "constraints.txt") for line in (ROOT / name).read_text().splitlines()]
    versions = tuple(line.partition("==")[2] for line in pins if line.startswith("transformers=="))
    assert {family.tested for family in vlprune.supported_models()} == {versions}
    assert {family.config().model_type for family in zoo.FAMILIES.values()} == {
        model_type for family in vlprune.supported_models() for model_type in family.model_types
    }
