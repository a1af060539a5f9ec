"""Trains TinyVLM, or a sibling of it, on SynthVQA, in two stages; resumes from its last checkpoint.

1. ``encoder``: every cell of what the encoder sees predicts what lies under it (whose it is, which character, the
   how-manieth), and one vector a view ([CLS], where there is one) predicts the words and characters of its caption, so that
   its attention goes to what a caption mentions.
2. ``vlm``: projector and LLM learn, on the frozen encoder first, then along with it. All questions of an image stand
   in one sequence, some images are described too; the loss is on the answers, and on where two heads of the middle layers
   look while they give them. Without the latter the model needs many times the steps to find out that the words of a
   question name a place in the image.

Usage: ``python -m vlprune.evals.tinyvlm.train --out runs/tinyvlm``, with ``--model qwen`` for the sibling
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from vlprune.evals import synthvqa
from vlprune.evals.synthvqa import Question, Scene
from vlprune.evals.tinyvlm.architecture import Architecture
from vlprune.evals.tinyvlm.build import LLAVA_NEXT
from vlprune.evals.tinyvlm.export import export
from vlprune.evals.tinyvlm.qwen import QWEN25_VL
from vlprune.evals.tinyvlm.targets import (
    COUNTS,
    GLYPHS,
    IGNORE,
    OWNERS,
    PLACES,
    caption_targets,
    cell_targets,
    count_targets,
    densest_tile,
    mentions,
    pointed_at,
)

LEARNT = [*synthvqa.KINDS, "caption"]


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    images: int
    rate: float
    encoder_rate: float = 0.0
    unfreeze: int = 0
    """Step from which the encoder learns along."""
    crops: bool = False
    """Whether only a tile of an image is seen: in turns the one with most characters and the one with most items."""
    captions: float = 0.0
    """Share of the images that are described too."""
    zeros: float = 1.0
    """Share of the counting questions kept whose answer is 0, the most frequent one by far."""
    pointing: float = 0.0
    """Weight of the loss on where two heads of the middle layers look while they answer."""
    mentions: bool = False
    """Whether the two heads look at a thing where a question names it, too, for questions that compare two things."""
    comparisons: int = 0
    """Comparisons of places asked of an image beside its own questions, as many as it has."""
    longest: int = 144
    """Tokens of text in a sequence, at most."""
    positions: float = 0.0
    """Weight of the loss on rows and columns, told from what visual tokens have become before the middle layers."""

    @property
    def answers(self) -> bool:
        """Whether the whole model learns to answer, or its encoder to see."""
        return self.name not in ("encoder", "crops")


STAGE_NAMES = ("encoder", "vlm", "crops", "compare")
SIBLINGS: dict[str, tuple[Architecture, tuple[Stage, ...]]] = {
    "llava": (
        LLAVA_NEXT,
        (
            Stage("encoder", 2000, 24, rate=1e-3, encoder_rate=1e-3),
            Stage("vlm", 1300, 32, rate=1e-3, encoder_rate=2e-4, unfreeze=500, captions=0.2, zeros=0.5, pointing=0.5),
        ),
    ),
    "qwen": (
        QWEN25_VL,
        (
            Stage("crops", 550, 48, rate=1.5e-3, encoder_rate=1.5e-3, crops=True),
            Stage("encoder", 250, 16, rate=7e-4, encoder_rate=7e-4),
            Stage("vlm", 950, 32, rate=1e-3, encoder_rate=4e-4, unfreeze=500, captions=0.2, zeros=0.5, pointing=0.5),
            Stage(
                "compare",
                550,
                32,
                rate=7e-4,
                encoder_rate=2e-4,
                captions=0.2,
                zeros=0.5,
                pointing=0.5,
                mentions=True,
                comparisons=6,
                longest=200,
                positions=0.2,
            ),
        ),
    ),
}


# ------------------------------------------------------------------ stage 1: the encoder


class Heads(nn.Module):
    """Linear read-outs that exist during training only: of the encoder, and the last of the LLM."""

    def __init__(self, architecture: Architecture, width: int, text_width: int):
        super().__init__()
        self.architecture = architecture
        self.patch = nn.Linear(width, len(OWNERS) + len(GLYPHS) + PLACES)
        self.caption = nn.Linear(width, len(OWNERS) + len(GLYPHS))
        self.count = nn.Linear(width, len(synthvqa.SHAPES) * COUNTS)
        self.position = nn.Linear(text_width, 2)

    def forward(self, model: nn.Module, scenes: list[Scene], crops: bool = False) -> tuple[Tensor, dict[str, float]]:
        device = self.patch.weight.device
        images, views = [scene.draw() for scene in scenes], [self.architecture.views] * len(scenes)
        if crops:
            views = [(densest_tile(scene, characters=number % 2 == 0),) for number, scene in enumerate(scenes)]
            images = [image.crop(view.box) for image, (view,) in zip(images, views, strict=True)]
        cells, pooled = self.architecture.features(model, images)
        targets = np.stack([cell_targets(scene, seen) for scene, seen in zip(scenes, views, strict=True)])
        targets = torch.from_numpy(targets).flatten(0, 1).to(device)
        logits = self.patch(cells).float().split([len(OWNERS), len(GLYPHS), PLACES], dim=-1)
        loss = torch.zeros((), device=device)
        stats = {}
        for name, index, part in zip(("owner", "glyph", "place"), range(3), logits, strict=True):
            target = targets[..., index].flatten()
            weight = torch.ones(part.shape[-1], device=device)
            weight[0] = 0.2
            loss = loss + F.cross_entropy(part.flatten(0, 1), target, weight, ignore_index=IGNORE)
            there = target > 0
            stats[name] = (part.flatten(0, 1).argmax(-1)[there] == target[there]).float().mean().item()
        captions = np.stack([caption_targets(scene, seen) for scene, seen in zip(scenes, views, strict=True)])
        captions = torch.from_numpy(captions).flatten(0, 1).to(device)
        loss = loss + 10 * F.binary_cross_entropy_with_logits(self.caption(pooled).float(), captions)
        whole = cells.unflatten(0, (len(scenes), -1))[:, 0].mean(1)
        counts = [count_targets(scene, seen[0]) for scene, seen in zip(scenes, views, strict=True)]
        counts = torch.tensor(counts, device=device)
        predicted = self.count(whole).float().unflatten(-1, (len(synthvqa.SHAPES), COUNTS))
        loss = loss + F.cross_entropy(predicted.flatten(0, 1), counts.flatten())
        stats["count"] = (predicted.argmax(-1) == counts).float().mean().item()
        return loss, stats


# ------------------------------------------------------------------ stage 2: the whole model


class Dialogues:
    """Turns scenes into sequences: the image, then questions and answers in random order, labels on the answers."""

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.tokenizer = architecture.tokenizer()
        self.end, self.pad = self.encode(architecture.end), self.encode(architecture.pad)
        self.newline = self.encode("\n")
        before, image, after = map(self.encode, (architecture.before, architecture.image, architecture.after))
        self.opening = before + image * architecture.visual_tokens + after
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def sequence(self, scene: Scene, rng: random.Random, stage: Stage) -> Sequence:
        questions = [q for q in scene.questions if q.answers[0] != "0" or rng.random() < stage.zeros]
        more = [q for q in synthvqa.comparisons(scene) if q not in questions] if stage.comparisons else []
        questions += rng.sample(more, min(stage.comparisons, len(more)))
        rng.shuffle(questions)
        if rng.random() < stage.captions:
            questions.insert(rng.randint(0, 2), Question("caption", "Describe the image.", (scene.caption(),)))
        out = Sequence([*self.opening])
        for question in questions:
            if question.text not in self.known:
                self.known[question.text] = self.encode(f"{question.text}\n")
            prompt, told = self.known[question.text], [*self.encode(question.answers[0]), *self.end]
            if len(out.ids) + len(prompt) + len(told) > self.architecture.visual_tokens + stage.longest:
                continue
            first = len(out.ids) + len(prompt)
            out.ids += [*prompt, *told, *self.newline]
            out.answers += [(first + k, question.kind if k < len(told) - len(self.end) else "") for k in range(len(told))]
            pointed = pointed_at(scene, question, self.architecture)
            out.pointers += [(first + k - 1, places) for k, places in enumerate(pointed)]
            for read, places in mentions(scene, question, self.architecture) if stage.mentions else ():
                out.pointers.append((first - len(prompt) + len(self.encode(question.text[:read])) - 1, places))
        return out

    def batch(self, scenes: list[Scene], rng: random.Random, stage: Stage) -> dict[str, Tensor]:
        """``pointing (B, R)``: positions that predict an answer's token, -1 as filler; ``places (B, R,
        visual tokens)``: 1 where the answer can be seen."""
        rows = [self.sequence(scene, rng, stage) for scene in scenes]
        width, most = max(len(row.ids) for row in rows), max(len(row.pointers) for row in rows)
        labels = torch.full((len(rows), width), IGNORE)
        kinds = torch.full((len(rows), width), IGNORE)
        pointing = torch.full((len(rows), most), -1)
        places = torch.zeros(len(rows), most, self.architecture.visual_tokens)
        for i, row in enumerate(rows):
            for position, kind in row.answers:
                labels[i, position] = row.ids[position]
                kinds[i, position] = LEARNT.index(kind) if kind else IGNORE
            for k, (position, seen) in enumerate(row.pointers):
                pointing[i, k], places[i, k, seen] = position, 1
        ids = torch.tensor([row.ids + self.pad * (width - len(row.ids)) for row in rows])
        return {
            "input_ids": ids,
            "labels": labels,
            "kinds": kinds,
            "pointing": pointing,
            "places": places,
            **self.architecture.inputs([scene.draw() for scene in scenes], ids),
        }


@dataclass
class Sequence:
    """``answers``: positions of the answers' tokens and their question's kind, "" for the end of an answer.

    ``pointers``: positions that are to look at something, and the visual tokens that show it.
    """

    ids: list[int]
    answers: list[tuple[int, str]] = field(default_factory=list)
    pointers: list[tuple[int, list[int]]] = field(default_factory=list)


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
        hidden = kwargs["hidden_states"]
        cos, sin = (_positions(table, attention) for table in kwargs["position_embeddings"])
        width = self.HEADS * attention.head_dim
        rows = self.pointing.clamp(min=0)
        asking = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[2]))
        query = _first(attention.q_proj, asking, width).unflatten(-1, (self.HEADS, -1)).float()
        key = _first(attention.k_proj, hidden, width).unflatten(-1, (self.HEADS, -1)).float()
        query = _rotated(query, cos[rows][:, :, None], sin[rows][:, :, None])
        key = _rotated(key, cos[:, None], sin[:, None])
        scores = torch.einsum("brhd,blhd->bhrl", query, key) * attention.scaling
        future = torch.arange(hidden.shape[1], device=hidden.device) > rows[..., None]
        visual = slice(1, self.places.shape[-1] + 1)
        seen = scores.masked_fill(future[:, None], -torch.inf).softmax(-1)[..., visual]
        mass = (seen * self.places[:, None]).sum(-1)
        valid = (self.pointing >= 0)[:, None].expand_as(mass)
        self.losses.append(-mass[valid].clamp(min=1e-6).log().mean())

    def loss(self) -> Tensor:
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()


class Positions:
    """Measures how well rows and columns can be told from the visual tokens that some layers get.

    M-RoPE tells a layer how far apart two tokens are; where a token is, it has to find out, and comparisons need it.
    """

    CHANCE = 1 / 12
    """Mean squared error of the answer "in the middle"."""

    def __init__(self, layers: list[Any], head: nn.Linear, positions: Tensor):
        self.losses: list[Tensor] = []
        self.active = False
        self.head = head
        self.known = ~positions.isnan().any(-1)
        self.positions = positions[self.known]
        for layer in layers:
            layer.self_attn.register_forward_pre_hook(self._measure, with_kwargs=True)

    def _measure(self, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.active:
            visual = kwargs["hidden_states"][:, 1 : len(self.known) + 1][:, self.known]
            error = self.head(visual).float() - self.positions
            self.losses.append(error.square().mean() / self.CHANCE)

    def loss(self) -> Tensor:
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()


def _first(linear: nn.Linear, x: Tensor, width: int) -> Tensor:
    """The first ``width`` outputs of ``linear``."""
    return F.linear(x, linear.weight[:width], None if linear.bias is None else linear.bias[:width])


def _positions(table: Tensor, attention: Any) -> Tensor:
    """Cosines or sines of the first sample, ``(L, head_dim)``: those of all, since all begin with the same image's places."""
    if table.ndim == 4:
        # transformers 4 leaves it to attention to put a table together of M-RoPE's three.
        parts = table.split(attention.rope_scaling["mrope_section"] * 2, dim=-1)
        table = torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)
    return table[0]


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
    def __init__(
        self,
        out: Path,
        stages: Iterable[Stage],
        seed: int = 0,
        log_every: int = 25,
        save_every: int = 250,
        architecture: Architecture = LLAVA_NEXT,
    ):
        self.out, self.stages, self.seed, self.log_every, self.save_every = out, list(stages), seed, log_every, save_every
        self.architecture = architecture
        out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = architecture.model(seed)
        self.model.to(self.device)
        text_width = self.model.config.text_config.hidden_size
        self.heads = Heads(architecture, architecture.width(self.model), text_width).to(self.device)
        self.dialogues = Dialogues(architecture)
        middle = self.model.model.language_model.layers[2:4]
        self.pointers = Pointers(middle)
        self.positions = Positions(middle, self.heads.position, architecture.positions().to(self.device))
        self.seconds = 0.0

    def encoder(self) -> list[nn.Parameter]:
        return [p for module in self.architecture.encoder(self.model) for p in module.parameters()]

    def optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        encoder = self.encoder()
        known = {id(p) for p in encoder}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        # Which of all these get a gradient follows from the stage's losses.
        rest += self.heads.parameters()
        groups = [{"params": encoder, "peak": stage.encoder_rate}, {"params": rest, "peak": stage.rate}]
        return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02)

    def loss(self, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        first = STAGE_NAMES.index(stage.name) * 10_000_000 + step * stage.images
        scenes = [synthvqa.scene("train", first + k) for k in range(stage.images)]
        if not stage.answers:
            return self.heads(self.model, scenes, stage.crops)
        batch = self.dialogues.batch(scenes, random.Random(f"{self.seed}/{stage.name}/{step}"), stage)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        self.positions.active = stage.positions > 0
        loss, stats = answer_loss(self.model, self.pointers, batch, stage.pointing)
        if stage.positions:
            told = self.positions.loss()
            stats["positions"] = told.item()
            loss = loss + stage.positions * told
        return loss, stats

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
            for parameter in self.encoder():
                parameter.requires_grad_(stage.encoder_rate > 0 and step >= stage.unfreeze)
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, stage)
            with torch.autocast(self.device.type, torch.bfloat16), self.architecture.training(self.model):
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
    model: Annotated[str, typer.Option(help="Which sibling: 'llava' or 'qwen'.")] = "llava",
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the questions.")] = 0,
    export_to: Annotated[Path | None, typer.Option("--export", help="Where to write the trained model.")] = None,
) -> None:
    """Train TinyVLM, or a sibling of it, on SynthVQA."""
    if model not in SIBLINGS:
        raise typer.BadParameter(f"{model!r} is none of {', '.join(SIBLINGS)}", param_hint="--model")
    architecture, stages = SIBLINGS[model]
    trainer = Trainer(out, stages, seed, architecture=architecture)
    trainer.run()
    folder = export_to or out / "model"
    export(trainer.model.cpu(), folder, architecture)
    print(f"The model is in {folder}, after {trainer.seconds / 60:.0f} minutes of training")


if __name__ == "__main__":
    typer.run(main)
