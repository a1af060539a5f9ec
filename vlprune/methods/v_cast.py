"""V-CAST: frames at which a video turns get more of the budget, and tokens that stand out of their frame stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune import options
from vlprune.image import ImageTokens
from vlprune.method import Method, Selection, register
from vlprune.methods.frames import best_of_frames, frames_of, mean_of


@register("v-cast")
@dataclass(kw_only=True)
class VCAST(Method):
    """V-CAST: the budget follows the curvature of the path that frames take, and tokens are kept by novelty and length.

    A frame is represented by the mean of its projected tokens, which are of unit length, brought to unit length itself. Its
    curvature is 1 - cosine of the step that led to it and the step that leads on, 1 for the first and the last frame; its
    part of the budget is ``softmax(curvature / temperature)``, by largest remainders, at least one token and no more than it
    has. It keeps the tokens with the highest sum of 1 - cosine to its representation, and of their length, brought to
    between 0 and 1 over the frame. An image counts as a video of its tiles.

    ``temperature``: the higher, the more evenly frames share.

    Deviations from the official code: curvature and scores are rounded to 1e-5, of equal ones the earlier frame or token
    wins; every sample of a batch has its own choice; tokens behind the frames are dropped unless the budget exceeds the
    patches.
    """

    paper: ClassVar[str] = "V-CAST, 2026, arXiv:2603.27650"

    budget: int | float = 0.25
    temperature: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        options.above_zero("temperature", self.temperature)

    def select(self, image: ImageTokens) -> Selection:
        features = image.features.float().nan_to_num()
        rows, there = frames_of(image, normalize(features, dim=-1))
        frame = normalize(mean_of(rows, there), dim=-1)
        length, _ = frames_of(image, features.norm(dim=-1, keepdim=True))
        novelty = 1 - (rows * frame[:, None]).sum(-1)
        scores = (novelty + _stretched(length[..., 0], there)).mul(1e5).round()
        weight = (_curvature(frame) / self.temperature).softmax(0).masked_fill(~there.any(1), 0)
        return Selection(best_of_frames(scores, weight / weight.sum(), image))


def _curvature(frame: Tensor) -> Tensor:
    """``(frames,)`` of the path ``frame (frames, D)``; a step of no length is at right angles to all others."""
    step = normalize(frame.diff(dim=0), dim=-1, eps=1e-6)
    turn = 1 - (step[1:] * step[:-1]).sum(-1)
    ends = torch.ones_like(frame[:1, 0])
    return torch.cat([ends, turn.mul(1e5).round() / 1e5, ends])[: frame.shape[0]]


def _stretched(values: Tensor, there: Tensor) -> Tensor:
    """``values (frames, patches)`` brought to between 0 and 1 over each frame; 0 where all are equal."""
    low = values.masked_fill(~there, torch.inf).amin(1, keepdim=True)
    span = values.masked_fill(~there, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(span > 0, (values - low) / span.clamp(min=1e-30), 0.0)
