"""SynthVQA is the same everywhere, splits share nothing, and every answer is to be seen in its image."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from vlprune.evals import synthvqa
from vlprune.evals.metrics import METRIC_OF_KIND
from vlprune.evals.synthvqa import COLOURS, KINDS, SHAPES, SIZE, TILE, Item, Scene

SCENES = [synthvqa.scene(split, index) for split in ("train", "test") for index in range(150)]
GOLDEN_IMAGES = {
    "test-00000": "87865a4e16b0599b",
    "test-00001": "9467746d2ef4f409",
    "test-00002": "5b4881da8935a88d",
    "test-00003": "f2d53020efba4422",
    "test-00004": "8d0fa26ed473b23f",
    "test-00005": "c27c657872adc8f5",
}
GOLDEN_QUESTIONS = "3b2afafa326ab4bc0ce5efaa56a77eca449634274ab5643e4be86c39b86e5191"


@pytest.fixture(scope="module")
def rows() -> list[synthvqa.Example]:
    return list(synthvqa.examples("test", 360))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_same_seed_same_images(rows: list[synthvqa.Example]):
    assert {row.id: digest(row.image.tobytes())[:16] for row in rows[:6]} == GOLDEN_IMAGES


def test_same_seed_same_questions(rows: list[synthvqa.Example]):
    text = "\n".join(f"{row.id} {row.kind} {row.question} {row.answers}" for row in rows)
    assert digest(text.encode()) == GOLDEN_QUESTIONS


def test_fewer_examples_are_the_first_of_more(rows: list[synthvqa.Example]):
    for few, more in zip(synthvqa.examples("test", 12), rows, strict=False):
        assert (few.id, few.question, few.answers) == (more.id, more.question, more.answers)
        assert few.image.tobytes() == more.image.tobytes()


def test_splits_share_no_image(rows: list[synthvqa.Example]):
    test = {digest(row.image.tobytes()) for row in rows}
    train = {digest(synthvqa.scene("train", index).draw().tobytes()) for index in range(400)}
    assert (len(test), len(train)) == (360, 400)
    assert not test & train


def test_kinds_are_balanced(rows: list[synthvqa.Example]):
    assert Counter(row.kind for row in rows) == dict.fromkeys(KINDS, 60)


def test_yes_and_no_are_balanced(rows: list[synthvqa.Example]):
    share = [row.answers[0] == "yes" for row in rows if row.kind == "presence"]
    assert 0.35 <= sum(share) / len(share) <= 0.65


def test_every_kind_has_a_metric_and_as_many_answers_as_it_needs(rows: list[synthvqa.Example]):
    assert set(METRIC_OF_KIND) == set(KINDS)
    assert {kind: metric.name for kind, metric in METRIC_OF_KIND.items()} == {
        "text": "VQA accuracy",
        "form": "ANLS",
        "chart": "relaxed accuracy",
        "presence": "POPE F1",
        "relation": "exact match",
        "counting": "exact match",
    }
    for row in rows:
        assert len(row.answers) == (10 if row.kind == "text" else 1)
        assert METRIC_OF_KIND[row.kind].sample(row.answers[0], row.answers) == 1.0


def test_images_are_rgb_of_one_size(rows: list[synthvqa.Example]):
    assert {(row.image.mode, row.image.size) for row in rows} == {("RGB", (SIZE, SIZE))}


def test_unknown_split():
    with pytest.raises(ValueError, match="'train' and 'test'"):
        synthvqa.scene("validation", 0)


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize("picture", SCENES[::3])
def test_boxes_lie_in_the_image_and_apart(picture: Scene):
    for item in picture.items:
        for left, top, right, bottom in (item.box, *item.glyphs):
            assert 0 <= left < right <= SIZE
            assert 0 <= top < bottom <= SIZE
    for number, one in enumerate(picture.items):
        for other in picture.items[:number]:
            a, b = one.box, other.box
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("picture", SCENES[::3])
def test_characters_lie_in_their_item_and_in_one_tile(picture: Scene):
    for item in picture.items:
        assert len(item.glyphs) == len(item.text)
        for left, top, right, bottom in item.glyphs:
            # The cell of a character is a little larger than its ink: on the lowest bar it reaches one pixel below.
            assert item.box[0] <= left < right <= item.box[2]
            assert item.box[1] <= top < bottom <= item.box[3] + 1
            assert left // TILE == (right - 1) // TILE
            assert top // TILE == (bottom - 1) // TILE


def test_shapes_show_their_colour():
    for picture in SCENES[::5]:
        image = picture.draw()
        for item in picture.items:
            if item.kind in SHAPES:
                assert image.getpixel((int(item.centre[0]), int(item.centre[1]))) == COLOURS[item.name]


# ------------------------------------------------------------------ answers, derived a second time


def named(items: list[Item], phrase: str) -> list[Item]:
    return [item for item in items if f"{item.name} {item.kind}" == phrase]


def middle(item: Item, axis: int) -> float:
    return (item.box[axis] + item.box[axis + 2]) / 2


def look(picture: Scene, question: str) -> str:
    """The answer, from the items alone."""
    items = list(picture.items)
    if found := re.fullmatch(r"What does the (\w+) sign say\?", question):
        (sign,) = named(items, f"{found[1]} sign")
        return sign.text
    if found := re.fullmatch(r"What is the value of the (\w+) bar\?", question):
        (bar,) = named(items, f"{found[1]} bar")
        return bar.text
    if found := re.fullmatch(r"What is the (\w+)\?", question):
        (field,) = named(items, f"{found[1]} field")
        return field.text
    if question == "Which bar is the highest?":
        return min(items, key=lambda item: item.box[1]).name
    if found := re.fullmatch(r"Is there a (\w+ \w+)\?", question):
        return "yes" if named(items, found[1]) else "no"
    if found := re.fullmatch(r"What colour is the (\w+)\?", question):
        (shape,) = (item for item in items if item.kind == found[1])
        return shape.name
    if found := re.fullmatch(r"How many (\w+) are there\?", question):
        singular = "cross" if found[1] == "crosses" else found[1].removesuffix("s")
        return str(len([item for item in items if item.kind == singular]))
    found = re.fullmatch(r"Is the (\w+ \w+) (left of|above) the (\w+ \w+)\?", question)
    assert found, question
    (first,), (second,) = named(items, found[1]), named(items, found[3])
    axis = 0 if found[2] == "left of" else 1
    return "yes" if middle(first, axis) < middle(second, axis) else "no"


@pytest.mark.parametrize("picture", SCENES)
def test_answers_follow_from_the_scene(picture: Scene):
    assert picture.questions
    for question in picture.questions:
        assert set(question.answers) == {look(picture, question.text)}, question.text


def test_every_kind_of_question_occurs():
    assert {question.kind for picture in SCENES for question in picture.questions} == set(KINDS)


def test_absent_things_share_a_trait_with_one_that_is_there():
    for picture in SCENES:
        present = {(item.name, item.kind) for item in picture.items if item.kind in SHAPES}
        for question in picture.questions:
            if question.kind == "presence" and question.answers == ("no",):
                colour, shape = question.text.removeprefix("Is there a ").removesuffix("?").split()
                assert any(colour == c or shape == s for c, s in present)


def test_caption_names_what_lies_in_a_box():
    picture = next(scene for scene in SCENES if scene.layout == "form")
    whole = picture.caption()
    assert all(f"{item.name} field {item.text}" in whole for item in picture.items)
    halves = picture.caption((0, 0, TILE, SIZE)), picture.caption((TILE, 0, SIZE, SIZE))
    assert sorted(part for half in halves for part in half.split(", ") if part) == sorted(whole.split(", "))
