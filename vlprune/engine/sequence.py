"""The tokens of a prompt while it passes through the decoder layers: which are alive, and where their rows are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.engine.choosing import Chosen
from vlprune.engine.rows import FILLER, right_align
from vlprune.engine.steps import Step


@dataclass(eq=False)
class Image:
    """One image or video in one sequence.

    ``places (total,)``: logical positions of its placeholders in this pass. ``alive (N,)``: ascending indices of those
    placeholders whose tokens are still there. ``steps``: what the LLM's stages did to it. ``notes``: those of ``chosen``,
    which other sequences may share, and what the LLM's stages add.
    """

    chosen: Chosen
    sample: int
    places: Tensor
    alive: Tensor
    steps: list[Step] = field(default_factory=list)
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.alive.shape[0]


class Sequence:
    """The tokens of one pass that are alive, of all samples of the batch.

    ``rows (B, n)``: logical position of each physical row, None while nothing has left. ``lengths``: rows of each sample that
    are no filler, known from ``enter`` on. ``version`` counts how often rows have left.
    """

    def __init__(self, images: list[list[Image]], visual: Tensor):
        self.images = images
        self.visual = visual > 0
        self.padding: Tensor | None = None
        self.alive = torch.ones_like(self.visual)
        self.rows: Tensor | None = None
        self.version = 0
        self.lengths: list[int] = []
        self._slots: list[Tensor | None] = []

    def enter(self, padding: Tensor | None) -> None:
        """The first layer is about to run: ``padding (B, L)``, and what was dropped before the LLM, leaves."""
        self.padding = padding
        if padding is not None:
            self.alive = ~padding.to(self.visual.device)
        self.lengths = self._entering()
        whole = padding is None and min(self.lengths) == self.alive.shape[1]
        if not whole:
            self.rows = right_align(self.alive, max(self.lengths))
        self._slots.append(None if whole else self._numbered())

    @property
    def size(self) -> int:
        """Physical rows of a sample, filler included."""
        return self.alive.shape[1] if self.rows is None else self.rows.shape[1]

    @property
    def filler(self) -> bool:
        return min(self.lengths) < max(self.lengths)

    def all_images(self) -> list[Image]:
        return [image for sample in self.images for image in sample]

    def slots(self, sample: int, logical: Tensor, version: int | None = None) -> Tensor:
        """Physical rows of a sample's tokens at ``logical`` positions, now or when ``version`` was the latest one."""
        slots = self._slots[self.version if version is None else version]
        return logical if slots is None else slots[sample, logical]

    def text_counts(self) -> list[int]:
        """Tokens of text in each sample."""
        return [n - sum(i.count for i in images) for n, images in zip(self.lengths, self.images, strict=True)]

    def text_rows(self, drafts: int, after: bool = False, version: int | None = None) -> Tensor:
        """Physical rows ``(B, R)`` of text, right-aligned, without the last ``drafts`` of them; FILLER for shorter samples.

        ``after``: FILLER, too, for what stands before the last visual token of a sample. ``version``: rows as they were when
        that was the latest one.
        """
        counts = self.text_counts()
        text = ~self.visual if self.padding is None else ~self.visual & ~self.padding.to(self.visual.device)
        logical = right_align(text, max(counts))
        logical = logical[:, : logical.shape[1] - drafts]
        if after:
            places = torch.arange(self.visual.shape[1], device=logical.device)
            last = torch.where(self.visual, places, -1).amax(1, keepdim=True)
            logical = torch.where(logical < last, FILLER, logical)
        slots = self._slots[self.version if version is None else version]
        if slots is None:
            return logical
        return torch.where(logical < 0, FILLER, slots.gather(1, logical.clamp(min=0)))

    def all_rows(self) -> Tensor:
        """Physical rows ``(B, n)``, FILLER where they stand for no token."""
        index = torch.arange(self.size, device=self.alive.device).expand(self.alive.shape[0], -1)
        return index if self.rows is None else torch.where(self.rows < 0, FILLER, index)

    def first_rows(self) -> Tensor | None:
        """Physical row ``(B,)`` of each sample's first token, None where it is row 0 in all of them."""
        return None if self.rows is None else (self.rows < 0).sum(1)

    def drop(self, kept: list[tuple[Image, Tensor]]) -> Tensor:
        """Each image is left with ``kept``, indices into its ``alive``. Returns which of the present rows stay, ``(B, m)``."""
        before = self._slots[self.version]
        for image, keep in kept:
            self.lengths[image.sample] -= image.count - keep.shape[0]
            image.alive = image.alive[keep]
        self._mark([image for image, _ in kept])
        self.rows = right_align(self.alive, max(self.lengths))
        self.version += 1
        self._slots.append(self._numbered())
        if before is None:
            return self.rows
        return torch.where(self.rows < 0, FILLER, before.gather(1, self.rows.clamp(min=0)))

    def _entering(self) -> list[int]:
        dropped = [image for image in self.all_images() if image.count < image.chosen.layout.total]
        if dropped:
            self._mark(dropped)
        if self.padding is not None:
            return self.alive.sum(1).tolist()
        lengths = [self.alive.shape[1]] * self.alive.shape[0]
        for image in dropped:
            lengths[image.sample] -= image.chosen.layout.total - image.count
        return lengths

    def _mark(self, images: list[Image]) -> None:
        """Brings ``alive`` up to date with ``images``."""
        length = self.alive.shape[1]
        flat = self.alive.view(-1)
        flat.index_fill_(0, torch.cat([image.places + image.sample * length for image in images]), False)
        flat.index_fill_(0, torch.cat([image.places[image.alive] + image.sample * length for image in images]), True)

    def _numbered(self) -> Tensor:
        """Physical row ``(B, L)`` of each token that is alive."""
        count = self.alive.cumsum(1)
        return count - 1 + (self.size - count[:, -1:])
