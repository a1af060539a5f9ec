"""VidCom²: frames that stand out get more of the budget, and tokens that stand out stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune.image import ImageTokens, top
from vlprune.method import Method, Selection, register
from vlprune.methods.frames import best_of_frames, frames_of, mean_of
from vlprune.methods.grids import left_by_encoder

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01


@register("vidcom2")
@dataclass(kw_only=True)
class VidCom2(Method):
    """Video Compression Commander: frames and tokens that are unlike the rest of the video.

    Projected features are reduced to the half of their channels that varies least over the video, and brought to unit
    length. A token's similarity to the mean ``c`` of the video, or of its frame, is ``sum over a in (1/8, 1/4, 1/2, 1, 2) of
    exp(-|x - c|^2 / (2 a))``. With ``u`` the negative mean similarity of a frame's tokens to the video, a frame of ``n`` of
    the video's ``N`` tokens has ``min(T / N (1 + softmax(u / 0.01) - 1 / frames), 1) n`` of ``T``, brought to the sum ``T``.
    It keeps the tokens with the lowest sum of both similarities. An image counts as a video of its tiles.

    Deviations from the official code: shares are rounded by largest remainders, so that the budget is met exactly (there: each
    by itself); similarities are rounded to 1e-5, of equal ones the earlier token wins; every sample of a batch has its own
    choice; kept tokens keep their positions, and tokens behind the frames are dropped unless the budget exceeds the patches.
    """

    paper: ClassVar[str] = "Liu et al., Video Compression Commander, EMNLP 2025, arXiv:2505.14454"

    budget: int | float = 0.25

    def select(self, image: ImageTokens) -> Selection:
        features = image.features.float().nan_to_num()
        patches = features[left_by_encoder(image)]
        varies = patches.var(0, correction=0)
        # Rounded, as all that is compared here, so that what differs by rounding errors only is equal.
        varies = (varies / varies.amax().clamp(min=1e-30)).mul(1e5).round()
        steady = top(-varies, max(patches.shape[1] // 2, 1)).sort().values
        rows, there = frames_of(image, normalize(features[:, steady], dim=-1))
        size = there.sum(1)
        video = rows.sum((0, 1)) / size.sum()
        to_video, to_frame = _likeness(rows, video), _likeness(rows, mean_of(rows, there)[:, None])
        stands_out = -mean_of(to_video * there, there).masked_fill(size == 0, torch.inf)
        more = (stands_out.mul(1e5).round() / 1e5 / TEMPERATURE).softmax(0)
        count = min(image.count, sum(image.layout.available))
        rate = (count / sum(image.layout.available) * (1 + more - 1 / more.shape[0])).clamp(max=1) * size
        return Selection(best_of_frames(-(to_video + to_frame).mul(1e5).round(), rate / rate.sum(), image))


def _likeness(rows: Tensor, centre: Tensor) -> Tensor:
    distance = (rows - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0)
