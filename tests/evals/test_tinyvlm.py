"""TinyVLM: its training can be cut off and goes on as if it had not been; what it ships is an ordinary checkpoint."""

from __future__ import annotations

import json
import random

import pytest
import torch

from vlprune.evals import synthvqa, tinyvlm
from vlprune.evals.tinyvlm import build, export, train
from vlprune.evals.tinyvlm.train import Stage, Trainer

SHORT = (
    Stage("encoder", 3, 2, rate=1e-3, encoder_rate=1e-3),
    Stage("vlm", 5, 2, rate=1e-3, encoder_rate=1e-4, unfreeze=2, captions=0.5, zeros=0.5, pointing=0.5),
)


def test_training_goes_on_where_it_was_cut_off(tmp_path):
    """Same weights, whether it ran through or was stopped in the middle of a stage."""
    through = Trainer(tmp_path / "through", SHORT)
    through.run()
    first = Trainer(tmp_path / "cut", SHORT, save_every=2)
    real, calls = first.loss, []

    def stop_in_the_second_stage(stage, step):
        calls.append(step)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(stage, step)

    first.loss = stop_in_the_second_stage
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = Trainer(tmp_path / "cut", SHORT, save_every=2)
    second.run()
    for name, weight in through.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)


def test_training_sees_what_the_processor_makes():
    images = [synthvqa.scene("train", i).draw() for i in range(3)]
    made = build.processor()(images=images, text=["<image>"] * 3, return_tensors="pt")
    torch.testing.assert_close(train.pixels(images), made["pixel_values"], atol=1e-6, rtol=0)
    assert int((made["input_ids"][0] == build.SPECIAL.index("<image>")).sum()) == train.VISUAL_TOKENS


def test_patches_are_told_what_lies_under_them():
    """Every character is the target of a patch of the tile it is in, with its place in the text."""
    picture = synthvqa.scene("train", 0, "scene")
    targets = train.patch_targets(picture)
    for item in (item for item in picture.items if item.text):
        tile = 1 + int(item.centre[0] >= synthvqa.TILE) + 2 * int(item.centre[1] >= synthvqa.TILE)
        found = {(glyph, place) for _, glyph, place in targets[tile].tolist()}
        for place, char in enumerate(item.text):
            assert (train.GLYPHS.index(char), place + 1) in found


def test_answers_are_learnt_and_nothing_else():
    """Labels are the answers with their end marks; the pixels' placeholders and the questions are left out."""
    dialogues = train.Dialogues()
    picture = synthvqa.scene("train", 1, "form")
    batch = dialogues.batch([picture], random.Random(0), Stage("vlm", 1, 1, 1e-3))
    told = [t for t in batch["labels"][0].tolist() if t != train.IGNORE]
    text = dialogues.tokenizer.decode(told).split("</s>")[:-1]
    assert sorted(text) == sorted(q.answers[0] for q in picture.questions)


def test_answers_point_at_what_shows_them():
    """Every character of an answer is read off patches of the tile that its glyph is in, and off no two characters' patches."""
    for index in range(20):
        picture = synthvqa.scene("train", index)
        for question in picture.questions:
            seen = train.pointed_at(picture, question)
            if question.kind in ("text", "form") or question.text.startswith("What is the value"):
                assert len(seen) == len(question.answers[0])
                assert all(seen)
                assert len({place for places in seen for place in places}) == sum(map(len, seen))
            if question.answers[0] == "yes":
                assert seen
            for places in seen:
                assert 0 <= min(places) <= max(places) < train.VISUAL_TOKENS


def test_the_measured_attention_is_the_models_own():
    """What the loss on where to look measures, against the attention maps of an eager run."""
    model = build.model(seed=1).eval()
    model.set_attn_implementation("eager")
    layer = model.model.language_model.layers[2]
    pointers = train.Pointers([layer])
    scenes = [synthvqa.scene("train", index, "form") for index in range(2)]
    batch = train.Dialogues().batch(scenes, random.Random(0), SHORT[1])
    pointing, places = batch.pop("pointing"), batch.pop("places")
    batch.pop("labels"), batch.pop("kinds")
    pointers.pointing, pointers.places = pointing, places
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions[2]
    expected = []
    for sample, row in zip(*torch.nonzero(pointing >= 0, as_tuple=True), strict=True):
        looked = maps[sample, : train.Pointers.HEADS, pointing[sample, row], 1 : train.VISUAL_TOKENS + 1]
        expected.append((looked * places[sample, row]).sum(-1).log())
    torch.testing.assert_close(pointers.loss(), -torch.stack(expected).mean(), atol=1e-4, rtol=0)


def test_the_checkpoint_has_the_hubs_file_format():
    """Names of parameters and classes are those of the hub, and it is small enough for a repository."""
    from safetensors import safe_open

    config = json.loads((tinyvlm.CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    with safe_open(tinyvlm.CHECKPOINT / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert sum(file.stat().st_size for file in tinyvlm.CHECKPOINT.iterdir()) < 25e6


def test_export_round_trip(tmp_path, monkeypatch):
    """What is written is what is loaded, weight by weight, by from_pretrained."""
    model = build.model(seed=3)
    export.export(model, tmp_path)
    monkeypatch.setattr(tinyvlm, "CHECKPOINT", tmp_path)
    loaded, processor = tinyvlm.load()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert processor.tokenizer.decode(processor.tokenizer("What is the name? K7P").input_ids[1:]) == "What is the name? K7P"


def test_the_tokenizer_takes_any_text_and_gives_it_back():
    tokenizer = build.tokenizer()
    for text in ("What does the red sign say?", "K7P", "an unknown word: Zürich"[:16], "A\nB  c", "42"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_tinyvlm_answers_well():
    """A sample of the test split: far better than chance on every kind."""
    model, processor = tinyvlm.load()
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
