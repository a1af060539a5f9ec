"""Trains TinyVLM on SynthVQA, in two stages; resumes from its last checkpoint.

1. ``encoder``: every patch of layer -2 predicts what lies under it (whose it is, which character, the how-manieth), and
   [CLS] predicts the words and characters of its tile's caption, so that its attention goes to what a caption mentions.
2. ``vlm``: projector and LLM learn, on the frozen encoder first, then along with it. All questions of an image stand
   in one sequence, some images are described too; the loss is on the answers, and on where two heads of the middle layers
   look while they give them. Without the latter the model needs many times the steps to find out that the words of a
   question name a place in the image.

Usage: ``python -m vlprune.evals.tinyvlm.train --out runs/tinyvlm``
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn

from vlprune.evals import synthvqa
from vlprune.evals.synthvqa import SIZE, TILE, Question, Scene
from vlprune.evals.tinyvlm import build
from vlprune.evals.tinyvlm.export import export

GRID = TILE // build.PATCH
TILES = ((0, 0), (TILE, 0), (0, TILE), (TILE, TILE))
OWNERS = [
    "nothing",
    *(f"{c} {k}" for c in synthvqa.COLOURS for k in (*synthvqa.SHAPES, "sign", "bar")),
    *(f"{k} field" for k in synthvqa.KEYS),
]
GLYPHS = [" ", *sorted(set(synthvqa.LETTERS + synthvqa.DIGITS))]
LEARNT = [*synthvqa.KINDS, "caption"]
IGNORE = -100
VISUAL_TOKENS = 5 * GRID * GRID + SIZE // build.PATCH


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    images: int
    rate: float
    encoder_rate: float = 0.0
    unfreeze: int = 0
    """Step from which the encoder learns along."""
    captions: float = 0.0
    """Share of the images that are described too."""
    zeros: float = 1.0
    """Share of the counting questions kept whose answer is 0, the most frequent one by far."""
    pointing: float = 0.0
    """Weight of the loss on where two heads of the middle layers look while they answer."""


STAGES = (
    Stage("encoder", 2000, 24, rate=1e-3, encoder_rate=1e-3),
    Stage("vlm", 1300, 32, rate=1e-3, encoder_rate=2e-4, unfreeze=500, captions=0.2, zeros=0.5, pointing=0.5),
)


def pixels(images: list[Image.Image]) -> Tensor:
    """What the processor makes of 128 x 128 images: (images, 5, 3, 64, 64), the thumbnail first."""
    small = np.stack([np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC)) for image in images])
    full = np.stack([np.asarray(image) for image in images])
    views = [small] + [full[:, y : y + TILE, x : x + TILE] for x, y in TILES]
    stacked = torch.from_numpy(np.stack(views, 1)).permute(0, 1, 4, 2, 3)
    return stacked.float().div_(127.5).sub_(1.0)


# ------------------------------------------------------------------ stage 1: the encoder


def patch_targets(scene: Scene) -> np.ndarray:
    """(5, 64, 3) integers: owner, character and its place in the text, for every patch of every tile.

    A patch belongs to what its centre lies in. Characters of the thumbnail are too small to read and count as nothing.
    """
    targets = np.zeros((5, GRID, GRID, 3), np.int64)
    targets[0, ..., 1:] = IGNORE
    for item in scene.items:
        owner = OWNERS.index(item.phrase)
        for tile, scale, origin in _views():
            targets[(tile, *_patches(item.box, scale, origin), 0)] = owner
            if tile == 0:
                continue
            for place, (char, box) in enumerate(zip(item.text, item.glyphs, strict=True)):
                where = (tile, *_patches(box, scale, origin))
                targets[(*where, 1)] = GLYPHS.index(char)
                targets[(*where, 2)] = place + 1
    return targets.reshape(5, GRID * GRID, 3)


def _views() -> Iterator[tuple[int, float, tuple[int, int]]]:
    yield 0, TILE / SIZE, (0, 0)
    for tile, origin in enumerate(TILES, start=1):
        yield tile, 1.0, origin


def _patches(box: synthvqa.Box, scale: float, origin: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the patches whose centre lies in ``box``."""

    def span(low: float, high: float, start: int) -> slice:
        first, last = ((v - start) * scale / build.PATCH - 0.5 for v in (low, high))
        return slice(min(max(math.ceil(first), 0), GRID), min(max(math.ceil(last), 0), GRID))

    return span(box[1], box[3], origin[1]), span(box[0], box[2], origin[0])


def caption_targets(scene: Scene) -> np.ndarray:
    """(5, owners + characters) of 0 and 1: what the caption of each tile says; the thumbnail's names no characters."""
    targets = np.zeros((5, len(OWNERS) + len(GLYPHS)), np.float32)
    for item in scene.items:
        for tile, (x, y) in enumerate(((0, 0), *TILES)):
            side = SIZE if tile == 0 else TILE
            if not (x <= item.centre[0] < x + side and y <= item.centre[1] < y + side):
                continue
            targets[tile, OWNERS.index(item.phrase)] = 1
            for char in item.text if tile else "":
                targets[tile, len(OWNERS) + GLYPHS.index(char)] = 1
    return targets


def count_targets(scene: Scene) -> list[int]:
    return [min(sum(item.kind == kind for item in scene.items), 5) for kind in synthvqa.SHAPES]


class EncoderHeads(nn.Module):
    """Linear read-outs that exist during stage 1 only."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.Linear(width, len(OWNERS) + len(GLYPHS) + 5)
        self.caption = nn.Linear(width, len(OWNERS) + len(GLYPHS))
        self.count = nn.Linear(width, len(synthvqa.SHAPES) * 6)

    def forward(self, tower: nn.Module, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
        device = self.patch.weight.device
        values = pixels([scene.draw() for scene in scenes]).to(device)
        out = tower(values.flatten(0, 1), output_hidden_states=True)
        patches = out.hidden_states[-2][:, 1:]
        targets = torch.from_numpy(np.stack([patch_targets(scene) for scene in scenes])).flatten(0, 1).to(device)
        logits = self.patch(patches).float().split([len(OWNERS), len(GLYPHS), 5], dim=-1)
        loss = torch.zeros((), device=device)
        stats = {}
        for name, index, part in zip(("owner", "glyph", "place"), range(3), logits, strict=True):
            target = targets[..., index].flatten()
            weight = torch.ones(part.shape[-1], device=device)
            weight[0] = 0.2
            loss = loss + F.cross_entropy(part.flatten(0, 1), target, weight, ignore_index=IGNORE)
            there = target > 0
            stats[name] = (part.flatten(0, 1).argmax(-1)[there] == target[there]).float().mean().item()
        captions = torch.from_numpy(np.stack([caption_targets(scene) for scene in scenes])).flatten(0, 1).to(device)
        loss = loss + 10 * F.binary_cross_entropy_with_logits(self.caption(out.pooler_output).float(), captions)
        thumbnails = patches.unflatten(0, (len(scenes), 5))[:, 0].mean(1)
        counts = torch.tensor([count_targets(scene) for scene in scenes], device=device)
        predicted = self.count(thumbnails).float().unflatten(-1, (len(synthvqa.SHAPES), 6))
        loss = loss + F.cross_entropy(predicted.flatten(0, 1), counts.flatten())
        stats["count"] = (predicted.argmax(-1) == counts).float().mean().item()
        return loss, stats


# ------------------------------------------------------------------ stage 2: the whole model


class Dialogues:
    """Turns scenes into sequences: the image, then questions and answers in random order, labels on the answers."""

    def __init__(self, longest: int = 144):
        self.tokenizer = build.tokenizer()
        self.longest = longest
        self.bos, self.eos, self.image, self.pad = (build.SPECIAL.index(t) for t in ("<s>", "</s>", "<image>", "<pad>"))
        self.newline = self.encode("\n")
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def sequence(self, scene: Scene, rng: random.Random, stage: Stage) -> Sequence:
        questions = [q for q in scene.questions if q.answers[0] != "0" or rng.random() < stage.zeros]
        rng.shuffle(questions)
        if rng.random() < stage.captions:
            questions.insert(rng.randint(0, 2), Question("caption", "Describe the image.", (scene.caption(),)))
        out = Sequence([self.bos] + [self.image] * VISUAL_TOKENS + self.newline)
        for question in questions:
            if question.text not in self.known:
                self.known[question.text] = self.encode(f"{question.text}\n")
            prompt, told = self.known[question.text], [*self.encode(question.answers[0]), self.eos]
            if len(out.ids) + len(prompt) + len(told) > VISUAL_TOKENS + self.longest:
                continue
            first = len(out.ids) + len(prompt)
            out.ids += [*prompt, *told, *self.newline]
            out.answers += [(first + k, question.kind) for k in range(len(told))]
            out.pointers += [(first + k - 1, places) for k, places in enumerate(pointed_at(scene, question))]
        return out

    def batch(self, scenes: list[Scene], rng: random.Random, stage: Stage) -> dict[str, Tensor]:
        """``pointing (B, R)``: positions that predict an answer's token, -1 as filler; ``places (B, R, visual tokens)``:
        1 where the answer can be seen."""
        rows = [self.sequence(scene, rng, stage) for scene in scenes]
        width, most = max(len(row.ids) for row in rows), max(len(row.pointers) for row in rows)
        labels = torch.full((len(rows), width), IGNORE)
        kinds = torch.zeros(len(rows), width, dtype=torch.long)
        pointing = torch.full((len(rows), most), -1)
        places = torch.zeros(len(rows), most, VISUAL_TOKENS)
        for i, row in enumerate(rows):
            for position, kind in row.answers:
                labels[i, position], kinds[i, position] = row.ids[position], LEARNT.index(kind)
            for k, (position, seen) in enumerate(row.pointers):
                pointing[i, k], places[i, k, seen] = position, 1
        return {
            "input_ids": torch.tensor([row.ids + [self.pad] * (width - len(row.ids)) for row in rows]),
            "labels": labels,
            "kinds": kinds,
            "pointing": pointing,
            "places": places,
            "pixel_values": pixels([scene.draw() for scene in scenes]),
            "image_sizes": torch.tensor([[SIZE, SIZE]] * len(scenes)),
        }


@dataclass
class Sequence:
    """``answers``: positions of the answers' tokens and their question's kind. ``pointers``: positions that predict such a
    token, and the visual tokens that show it."""

    ids: list[int]
    answers: list[tuple[int, str]] = field(default_factory=list)
    pointers: list[tuple[int, list[int]]] = field(default_factory=list)


def pointed_at(scene: Scene, question: Question) -> list[list[int]]:
    """For each token of an answer, the visual tokens (from 0) that show it: a character, or what the question is about."""
    if question.kind in ("text", "form", "chart"):
        item = next((i for i in scene.items if i.text and i.text == question.answers[0] and i.name in question.text), None)
        return [_visual_tokens(box, thumbnail=False) for box in item.glyphs] if item else []
    plurals = {i: "crosses" if i.kind == "cross" else f"{i.kind}s" for i in scene.items}
    about = [i for i in scene.items if i.phrase in question.text or plurals[i] in question.text]
    about = about or [i for i in scene.items if f"colour is the {i.kind}" in question.text]
    seen = sorted({place for item in about for place in _visual_tokens(item.box)})
    return [seen] if seen else []


def _visual_tokens(box: synthvqa.Box, thumbnail: bool = True) -> list[int]:
    """Visual tokens, in the order of the prompt, whose centre lies in ``box``."""
    width = SIZE // build.PATCH + 1
    seen = []
    for tile, scale, origin in _views():
        rows, columns = _patches(box, scale, origin)
        for row in range(rows.start, rows.stop):
            for column in range(columns.start, columns.stop):
                if tile:
                    down, right = origin[1] // build.PATCH + row, origin[0] // build.PATCH + column
                    seen.append(GRID * GRID + down * width + right)
                elif thumbnail:
                    seen.append(row * GRID + column)
    return seen


class Pointers:
    """Measures how much two heads of some layers look at the visual tokens that show an answer."""

    HEADS = 2

    def __init__(self, layers: list[Any]):
        self.losses: list[Tensor] = []
        self.pointing: Tensor | None = None
        self.places: Tensor | None = None
        for layer in layers:
            layer.self_attn.register_forward_pre_hook(self._measure, with_kwargs=True)

    def _measure(self, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.pointing is None or self.places is None:
            return
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        width = self.HEADS * attention.head_dim
        rows = self.pointing.clamp(min=0)
        asking = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[2]))
        query = F.linear(asking, attention.q_proj.weight[:width]).unflatten(-1, (self.HEADS, -1)).float()
        key = F.linear(hidden, attention.k_proj.weight[:width]).unflatten(-1, (self.HEADS, -1)).float()
        query = _rotated(query, cos[0][rows][:, :, None], sin[0][rows][:, :, None])
        key = _rotated(key, cos[:, :, None], sin[:, :, None])
        scores = torch.einsum("brhd,blhd->bhrl", query, key) * attention.scaling
        future = torch.arange(hidden.shape[1], device=hidden.device) > rows[..., None]
        seen = scores.masked_fill(future[:, None], -torch.inf).softmax(-1)[..., 1 : VISUAL_TOKENS + 1]
        mass = (seen * self.places[:, None]).sum(-1)
        valid = (self.pointing >= 0)[:, None].expand_as(mass)
        self.losses.append(-mass[valid].clamp(min=1e-6).log().mean())

    def loss(self) -> Tensor:
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves rotated as Llama does it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def answer_loss(model: Any, pointers: Pointers, batch: dict[str, Tensor], weight: float) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers' tokens, and ``weight`` times that of where to look.

    Right padding needs no mask under causal attention: nothing looks at it.
    """
    labels, kinds = batch.pop("labels")[:, 1:], batch.pop("kinds")[:, 1:]
    pointers.pointing, pointers.places = batch.pop("pointing"), batch.pop("places")
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    there = labels != IGNORE
    logits = model.lm_head(hidden[there]).float()
    right = logits.argmax(-1) == labels[there]
    stats = {kind: right[kinds[there] == k].float().mean().item() for k, kind in enumerate(LEARNT)}
    looking = pointers.loss()
    stats["looking"] = looking.item()
    return F.cross_entropy(logits, labels[there]) + weight * looking, stats


# ------------------------------------------------------------------ the loop


def rate_at(step: int, stage: Stage, warm: int = 100) -> float:
    """Share of the peak rate: linear rise, cosine fall to 2 %."""
    if step < warm:
        return (step + 1) / warm
    steps = stage.steps
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trainer:
    def __init__(self, out: Path, stages: Iterable[Stage], seed: int = 0, log_every: int = 25, save_every: int = 250):
        self.out, self.stages, self.seed, self.log_every, self.save_every = out, list(stages), seed, log_every, save_every
        out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = build.model(seed)
        self.model.to(self.device)
        self.heads = EncoderHeads(self.model.config.vision_config.hidden_size).to(self.device)
        self.dialogues = Dialogues()
        self.pointers = Pointers(self.model.model.language_model.layers[2:4])
        self.seconds = 0.0

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    def optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        encoder = [*self.tower.parameters()]
        known = {id(p) for p in encoder}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        groups = [{"params": encoder, "peak": stage.encoder_rate}]
        groups.append({"params": [*self.heads.parameters()] if stage.name == "encoder" else rest, "peak": stage.rate})
        return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02)

    def loss(self, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        first = [s.name for s in STAGES].index(stage.name) * 10_000_000 + step * stage.images
        scenes = [synthvqa.scene("train", first + k) for k in range(stage.images)]
        if stage.name == "encoder":
            return self.heads(self.tower, scenes)
        batch = self.dialogues.batch(scenes, random.Random(f"{self.seed}/{stage.name}/{step}"), stage)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        return answer_loss(self.model, self.pointers, batch, stage.pointing)

    def run(self) -> None:
        for number, stage in enumerate(self.stages):
            if (self.out / f"{stage.name}.done").exists():
                self.restore(stage, None)
                continue
            self.run_stage(stage)
            self.save(stage, None, stage.steps)
            (self.out / f"{stage.name}.done").touch()
            print(
                f"stage {number + 1}/{len(self.stages)} ({stage.name}) done after {self.seconds / 60:.1f} minutes", flush=True
            )

    def run_stage(self, stage: Stage) -> None:
        optimizer = self.optimizer(stage)
        first = self.restore(stage, optimizer)
        for step in range(first, stage.steps):
            self.tower.requires_grad_(stage.encoder_rate > 0 and step >= stage.unfreeze)
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, stage)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss, stats = self.loss(stage, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            self.seconds += time.perf_counter() - start
            if step % self.log_every == 0 or step == stage.steps - 1:
                self.log(stage, step, loss.item(), stats)
            if (step + 1) % self.save_every == 0:
                self.save(stage, optimizer, step + 1)

    def log(self, stage: Stage, step: int, loss: float, stats: dict[str, float]) -> None:
        row = {"stage": stage.name, "step": step, "minutes": round(self.seconds / 60, 2), "loss": round(loss, 4)}
        with (self.out / "curve.csv").open("a", newline="") as file:
            csv.writer(file).writerow([*row.values(), json.dumps({k: round(v, 4) for k, v in stats.items()})])
        print(
            " ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in {**row, **stats}.items()), flush=True
        )

    def save(self, stage: Stage, optimizer: torch.optim.Optimizer | None, step: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "step": step,
            "seconds": self.seconds,
        }
        partial = self.out / f"{stage.name}.pt.part"
        torch.save(state, partial)
        partial.replace(self.out / f"{stage.name}.pt")

    def restore(self, stage: Stage, optimizer: torch.optim.Optimizer | None) -> int:
        path = self.out / f"{stage.name}.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        if optimizer and state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        self.seconds = state["seconds"]
        return state["step"]


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and of the curve; a run that was cut off goes on there.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the questions.")] = 0,
    export_to: Annotated[Path | None, typer.Option("--export", help="Where to write the trained model.")] = None,
) -> None:
    """Train TinyVLM on SynthVQA."""
    trainer = Trainer(out, STAGES, seed)
    trainer.run()
    folder = export_to or out / "model"
    export(trainer.model.cpu(), folder)
    print(f"TinyVLM is in {folder}, after {trainer.seconds / 60:.0f} minutes of training")


if __name__ == "__main__":
    typer.run(main)
