"""QueCC: a projector that pools patches by what the question asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters.checkpoints import projector_tensors
from vlprune.errors import OptionError

WANTED = (
    "0.clip_attn.in_proj_weight",
    "0.q_downsample.weight",
    "0.k_proj.0.weight",
    "0.text_projection.0.weight",
    "1.weight",
    "3.weight",
)


class QueryPooling(nn.Module):
    """Windows of ``side`` x ``side`` patches become one row each; a window's query is its patches with the question added."""

    def __init__(self, width: int, levels: int, text: int, side: int, heads: int):
        super().__init__()
        self.side = side
        self.text_projection = nn.Sequential(nn.Linear(text, width), nn.LayerNorm(width, eps=1e-6))
        self.q_proj, self.k_proj, self.v_proj = (_two_layers(n, width) for n in (width, levels * width, levels * width))
        self.q_downsample = nn.Conv2d(width, width, side, stride=side, groups=width)
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, levels: Tensor, question: Tensor) -> Tensor:
        """``(B, windows, width)`` of ``levels (B, patches, levels * width)`` and ``question (B or 1, text)``."""
        patches, width = levels.shape[1], self.q_downsample.out_channels
        grid = math.isqrt(patches)
        if grid**2 != patches or grid % self.side:
            raise OptionError(f"{patches} patches: allowed are those of a square image of sides that {self.side} divides")
        queries = self.q_proj(levels[..., -width:] + self.text_projection(question)[:, None])
        queries = self.q_downsample(queries.transpose(1, 2).unflatten(2, (grid, grid))).flatten(2).transpose(1, 2)
        keys, values = (self._windows(project(levels), grid) for project in (self.k_proj, self.v_proj))
        found, _ = self.clip_attn(queries.flatten(0, 1)[:, None], keys, values, need_weights=False)
        return found[:, 0].unflatten(0, queries.shape[:2])

    def _windows(self, rows: Tensor, grid: int) -> Tensor:
        """``(B * windows, side * side, width)`` of ``rows (B, grid * grid, width)``, both in raster order."""
        count = grid // self.side
        split = rows.view(-1, count, self.side, count, self.side, rows.shape[-1])
        return split.transpose(2, 3).reshape(-1, self.side**2, rows.shape[-1])


class QueCC(nn.Sequential):
    """QueCC's projector (Li et al., Inference Optimal VLMs Need Only One Visual Token but Larger Models, arXiv:2411.03312).

    It stands in for the projector of a LLaVA whose ``vision_feature_layer`` names several layers, the published ones 12, 16,
    22 and 23 of CLIP-L, the last of which is the usual one: ``(B, patches, 4 * width)`` in, ``(B, patches / side², hidden)``
    out.
    ``question (B or 1, text)`` is to be set before each forward: see :func:`question_vector`.
    """

    question: Tensor | None = None

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], heads: int = 8) -> QueCC:
        """From the tensors of a checkpoint of QueCC's code, whole or ``mm_projector.bin`` alone."""
        own = projector_tensors(tensors, WANTED)
        width, _, side, _ = own["0.q_downsample.weight"].shape
        levels, text = own["0.k_proj.0.weight"].shape[1] // width, own["0.text_projection.0.weight"].shape[1]
        hidden = own["1.weight"].shape[0]
        parts = QueryPooling(width, levels, text, side, heads), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        projector = cls(*parts).to(own["1.weight"].dtype)
        projector.load_state_dict(own)
        return projector.eval()

    def forward(self, patches: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.question is None:
            raise OptionError("QueCC pools by the question: set projector.question = question_vector(model, input_ids) before")
        pooled = self[0](patches, self.question.to(patches))
        for part in list(self)[1:]:
            pooled = part(pooled)
        return pooled


def question_vector(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What the LLM makes of the question alone: its last hidden state of the last token, ``(B, text)``.

    ``input_ids``: the question's words without template and image. A pass through the LLM of its own.
    """
    with torch.no_grad():
        hidden = model.model.language_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if attention_mask is None:
        return hidden[:, -1]
    places = torch.arange(input_ids.shape[1], device=hidden.device)
    last = (attention_mask * places).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _two_layers(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6))
