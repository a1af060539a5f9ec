"""Which image is whose: the encoder's choices at the placeholders of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.engine.choosing import Chosen
from vlprune.engine.devices import to_device
from vlprune.engine.sequence import Image
from vlprune.errors import VLPruneError


def placed(chosen: dict[int, list[Chosen]], visual: Tensor) -> list[list[Image]]:
    """The images of each sequence, with the places of their placeholders. Beams of a prompt share its images.

    ``visual (B, L)``: 0 for text, else the kind of placeholder that ``chosen`` is ordered by.
    """
    batch = visual.shape[0]
    images: list[list[Image]] = [[] for _ in range(batch)]
    for kind, listed in chosen.items():
        mine = visual == kind
        places = mine.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        for sample, own in enumerate(assign(listed, mine)):
            start = 0
            for choice in own:
                total = choice.layout.total
                run = places[sample, start : start + total]
                alive = (
                    torch.arange(total, device=visual.device) if choice.keep is None else to_device(choice.keep, visual.device)
                )
                images[sample].append(Image(choice, sample, run, alive, notes=dict(choice.notes)))
                start += total
    return images


def distinct(images: list[list[Image]]) -> list[Image]:
    """Each image once, in the order of the prompts, also where beams share it."""
    seen: dict[int, Image] = {}
    for sample in images:
        for image in sample:
            seen.setdefault(id(image.chosen), image)
    return list(seen.values())


def assign(chosen: list[Chosen], visual: Tensor) -> list[list[Chosen]]:
    """The images of each sequence: as many as fill its placeholders. Beams of a prompt share its images.

    ``visual (B, L)`` bool. Raises :class:`VLPruneError` where images and placeholders disagree.
    """
    total = sum(choice.layout.total for choice in chosen)
    batch = visual.shape[0]
    if batch == 1:
        # Everything belongs to the one sequence; asking the device for its count would wait for it. The model itself compares
        # features with placeholders.
        return [chosen]
    counts = visual.sum(1).tolist()
    copies, rest = divmod(sum(counts), total) if total else (0, 1)
    problem = VLPruneError(
        f"the prompt holds {sum(counts)} placeholders of visual tokens where the images give {total}: pass each prompt "
        "whole and with its own images (a prefill in chunks cannot be pruned)"
    )
    if rest or copies == 0 or batch % copies:
        raise problem
    remaining = iter(chosen)
    order: list[list[Chosen]] = []
    for sample in range(0, batch, copies):
        images: list[Chosen] = []
        while sum(choice.layout.total for choice in images) < counts[sample]:
            image = next(remaining, None)
            if image is None:
                raise problem
            images.append(image)
        if sum(choice.layout.total for choice in images) != counts[sample]:
            raise problem
        order.extend([images] * copies)
    return order
