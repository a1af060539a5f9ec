"""Pictures to calibrate with: a folder of files, or those that TinyViT was made for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.errors import VLPruneError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Folder:
    """Batches of the pictures below ``path``, in the order of their names, or of a seeded draw: the same each time.

    ``processor``: turns PIL images into pixels. Pictures have labels if each lies in a folder that bears the name of one of
    the model's classes, ``labels`` (name -> number).
    """

    path: Path
    processor: Any
    labels: dict[str, int]
    batch_size: int = 16
    seed: int = 0

    def files(self) -> list[Path]:
        found = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in ENDINGS)
        if not found:
            raise VLPruneError(f"{self.path} holds no pictures; allowed are {', '.join(ENDINGS)}")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed))
        return [found[place] for place in order]

    @property
    def labelled(self) -> bool:
        return all(file.parent.name in self.labels for file in self.files())

    def __iter__(self) -> Iterator[Any]:
        files, labelled = self.files(), self.labelled
        for first in range(0, len(files), self.batch_size):
            some = files[first : first + self.batch_size]
            pixels = self.pixels(some)
            yield (pixels, torch.tensor([self.labels[file.parent.name] for file in some])) if labelled else pixels

    def pixels(self, files: list[Path]) -> Tensor:
        from PIL import Image

        opened = []
        for file in files:
            with Image.open(file) as image:
                opened.append(image.convert("RGB"))
        return self.processor(images=opened, return_tensors="pt")["pixel_values"]


@dataclass(frozen=True)
class SynthVQA:
    """Batches of pictures that TinyViT names the largest shape of, with labels, of the train split."""

    count: int = 1024
    batch_size: int = 16
    first: int = 7_000_000
    """Number of the first picture; TinyViT was not trained on those from here on."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from vlprune.evals.tinyvit import pixels, scenes

        for first in range(self.first, self.first + self.count, self.batch_size):
            shown = [scenes.picture("train", number) for number in range(first, first + self.batch_size)]
            yield pixels([one.draw() for one in shown]), torch.tensor([one.label for one in shown])
