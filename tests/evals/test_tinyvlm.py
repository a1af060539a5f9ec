"""TinyVLM and its sibling: training can be cut off and goes on as if it had not been; what is shipped are ordinary
checkpoints."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from vlprune.evals import synthvqa, tinyvlm
from vlprune.evals.tinyvlm import build, export, qwen, targets, train
from vlprune.evals.tinyvlm.architecture import Architecture
from vlprune.evals.tinyvlm.train import Stage, Trainer

SHORT = (
    Stage("encoder", 3, 2, rate=1e-3, encoder_rate=1e-3),
    Stage("vlm", 5, 2, rate=1e-3, encoder_rate=1e-4, unfreeze=2, captions=0.5, zeros=0.5, pointing=0.5),
)
CROPS = Stage("crops", 1, 2, rate=1e-3, encoder_rate=1e-3, crops=True)
ARCHITECTURES = {"llava": build.LLAVA_NEXT, "qwen": qwen.QWEN25_VL}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


def processor_of(architecture: Architecture) -> Any:
    return build.processor() if architecture is build.LLAVA_NEXT else qwen.processor()


def test_training_goes_on_where_it_was_cut_off(tmp_path, architecture):
    """Same weights, whether it ran through or was stopped in the middle of a stage."""
    comparing = replace(SHORT[1], mentions=True, comparisons=2, positions=0.2)
    stages = (CROPS, SHORT[0], comparing) if architecture is qwen.QWEN25_VL else SHORT
    through = Trainer(tmp_path / "through", stages, architecture=architecture)
    through.run()
    first = Trainer(tmp_path / "cut", stages, save_every=2, architecture=architecture)
    real, calls = first.loss, []

    def stop_in_the_last_stage(stage, step):
        calls.append(step)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(stage, step)

    first.loss = stop_in_the_last_stage
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = Trainer(tmp_path / "cut", stages, save_every=2, architecture=architecture)
    second.run()
    for name, weight in through.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)


def test_training_sees_what_the_processor_makes(architecture):
    """Pixels, token types and the number of placeholders, with as much text as comes before the first question."""
    scenes = [synthvqa.scene("train", i) for i in range(3)]
    prompt = architecture.before * (architecture is qwen.QWEN25_VL) + architecture.image + architecture.after
    images = [scene.draw() for scene in scenes]
    made = processor_of(architecture)(images=images, text=[prompt] * 3, return_tensors="pt")
    told = architecture.inputs(images, made["input_ids"])
    assert set(told) == set(made) - {"input_ids", "attention_mask"}
    for name, value in told.items():
        torch.testing.assert_close(value.flatten(), made[name].flatten(), atol=1e-6, rtol=0, check_dtype=False)
    opening = train.Dialogues(architecture).opening
    assert made["input_ids"].tolist() == [opening] * 3
    image = architecture.tokenizer().convert_tokens_to_ids(architecture.image)
    assert opening[1 : architecture.visual_tokens + 1] == [image] * architecture.visual_tokens


def test_cells_are_told_what_lies_under_them(architecture):
    """Every character is the target of a cell of a view that it is in, with its place in the text."""
    picture = synthvqa.scene("train", 0, "scene")
    told = targets.cell_targets(picture, architecture.views)
    for item in (item for item in picture.items if item.text):
        shown = [number for number, view in enumerate(architecture.views) if targets.holds(view.box, item.centre)]
        (number,) = (number for number in shown if architecture.views[number].readable)
        found = {(glyph, place) for _, glyph, place in told[number].tolist()}
        for place, char in enumerate(item.text):
            assert (targets.GLYPHS.index(char), place + 1) in found


def test_captions_name_what_lies_in_a_view(architecture):
    """The view of the whole image names everything, and readable ones name every character."""
    picture = synthvqa.scene("train", 2, "form")
    told = targets.caption_targets(picture, architecture.views)
    whole = {targets.OWNERS[number] for number in told[0][: len(targets.OWNERS)].nonzero()[0]}
    assert whole == {item.phrase for item in picture.items}
    characters = {targets.GLYPHS[number] for number in told[:, len(targets.OWNERS) :].any(0).nonzero()[0]}
    assert characters == set("".join(item.text for item in picture.items))


def test_answers_are_learnt_and_nothing_else(architecture):
    """Labels are the answers with their end marks; the pixels' placeholders and the questions are left out."""
    dialogues = train.Dialogues(architecture)
    picture = synthvqa.scene("train", 1, "form")
    batch = dialogues.batch([picture], random.Random(0), Stage("vlm", 1, 1, 1e-3))
    told = [t for t in batch["labels"][0].tolist() if t != targets.IGNORE]
    text = dialogues.tokenizer.decode(told).split(architecture.end)[:-1]
    assert sorted(text) == sorted(q.answers[0] for q in picture.questions)


def test_a_dialogue_begins_like_a_prompt(architecture):
    """What the model is trained on begins as the processor lets an evaluation begin."""
    picture = synthvqa.scene("train", 1, "form")
    question = picture.questions[0]
    sequence = train.Dialogues(architecture).sequence(
        synthvqa.Scene(picture.layout, picture.background, picture.items, (question,)),
        random.Random(0),
        Stage("vlm", 1, 1, 1e-3),
    )
    processor = processor_of(architecture)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    made = processor(images=[picture.draw()], text=[prompt], return_tensors="pt")["input_ids"][0].tolist()
    assert sequence.ids[: len(made)] == made
    assert sequence.answers[0][0] == len(made)


def test_answers_point_at_what_shows_them(architecture):
    """Every character of an answer is read off cells of the view that its glyph is in, and off no two characters' cells."""
    for index in range(20):
        picture = synthvqa.scene("train", index)
        for question in picture.questions:
            seen = targets.pointed_at(picture, question, architecture)
            if question.kind in ("text", "form") or question.text.startswith("What is the value"):
                assert len(seen) == len(question.answers[0])
                assert all(seen)
                assert len({place for places in seen for place in places}) == sum(map(len, seen))
            if question.answers[0] == "yes":
                assert seen
            for places in seen:
                assert 0 <= min(places) <= max(places) < architecture.visual_tokens


def test_what_is_compared_is_looked_at_where_it_is_named(architecture):
    """In "Is the red cross left of the blue circle?" the word "cross" points at the cross, "circle" at the circle."""
    dialogues = train.Dialogues(architecture)
    stage = replace(SHORT[1], mentions=True, captions=0.0)
    word = {shape: dialogues.encode(f" {shape}")[0] for shape in synthvqa.SHAPES}
    for index in range(20):
        picture = synthvqa.scene("train", index, "scene")
        asked = synthvqa.comparisons(picture)[:1]
        sequence = dialogues.sequence(replace(picture, questions=tuple(asked)), random.Random(0), stage)
        found = [(position, seen) for position, seen in sequence.pointers if sequence.ids[position] in word.values()]
        named = [item for item in picture.items for question in asked if item.phrase in question.text]
        assert len(found) == len(named)
        for item in named:
            expected = sorted(architecture.places(item.box))
            assert any(sequence.ids[position] == word[item.kind] and seen == expected for position, seen in found)


def test_positions_are_rows_and_columns_of_the_image(architecture):
    """Every cell of the image has a visual token that knows its middle; row ends and thumbnails have none."""
    found = architecture.positions()
    known = found[~found.isnan().any(-1)]
    middles = (torch.arange(16) + 0.5) / 16
    expected = torch.cartesian_prod(middles, middles)
    assert sorted(known.tolist()) == expected.tolist()


def test_the_measured_attention_is_the_models_own(architecture):
    """What the loss on where to look measures, against the attention maps of an eager run."""
    model = architecture.model(seed=1).eval()
    model.set_attn_implementation("eager")
    layer = model.model.language_model.layers[2]
    pointers = train.Pointers([layer])
    scenes = [synthvqa.scene("train", index, "form") for index in range(2)]
    batch = train.Dialogues(architecture).batch(scenes, random.Random(0), SHORT[1])
    pointing, places = batch.pop("pointing"), batch.pop("places")
    batch.pop("labels"), batch.pop("kinds")
    pointers.pointing, pointers.places = pointing, places
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions[2]
    expected = []
    for sample, row in zip(*torch.nonzero(pointing >= 0, as_tuple=True), strict=True):
        looked = maps[sample, : train.Pointers.HEADS, pointing[sample, row], 1 : architecture.visual_tokens + 1]
        expected.append((looked * places[sample, row]).sum(-1).log())
    torch.testing.assert_close(pointers.loss(), -torch.stack(expected).mean(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("folder", "name", "parameters"),
    [
        (
            tinyvlm.CHECKPOINT,
            "LlavaNextForConditionalGeneration",
            (
                "vision_tower.vision_model.embeddings.class_embedding",
                "language_model.model.layers.0.self_attn.q_proj.weight",
                "language_model.lm_head.weight",
            ),
        ),
        (
            tinyvlm.QWEN_CHECKPOINT,
            "Qwen2_5_VLForConditionalGeneration",
            ("visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"),
        ),
    ],
    ids=tinyvlm.NAMES,
)
def test_the_checkpoint_has_the_hubs_file_format(folder, name, parameters):
    """Names of parameters and classes are those of the hub, and it is small enough for a repository."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [name]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert set(parameters) <= set(weights.keys())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6


def test_export_round_trip(tmp_path, monkeypatch, architecture):
    """What is written is what is loaded, weight by weight but for their precision, by from_pretrained."""
    model = architecture.model(seed=3)
    export.export(model, tmp_path, architecture)
    monkeypatch.setattr(tinyvlm, "CHECKPOINT", tmp_path)
    monkeypatch.setattr(tinyvlm, "QWEN_CHECKPOINT", tmp_path)
    loaded, processor = tinyvlm.load("tinyvlm" if architecture is build.LLAVA_NEXT else "tinyvlm-qwen")
    assert loaded.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(architecture.dtype).float()), name
    ids = processor.tokenizer("What is the name? K7P", add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == "What is the name? K7P"
    made, again = processor_of(architecture), processor
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the name?"}]}]
    images = [synthvqa.scene("train", 0).draw()]
    inputs = [p(images=images, text=[p.apply_chat_template(chat)], return_tensors="pt") for p in (made, again)]
    for name, value in inputs[0].items():
        assert torch.equal(value, inputs[1][name]), name


def test_crops_show_what_their_targets_name():
    """A crop's targets are those of its cells in the whole image, and the densest tile is where the characters are."""
    for index in range(12):
        picture = synthvqa.scene("train", index)
        tile = targets.densest_tile(picture, characters=True)
        left, top = (start // 8 for start in tile.origin)
        whole = targets.cell_targets(picture, qwen.QWEN25_VL.views).reshape(16, 16, 3)
        part = targets.cell_targets(picture, (tile,)).reshape(8, 8, 3)
        assert (part == whole[top : top + 8, left : left + 8]).all()
        written = [item for item in picture.items if item.text]
        assert any(targets.holds(tile.box, item.centre) for item in written) or not written


@pytest.mark.parametrize("side", [64, 128])
def test_qwens_training_computes_what_the_model_computes(side):
    """Windows that are attended to at once give the features that they give one by one; the model is left as it was."""
    model = qwen.model(0)
    images = [synthvqa.scene("train", index).draw().crop((0, 0, side, side)) for index in range(2)]
    expected, _ = qwen.QWEN25_VL.features(model, images)
    with qwen.QWEN25_VL.training(model):
        features, _ = qwen.QWEN25_VL.features(model, images)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    again, _ = qwen.QWEN25_VL.features(copy.deepcopy(model), images)
    assert torch.equal(again, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'tinyvlm' and 'tinyvlm-qwen'"):
        tinyvlm.load("llava-7b")


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (200, 120), (300, 300), (24, 30)])
def test_qwens_placeholders_are_as_many_as_its_encoder_makes(size):
    """Any size of image, prompts of two images and of none: what transformers' processor counts, and what the model takes."""
    processor = qwen.processor()
    model = qwen.model(0).eval()
    images = [synthvqa.scene("train", 0).draw().resize(size), synthvqa.scene("train", 1).draw()]
    both = "<|vision_start|><|image_pad|><|vision_end|>" * 2
    inputs = processor(images=images, text=[both + "a", "b"], padding=True)
    theirs = [processor.image_processor.get_number_of_image_patches(image.height, image.width, {}) // 4 for image in images]
    assert theirs[1] == 256
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == sum(theirs)
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_qwens_processor_counts_images():
    with pytest.raises(ValueError, match="1 images for 2 placeholders"):
        qwen.processor()(images=[synthvqa.scene("train", 0).draw()], text=["<|image_pad|><|image_pad|>"])


def test_qwens_places_are_rows_and_columns():
    """What tells M-RoPE of an image: height and width of the grid, and then text that goes on behind the larger one."""
    inputs = qwen.processor()(
        images=[synthvqa.scene("train", 0).draw()], text=["<|vision_start|><|image_pad|><|vision_end|>How many"]
    )
    model = qwen.model(0)
    taken = {key: value for key, value in inputs.items() if key != "pixel_values"}
    positions, _ = model.model.get_rope_index(**taken)
    rows, columns = positions[1:, 0, 1:257].unflatten(-1, (16, 16))
    assert torch.equal(rows, torch.arange(1, 17)[:, None].expand(16, 16))
    assert torch.equal(columns, torch.arange(1, 17)[None].expand(16, 16))
    assert positions[:, 0, 257:].tolist() == [list(range(17, 17 + inputs["input_ids"].shape[1] - 257))] * 3


def test_the_tokenizer_takes_any_text_and_gives_it_back(architecture):
    tokenizer = architecture.tokenizer()
    for text in ("What does the red sign say?", "K7P", "an unknown word: Zürich"[:16], "A\nB  c", "42"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", tinyvlm.NAMES)
def test_it_answers_well(name):
    """A sample of the test split: far better than chance on every kind."""
    model, processor = tinyvlm.load(name)
    right = dict.fromkeys(synthvqa.KINDS, 0)
    rows = list(synthvqa.examples("test", 60))
    for start in range(0, len(rows), 20):
        part = rows[start : start + 20]
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}] for row in part]
        prompts = [processor.apply_chat_template(chat) for chat in chats]
        inputs = processor(images=[row.image for row in part], text=prompts, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(part, processor.tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            right[row.kind] += text == row.answers[0]
    assert sum(right.values()) >= 42
    assert min(right.values()) >= 5
