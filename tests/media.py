"""What images and videos are to a tiny model of each kind: its tokens in a prompt, and the tensors beside the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, START, END, BREAK, PAD = 90, 91, 92, 93, 94, 0
FRAMES = 3
"""Frames of a video (pairs of frames for Qwen)."""

SIZES = [(28, 56), (56, 56), (50, 28), (30, 84)]
"""Image sizes (height, width) that prompts take in turn: with and without padding, several tile grids."""

GRIDS = [(8, 8), (4, 8), (8, 6), (4, 12)]
"""Patch rows and columns of images and frames that prompts of Qwen and Mistral take in turn."""


@dataclass(frozen=True)
class Item:
    """An image or a video of a prompt: its ``number`` among all of its kind, those in its sample, and its ``size``."""

    number: int
    sample: int
    siblings: int
    size: tuple[int, int]


class Media:
    """A tile an image, as in LLaVA."""

    tokens = 16
    sizes: list[tuple[int, int]] = SIZES
    many = False
    """Whether a sample's images count as one."""

    def image(self, item: Item) -> list[int]:
        """Tokens of an image in the prompt."""
        return [IMAGE] * self.tokens

    def video(self, item: Item, words: Callable[[int], list[int]]) -> list[int]:
        raise NotImplementedError

    def image_inputs(self, items: list[Item], samples: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {"pixel_values": noise(len(items), 3, 28, 28)}

    def video_inputs(self, items: list[Item], noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Further tensors ``(B, L)`` beside the prompt."""
        return {}


class Tiles(Media):
    """A thumbnail and the crops of a picture, as in LLaVA-NeXT; as many tokens as the model itself wants."""

    def __init__(self, unpruned: Callable[[], Any], frame_tokens: int = 0, newline: int = 0):
        self.unpruned, self.frame_tokens, self.newline = unpruned, frame_tokens, newline

    def image(self, item: Item) -> list[int]:
        return [IMAGE] * self.count(item.size, item.siblings)

    @cache  # noqa: B019  (there is one object a family)
    def count(self, size: tuple[int, int], siblings: int = 1) -> int:
        inputs = {"pixel_values": torch.zeros(1, 5, 3, 28, 28), "image_sizes": torch.tensor([size])}
        if self.newline and siblings > 1:
            # One of several: as many as there are, of which the first is counted.
            inputs = {"pixel_values": torch.zeros(2, 5, 3, 28, 28), "image_sizes": torch.tensor([size, size])}
            inputs["batch_num_images"] = torch.tensor([2])
        return int(pieces(features(self.unpruned(), inputs))[0].shape[0])

    def video(self, item: Item, words: Callable[[int], list[int]]) -> list[int]:
        return [VIDEO] * (FRAMES * self.frame_tokens + self.newline)

    def image_inputs(self, items: list[Item], samples: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        inputs = {"pixel_values": noise(len(items), 5, 3, 28, 28), "image_sizes": torch.tensor([i.size for i in items])}
        if self.newline:
            inputs["batch_num_images"] = torch.tensor([sum(i.sample == n for i in items) for n in range(samples)])
        return inputs

    def video_inputs(self, items: list[Item], noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {"pixel_values_videos": noise(len(items), FRAMES, 3, 28, 28)}


class Packed(Media):
    """Rows of patches of images of any size, as in Qwen; 2 x 2 patches are a token."""

    sizes = GRIDS

    def __init__(self, timestamps: bool, types: bool, seconds: bool = False):
        self.timestamps, self.types, self.seconds = timestamps, types, seconds

    def image(self, item: Item) -> list[int]:
        return [START, *[IMAGE] * (item.size[0] * item.size[1] // 4), END]

    def video(self, item: Item, words: Callable[[int], list[int]]) -> list[int]:
        frame = [VIDEO] * (item.size[0] * item.size[1] // 4)
        if not self.timestamps:
            return [START, *frame * FRAMES, END]
        return [token for _ in range(FRAMES) for token in [*words(2), START, *frame, END]]

    def image_inputs(self, items: list[Item], samples: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        grids = torch.tensor([(1, *item.size) for item in items])
        return {"pixel_values": noise(int(grids.prod(1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grids}

    def video_inputs(self, items: list[Item], noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        grids = torch.tensor([(FRAMES, *item.size) for item in items])
        inputs = {"pixel_values_videos": noise(int(grids.prod(1).sum()), 3 * 2 * 4 * 4), "video_grid_thw": grids}
        return {**inputs, "second_per_grid_ts": torch.ones(len(items))} if self.seconds else inputs

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        if not self.types:
            return {}
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


class Merged(Media):
    """A tile an image, its patches merged to fewer tokens, as in InternVL and Gemma 3."""

    tokens = 4

    def __init__(self, types: bool = False):
        self.types = types

    def image(self, item: Item) -> list[int]:
        return [START, *[IMAGE] * self.tokens, END]

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == IMAGE).long()} if self.types else {}


class Lists(Media):
    """A list of tiles for each sample, as in Idefics3; images of two tiles and of one in turn, text between tiles."""

    tokens = 4
    many = True

    def image(self, item: Item) -> list[int]:
        return [START, *[IMAGE] * self.tokens, BREAK] * self.tiles(item) + [END]

    @staticmethod
    def tiles(item: Item) -> int:
        return 2 if item.siblings == 1 or item.number % 2 else 1

    def image_inputs(self, items: list[Item], samples: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        counts = [sum(self.tiles(item) for item in items if item.sample == n) for n in range(samples)]
        pixels = noise(samples, max(counts), 3, 28, 28)
        for sample, count in enumerate(counts):
            pixels[sample, count:] = 0
        return {"pixel_values": pixels}


class Rows(Media):
    """Images of any size in a common frame, a token of text behind each row of their tokens, as in Mistral 3."""

    sizes = GRIDS

    def image(self, item: Item) -> list[int]:
        height, width = item.size[0] // 2, item.size[1] // 2
        return ([*[IMAGE] * width, BREAK] * height)[:-1] + [END]

    def image_inputs(self, items: list[Item], samples: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
        sizes = torch.tensor([item.size for item in items]) * 4
        return {"pixel_values": noise(len(items), 3, 48, 48), "image_sizes": sizes}


# ------------------------------------------------------------------ what a model itself gives

SEAMS = {"get_image_features": "pixel_values", "get_video_features": "pixel_values_videos"}


def features(model: Any, inputs: dict[str, Tensor], seam: str = "get_image_features") -> Any:
    """What a seam of the model gives for ``inputs``."""
    import inspect

    call = getattr(model.model, seam)
    names = list(inspect.signature(call).parameters)
    # The pixels come first; those of a video have another name before transformers 5.
    given: dict[str, Any] = {names[0]: inputs[SEAMS[seam]]}
    for name in names[1:]:
        if name in inputs:
            given[name] = inputs[name]
        elif name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given[name] = getattr(model.config, name)
    return call(**given)


def pieces(out: Any) -> list[Tensor]:
    """Features ``(n, D)`` of each entry of what a seam gives."""
    if hasattr(out, "pooler_output"):
        out = out.pooler_output
    elif isinstance(out, tuple) and isinstance(out[0], (list, tuple)):
        out = out[0]  # beside DeepStack features
    return [piece.flatten(0, -2) for piece in out]
