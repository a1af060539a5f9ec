"""Trains TinyViT on SynthVQA scenes; goes on from its last checkpoint.

The first four of its eight blocks begin as those of TinyVLM's image encoder, which has learned on the same scenes what lies
under a patch; all others begin at random. Besides the label, read from [CLS], patches are told what they show: behind
block 4 whose they are, behind block 6 how large that shape is, behind block 8 whether it is the largest.

Usage: ``python -m vlprune.evals.tinyvit.train --out runs/tinyvit``
"""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from vlprune.evals import synthvqa
from vlprune.evals.tinyvit import pixels, scenes
from vlprune.evals.tinyvit.scenes import LABELS, Picture

PATCH = 8
GRID = scenes.SIZE // PATCH
WIDTH, BLOCKS, LEARNED = 128, 8, 4
OWNERS = ["nothing", *(f"{c} {k}" for c in synthvqa.COLOURS for k in (*synthvqa.SHAPES, "sign"))]
SIDES = (14, 18, 22, 26)
IGNORE = -100
BACKGROUND = 0.765
"""Mean brightness of a scene's background, from -1 to 1."""
FAR = 5_000_000
"""Index of the first picture that progress is measured on, of the train split: none is trained on."""


def config() -> ViTConfig:
    return ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=3 * WIDTH,
        image_size=scenes.SIZE,
        patch_size=PATCH,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )


# ------------------------------------------------------------------ what is told


def patch_targets(picture: Picture) -> np.ndarray:
    """(3, patches): whose a patch is, which of :data:`SIDES` its shape has, whether it is the largest shape's."""
    targets = np.zeros((3, GRID, GRID), np.int64)
    targets[1] = IGNORE
    for item in picture.scene.items:
        columns, rows = (_cells(item.box[axis], item.box[axis + 2]) for axis in (0, 1))
        targets[0, rows, columns] = OWNERS.index(item.phrase)
        if item.kind in synthvqa.SHAPES:
            targets[1, rows, columns] = SIDES.index(item.box[2] - item.box[0])
            targets[2, rows, columns] = item is picture.largest
    return targets.reshape(3, -1)


def _cells(low: int, high: int) -> slice:
    """Patches whose middle lies in ``[low, high)`` pixels of a scene."""
    first, last = (math.ceil((edge - scenes.EDGE - PATCH / 2) / PATCH) for edge in (low, high))
    return slice(max(0, first), max(0, last))


class Heads(nn.Module):
    """Linear read-outs of patches that exist during training only."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = nn.Linear(WIDTH, len(OWNERS))
        self.side = nn.Linear(WIDTH, len(SIDES))
        self.largest = nn.Linear(WIDTH, 2)

    def forward(self, states: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Of the hidden states behind every block and ``targets (B, 3, patches)``."""
        loss, stats = torch.zeros((), device=targets.device), {}
        parts = (("owner", self.owner, 4, 0.2), ("side", self.side, 6, 1.0), ("largest", self.largest, 8, 0.2))
        for index, (name, head, block, first) in enumerate(parts):
            logits = head(F.layer_norm(states[block][:, 1:], (WIDTH,))).float().flatten(0, 1)
            target = targets[:, index].flatten()
            weight = torch.ones(logits.shape[-1], device=target.device)
            weight[0] = first
            loss = loss + F.cross_entropy(logits, target, weight, ignore_index=IGNORE)
            there = target >= 0 if name == "side" else target > 0
            stats[name] = (logits.argmax(-1)[there] == target[there]).float().mean().item()
        return loss, stats


# ------------------------------------------------------------------ the beginning


def model(seed: int = 0) -> Any:
    """TinyViT before its training."""
    from vlprune.evals import tinyvlm

    torch.manual_seed(seed)
    made: Any = ViTForImageClassification(config())
    encoder = tinyvlm.load()[0].model.vision_tower
    state = {name.removeprefix("vision_model."): value for name, value in encoder.state_dict().items()}
    with torch.no_grad():
        _begin(made, state)
    return made


def _begin(made: Any, encoder: dict[str, Tensor]) -> None:
    """Copies patch embedding, positions and the first blocks of a CLIP encoder that saw tiles of 8 x 8 patches.

    CLIP normalises its embeddings, ViT does not: it gets what a patch of bare background has, and training does the rest.
    """
    embeddings, gain = made.vit.embeddings, encoder["pre_layrnorm.weight"]
    places = encoder["embeddings.position_embedding.weight"]
    tile = places[1:].unflatten(0, (8, 8)).repeat(2, 2, 1)[1 : 1 + GRID, 1 : 1 + GRID].flatten(0, 1)
    patch = encoder["embeddings.patch_embedding.weight"]
    scale = gain / (BACKGROUND * patch.sum((1, 2, 3)) + places[1:]).std(-1).mean()
    embeddings.patch_embeddings.projection.weight.copy_(patch * scale[:, None, None, None])
    embeddings.patch_embeddings.projection.bias.zero_()
    embeddings.position_embeddings[0, 1:] = tile * scale + encoder["pre_layrnorm.bias"]
    embeddings.position_embeddings[0, 0] = places[0] * scale + encoder["pre_layrnorm.bias"]
    embeddings.cls_token[0, 0] = encoder["embeddings.class_embedding"] * scale
    blocks = next(part for name, part in made.vit.named_modules() if isinstance(part, nn.ModuleList))
    for index in range(LEARNED):
        source = {
            name.removeprefix(f"encoder.layers.{index}."): value
            for name, value in encoder.items()
            if name.startswith(f"encoder.layers.{index}.")
        }
        known = blocks[index].state_dict()
        blocks[index].load_state_dict({_vit_name(name, known): value for name, value in source.items()})


NAMES = {
    "layer_norm1": ("layernorm_before",),
    "layer_norm2": ("layernorm_after",),
    "self_attn.q_proj": ("attention.q_proj", "attention.attention.query"),
    "self_attn.k_proj": ("attention.k_proj", "attention.attention.key"),
    "self_attn.v_proj": ("attention.v_proj", "attention.attention.value"),
    "self_attn.out_proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}
"""Parts of CLIP's blocks -> what ViT's blocks call them, in transformers 5 and 4."""


def _vit_name(name: str, known: dict[str, Tensor]) -> str:
    stem, _, kind = name.rpartition(".")
    return next(f"{other}.{kind}" for other in NAMES[stem] if f"{other}.{kind}" in known)


# ------------------------------------------------------------------ the loop


class Trainer:
    """``out``: folder of checkpoints and the curve; ``steps`` of ``images`` pictures."""

    def __init__(self, out: Path, steps: int = 1000, images: int = 16, seed: int = 0, save_every: int = 50):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.steps, self.images, self.save_every = out, steps, images, save_every
        self.model, self.heads = model(seed), Heads()
        early = list(self.model.vit.parameters())
        groups = [{"params": early, "peak": 6e-4}, {"params": self._rest(), "peak": 1e-3}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
        self.step, self.seconds = 0, 0.0
        self.restore()

    def _rest(self) -> list[nn.Parameter]:
        return [*self.model.classifier.parameters(), *self.heads.parameters()]

    def run(self) -> None:
        while self.step < self.steps:
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate()
            pictures = [scenes.picture("train", self.step * self.images + k) for k in range(self.images)]
            loss, stats = self.loss(pictures)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
            self.optimizer.step()
            self.seconds += time.perf_counter() - start
            if self.step % 10 == 0 or self.step == self.steps - 1:
                self.log({"loss": loss.item(), **stats})
            self.step += 1
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()

    def rate(self, warm: int = 50) -> float:
        """Share of the peak rate: linear rise, cosine fall to 2 %."""
        if self.step < warm:
            return (self.step + 1) / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (self.step - warm) / max(1, self.steps - warm)))

    def loss(self, pictures: list[Picture]) -> tuple[Tensor, dict[str, float]]:
        labels = torch.tensor([picture.label for picture in pictures])
        targets = torch.from_numpy(np.stack([patch_targets(picture) for picture in pictures]))
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model(pixel_values=pixels([picture.draw() for picture in pictures]), output_hidden_states=True)
            told, stats = self.heads(out.hidden_states, targets)
        logits = out.logits.float()
        stats["label"] = (logits.argmax(-1) == labels).float().mean().item()
        return F.cross_entropy(logits, labels) + told, stats

    def log(self, stats: dict[str, float]) -> None:
        rounded = {name: round(value, 4) for name, value in stats.items()}
        row = {"step": self.step, "minutes": round(self.seconds / 60, 2), **rounded}
        path = self.out / "curve.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.out / "last.pt.part"
        torch.save(state, partial)
        partial.replace(self.out / "last.pt")

    def restore(self) -> None:
        path = self.out / "last.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    @torch.inference_mode()
    def accuracy(self, count: int = 300) -> float:
        """Of pictures of the train split that are not trained on."""
        self.model.eval()
        right = 0
        for first in range(0, count, self.images):
            shown = [scenes.picture("train", FAR + index) for index in range(first, min(count, first + self.images))]
            logits = self.model(pixel_values=pixels([picture.draw() for picture in shown])).logits
            right += sum(int(guess) == picture.label for guess, picture in zip(logits.argmax(-1), shown, strict=True))
        self.model.train()
        return right / count


def export(made: Any, folder: Path) -> None:
    """Config, image processor's settings and float16 weights, with the names that transformers 4.57 and 5.x read."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": scenes.SIZE, "width": scenes.SIZE})
    made.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    # Where torchvision is missing transformers 5 writes the name of a class that 4.57 does not know.
    path = folder / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), "image_processor_type": "ViTImageProcessor"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and of the curve; a run that was cut off goes on there.")],
    steps: Annotated[int, typer.Option(help="Steps of 16 pictures.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    export_to: Annotated[Path | None, typer.Option("--export", help="Where to write the trained model.")] = None,
) -> None:
    """Train TinyViT on SynthVQA scenes."""
    trainer = Trainer(out, steps, seed=seed)
    trainer.model.train()
    trainer.run()
    accuracy = trainer.accuracy()
    folder = export_to or out / "model"
    export(trainer.model, folder)
    print(f"The model is in {folder}, after {trainer.seconds / 60:.0f} minutes of training: {accuracy:.1%} right")


if __name__ == "__main__":
    typer.run(main)
